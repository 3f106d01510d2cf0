"""Charts as inline SVG: drawn here, so that the page shows them without a script; a small script adds hover values."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transcoder.reporting.html import embedded_json, escape
from transcoder.reporting.numbers import number, thousands

WIDTH, HEIGHT = 380, 212
LEFT, RIGHT, TOP, BOTTOM = 42, 12, 24, 36
MAX_POINTS = 240
"""Points a line is drawn with; a longer series is averaged over buckets, with its range as a band behind the line."""
LEAST_SPAN = 0.1
"""The y axis spans at least this share of its largest value: noise on a constant should look like it."""
LOG_RATIO = 12.0
"""Positive values that span more than this are drawn on a logarithmic axis."""


@dataclass(frozen=True)
class Line:
    """One line: x ascending, y of the same length; a value that is not finite breaks the line.

    `color` is a CSS class: c0..c5 are distinct, q0..q7 ordered.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    color: str = "c0"
    markers: bool = False


@dataclass(frozen=True)
class Axis:
    """A scale from data to pixels, with its ticks."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = self.low, self.high, value
        if self.log:
            low, high, at = math.log(low), math.log(high), math.log(max(value, self.low / 10))
        share = (at - low) / (high - low) if high > low else 0.5
        return self.start + share * (self.end - self.start)

    def ticks(self) -> list[float]:
        return _log_ticks(self.low, self.high) if self.log else _ticks(self.low, self.high)


def line_chart(
    title: str,
    lines: Sequence[Line],
    *,
    x_label: str = "step",
    y_label: str = "",
    references: Sequence[tuple[float, str]] = (),
    from_zero: bool = False,
    allow_log: bool = False,
    note: str = "",
) -> str:
    """A figure with lines over x. Returns "" when no line has a finite point.

    Args:
        references: Horizontal dashed lines as (value, label).
        from_zero: The y axis begins at 0 (never on a logarithmic axis).
        allow_log: Use a logarithmic y axis where the values span a factor of 12 or more.
    """
    drawn = [_Drawn.of(line) for line in lines]
    drawn = [d for d in drawn if d.x]
    if not drawn:
        return ""
    ys = [y for d in drawn for y in (*d.low, *d.high) if math.isfinite(y)] + [v for v, _ in references]
    low, high = min(ys), max(ys)
    log = allow_log and low > 0 and high / low > LOG_RATIO
    if from_zero and not log:
        low = min(0.0, low)
    if log:
        low, high = low / 1.08, high * 1.08
    else:
        lacking = LEAST_SPAN * max(abs(low), abs(high), 1e-9) - (high - low)
        if lacking > 0:
            low, high = low - lacking / 2, high + lacking / 2
        room = 0.06 * (high - low)
        low, high = (low if from_zero and low == 0 else low - room), high + room
    xs = [x for d in drawn for x in d.x]
    x_axis = Axis(min(xs), max(xs), LEFT, WIDTH - RIGHT)
    y_axis = Axis(low, high, HEIGHT - BOTTOM, TOP, log)

    parts = [_frame(x_axis, y_axis, x_label, y_label + (" (log)" if log else ""))]
    for value, label in references:
        y = y_axis(value)
        above = y - 4 if y - 14 > TOP else y + 11
        parts.append(
            f'<line class="ref" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="reft" x="{WIDTH - RIGHT - 2}" y="{above:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for d in drawn:
        if d.banded:
            parts.append(f'<path class="band {d.line.color}" d="{_band(d, x_axis, y_axis)}"/>')
    for d in drawn:
        parts.append(f'<path class="line {d.line.color}" d="{_path(d, x_axis, y_axis)}"/>')
        if d.line.markers or len(d.x) == 1:
            dots = "".join(
                f'<circle cx="{x_axis(x):.1f}" cy="{y_axis(y):.1f}" r="2.6"/>'
                for x, y in zip(d.x, d.y, strict=True)
                if math.isfinite(y)
            )
            parts.append(f'<g class="dots {d.line.color}">{dots}</g>')
    data = {
        "x": x_label,
        "series": [
            {
                "label": d.line.label,
                "color": d.line.color,
                "px": [round(x_axis(x), 1) for x in d.x],
                "py": [round(y_axis(y), 1) if math.isfinite(y) else None for y in d.y],
                "xt": [number(x) for x in d.x],
                "yt": [number(y) for y in d.y],
            }
            for d in drawn
        ],
    }
    spoken = "; ".join(f"{d.line.label} ends at {_last(d.y)}" for d in drawn)
    lost = sum(not math.isfinite(y) for line in lines for y in line.y)
    if lost:
        note = f"{note} {lost} value{'s' if lost > 1 else ''} not finite.".strip()
    return _figure(title, "".join(parts), spoken, _legend(drawn), data, note)


def bar_chart(
    title: str,
    edges: Sequence[float],
    groups: Sequence[tuple[str, Sequence[float], str]],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    value: Callable[[float], str] = number,
    note: str = "",
) -> str:
    """A histogram: bins by their edges, one or two groups of heights (label, heights, colour class) side by side.

    Args:
        log: Heights on a logarithmic axis; a bin of 0 has no bar.
        marks: Vertical dashed lines as (x, label).
    """
    heights = [h for _, hs, _ in groups for h in hs]
    if len(edges) < 2 or not heights or max(heights) <= 0:
        return ""
    x_axis = Axis(edges[0], edges[-1], LEFT, WIDTH - RIGHT)
    if log:
        smallest = min(h for h in heights if h > 0)
        y_axis = Axis(smallest / 2, max(heights) * 1.3, HEIGHT - BOTTOM, TOP, True)
    else:
        y_axis = Axis(0, max(heights) * 1.06, HEIGHT - BOTTOM, TOP)
    parts = [_frame(x_axis, y_axis, x_label, y_label + (" (log)" if log else ""))]
    for index, (label, hs, color) in enumerate(groups):
        for low, high, height in zip(edges, edges[1:], hs, strict=False):
            if height <= 0:
                continue
            left, right = x_axis(low) + 0.75, x_axis(high) - 0.75
            width = (right - left) / len(groups)
            x, y = left + index * width, y_axis(height)
            spoken = f"{label}, {number(low)} to {number(high)}: {value(height)}"
            parts.append(
                f'<rect class="bar {color}" x="{x:.1f}" y="{y:.1f}" width="{max(width - 0.5, 0.5):.1f}" '
                f'height="{HEIGHT - BOTTOM - y:.1f}" data-tip="{escape(spoken)}"><title>{escape(spoken)}</title></rect>'
            )
    for at, label in marks:
        if edges[0] <= at <= edges[-1]:
            x = x_axis(at)
            side = "end" if x > WIDTH / 2 else "start"
            shift = -4 if side == "end" else 4
            parts.append(
                f'<line class="ref" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                f'<text class="reft" x="{x + shift:.1f}" y="{TOP + 9}" text-anchor="{side}">{escape(label)}</text>'
            )
    legend = _swatches([(label, color) for label, _, color in groups]) if len(groups) > 1 else ""
    spoken = "; ".join(f"{label}: {len(hs)} bins, largest {value(max(hs))}" for label, hs, _ in groups)
    return _figure(title, "".join(parts), spoken, legend, None, note)


def ordered_colors(count: int) -> list[str]:
    """CSS classes of `count` colours with an order, from q0 (faint) to q7 (strong)."""
    return [f"q{round(7 * i / max(count - 1, 1)) if count > 1 else 7}" for i in range(count)]


@dataclass(frozen=True)
class _Drawn:
    line: Line
    x: list[float]
    y: list[float]
    low: list[float]
    high: list[float]

    @property
    def banded(self) -> bool:
        return len(self.x) < len(self.line.x)

    @classmethod
    def of(cls, line: Line) -> _Drawn:
        if not any(math.isfinite(y) for y in line.y):
            return cls(line, [], [], [], [])
        if len(line.x) <= MAX_POINTS:
            y = list(line.y)
            return cls(line, list(line.x), y, y, y)
        xs, ys, lows, highs = [], [], [], []
        for b in range(MAX_POINTS):
            begin, end = b * len(line.x) // MAX_POINTS, (b + 1) * len(line.x) // MAX_POINTS
            finite = [y for y in line.y[begin:end] if math.isfinite(y)]
            # The last bucket stands at the last step, so that the line ends where the run does.
            xs.append(line.x[end - 1])
            ys.append(math.fsum(finite) / len(finite) if finite else math.nan)
            lows.append(min(finite, default=math.nan))
            highs.append(max(finite, default=math.nan))
        return cls(line, xs, ys, lows, highs)


def _path(d: _Drawn, x_axis: Axis, y_axis: Axis) -> str:
    out, pen = [], "M"
    for x, y in zip(d.x, d.y, strict=True):
        if not math.isfinite(y):
            pen = "M"
            continue
        out.append(f"{pen}{x_axis(x):.1f} {y_axis(y):.1f}")
        pen = "L"
    return "".join(out)


def _band(d: _Drawn, x_axis: Axis, y_axis: Axis) -> str:
    points = [(x, a, b) for x, a, b in zip(d.x, d.low, d.high, strict=True) if math.isfinite(a)]
    up = [f"{x_axis(x):.1f} {y_axis(b):.1f}" for x, _, b in points]
    down = [f"{x_axis(x):.1f} {y_axis(a):.1f}" for x, a, _ in reversed(points)]
    return "M" + "L".join([*up, *down]) + "Z"


def _frame(x_axis: Axis, y_axis: Axis, x_label: str, y_label: str) -> str:
    parts = []
    for value, label in _labelled(y_axis.ticks()):
        y = y_axis(value)
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{escape(label)}</text>'
        )
    for value, label in _labelled(x_axis.ticks()):
        x = x_axis(value)
        anchor = "end" if x > WIDTH - RIGHT - 8 else "middle"
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 14}" text-anchor="{anchor}">{escape(label)}</text>'
        )
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>')
    centre = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{centre:.0f}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    parts.append(f'<text class="label" x="0" y="10">{escape(y_label)}</text>')
    return "".join(parts)


def _figure(title: str, drawing: str, spoken: str, legend: str, data: object, note: str) -> str:
    hover = "" if data is None else f' data-chart="{escape(embedded_json(data))}" tabindex="0"'
    foot = f'<p class="note">{escape(note)}</p>' if note else ""
    aria = escape(f"{title}: {spoken}")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}<div class="plot">'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{aria}"{hover}>{drawing}</svg></div>{foot}</figure>'
    )


def _legend(drawn: Sequence[_Drawn]) -> str:
    return _swatches([(d.line.label, d.line.color) for d in drawn]) if len(drawn) > 1 else ""


def _swatches(labels: Sequence[tuple[str, str]]) -> str:
    items = "".join(f'<span><i class="{color}"></i>{escape(label)}</span>' for label, color in labels)
    return f'<div class="legend">{items}</div>'


def _last(values: Sequence[float]) -> str:
    return number(next((v for v in reversed(values) if math.isfinite(v)), None))


def _ticks(low: float, high: float, wanted: int = 5) -> list[float]:
    span = high - low
    if span <= 0:
        return [low]
    raw = span / wanted
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= raw)
    first = math.ceil(low / step - 1e-9)
    # Rounded, so that 0.30000000000000004 is labelled 0.3.
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _labelled(ticks: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks with labels of as many digits as tell them apart."""
    size = max((abs(t) for t in ticks), default=0.0)
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    even = not steps or max(steps) < 1.5 * min(steps)
    if even and 1e-3 <= size < 1e4:
        decimals = next(d for d in range(12) if all(abs(round(t, d) - t) < 1e-9 for t in ticks))
        return [(t, f"{t:.{decimals}f}") for t in ticks]
    return [(t, _compact(t)) for t in ticks]


def _compact(value: float) -> str:
    """1500 as '1.5k', 0.00015 as '1.5e-4', for labels that differ by powers of ten."""
    if value == 0 or abs(value) >= 1e-3:
        return thousands(value)
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{float(mantissa):g}e{int(exponent)}"


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for leads in ((1, 2, 5), (1, 3), (1,)):
        ticks = [lead * 10.0**d for d in decades for lead in leads if low <= lead * 10.0**d <= high]
        if len(ticks) <= 7:
            return ticks
    return ticks[:: math.ceil(len(ticks) / 6)]
