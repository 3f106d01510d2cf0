"""Charts of the page: plotly figures as JSON values, with the same content as words and as a table.

The figures are plain dicts: importing plotly's Python package would take longer than writing the page. A color is the name of
one of the page's CSS variables ("--c0"; "--c0/0.2" with opacity), so that one figure serves light and dark.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from transcoder.reporting.format import number

MAX_POINTS = 360
"""Points a line is drawn with; a longer series is averaged over buckets, with its range as a band behind the line."""
MAX_MARKERS = 40
"""Points beyond which a line of markers would be a thick line."""
LOG_RATIO = 12.0
"""Positive values that span more than this are drawn on a logarithmic axis."""
TABLE_ROWS = 24
"""Rows of a line chart's table, spread evenly over its longest line."""
TITLE_CHARACTERS = 40
"""An axis title is broken at this length: a narrow chart would cut it."""

_FAMILY = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_FONT = {"family": _FAMILY, "size": 12, "color": "--fg"}
_FAINT = {"size": 11, "color": "--muted"}
_AXIS = {
    "title": {"standoff": 8, "font": {"size": 12, "color": "--muted"}},
    "tickfont": _FAINT,
    "gridcolor": "--grid",
    "linecolor": "--line",
    "zerolinecolor": "--line",
    "automargin": True,
    "fixedrange": True,
}
LOOK = {
    "layout": {
        "height": 250,
        "margin": {"l": 50, "r": 14, "t": 8, "b": 42},
        "bargap": 0.12,
        "bargroupgap": 0.05,
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": _FONT,
        "showlegend": False,
        "hovermode": "closest",
        "hoverlabel": {"bgcolor": "--panel", "bordercolor": "--line", "font": _FONT},
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "shapedefaults": {
            "line": {"color": "--muted", "width": 1, "dash": "dash"},
            "label": {"font": _FAINT, "textposition": "end", "textangle": 0},
        },
    },
    "data": {"scatter": [{"line": {"width": 1.8}, "marker": {"size": 6}}], "bar": [{"marker": {"cornerradius": 2}}]},
}
"""plotly template (https://plotly.com/javascript/reference/layout/#layout-template) that every chart is drawn with."""


@dataclass(frozen=True)
class Chart:
    """A chart as the page shows it.

    Fields:
        look: "lines", "bars", "points" or "intervals": its class in the style sheet.
        data, layout: for `Plotly.react`, without the template.
        spoken: the chart in one sentence, for a screen reader.
        head, rows: its values as a table of texts.
        legend: (label, color) of each series; shown where there are several.
    """

    title: str
    look: str
    data: list[dict[str, Any]]
    layout: dict[str, Any]
    spoken: str
    head: list[str]
    rows: list[list[str]]
    legend: Sequence[tuple[str, str]] = ()
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line: x ascending, y of the same length; a value that is not finite breaks the line.

    `color`: "c0" to "c5" are distinct, "q0" to "q7" ordered.
    """

    label: str
    x: ArrayLike
    y: ArrayLike
    color: str = "c0"
    markers: bool = False


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
) -> Chart | None:
    """Lines over x; None when no line has a finite point.

    Args:
        references: Horizontal dashed lines as (value, label).
        from_zero: The y axis begins at 0 (never on a logarithmic axis).
        allow_log: Use a logarithmic y axis where the values span a factor of 12 or more.
    """
    drawn = [_Points(line) for line in lines if np.isfinite(line.y).any()]
    if not drawn:
        return None
    lost = sum(int((~np.isfinite(line.y)).sum()) for line in lines)
    if lost:
        note = f"{note} {lost} value{'s' if lost > 1 else ''} not finite.".strip()
    least, most = min(np.nanmin(p.low) for p in drawn), max(np.nanmax(p.high) for p in drawn)
    log = allow_log and least > 0 and most / least > LOG_RATIO
    first, last = min(p.x[0] for p in drawn), max(p.x[-1] for p in drawn)
    layout = {
        "hovermode": "x unified",
        "xaxis": _axis(x_label, separatethousands=True, **({"range": [first, last]} if first < last else {})),
        "yaxis": _axis(y_label, **_value_axis([least, most, *(value for value, _ in references)], log, from_zero)),
        "shapes": [_guide(words, "bottom", xref="paper", x0=0, x1=1, y0=v, y1=v) for v, words in references],
    }
    spoken = "; ".join(f"{p.line.label} ends at {number(float(p.y[np.isfinite(p.y)][-1]))}" for p in drawn)
    head = [x_label, *(p.line.label for p in drawn)]
    legend = [(p.line.label, p.line.color) for p in drawn]
    traces = [trace for p in drawn for trace in p.traces()]
    return Chart(title, "lines", traces, layout, spoken, head, _line_rows(drawn), legend, note)


class _Points:
    """What is drawn of a line: its points, or means over `MAX_POINTS` buckets with their lowest and highest value."""

    def __init__(self, line: Line) -> None:
        x, y = np.asarray(line.x), np.asarray(line.y, np.float64)
        y = self.low = self.high = np.where(np.isfinite(y), y, np.nan)
        self.banded = len(x) > MAX_POINTS
        if self.banded:
            cuts = np.arange(MAX_POINTS + 1) * len(x) // MAX_POINTS
            self.low, self.high = (join.reduceat(y, cuts[:-1]) for join in (np.fmin, np.fmax))
            with np.errstate(invalid="ignore"):
                y = np.add.reduceat(np.nan_to_num(y), cuts[:-1]) / np.add.reduceat(1.0 * np.isfinite(y), cuts[:-1])
            # The last bucket stands at the last step, so that the line ends where the run does.
            x = x[cuts[1:] - 1]
        self.line, self.x, self.y = line, x.tolist(), y

    def traces(self) -> list[dict[str, Any]]:
        color = f"--{self.line.color}"
        dotted = (self.line.markers and len(self.x) <= MAX_MARKERS) or len(self.x) == 1
        own: dict[str, Any] = {"mode": "lines+markers" if dotted else "lines", "name": _plain(self.line.label)}
        own |= {"line": {"color": color}, "marker": {"color": color}, "hovertemplate": "%{y:.4~g}"}
        edges = [(self.low, {}), (self.high, {"fill": "tonexty", "fillcolor": f"{color}/0.16"})] if self.banded else []
        hidden = {"mode": "lines", "line": {"width": 0}, "hoverinfo": "skip"}
        return [*(_scatter(self.x, y, **hidden, **fill) for y, fill in edges), _scatter(self.x, self.y, **own)]


def _line_rows(drawn: Sequence[_Points]) -> list[list[str]]:
    """Values of every line nearest to `TABLE_ROWS` places of the longest one."""
    longest = np.asarray(max(drawn, key=lambda p: len(p.x)).x)
    places = longest[np.linspace(0, len(longest) - 1, min(TABLE_ROWS, len(longest))).round().astype(int)].tolist()
    columns = [p.y[np.abs(np.subtract.outer(places, p.x)).argmin(1)] for p in drawn]
    return [[number(x), *map(_text, values)] for x, *values in zip(places, *columns, strict=True)]


def _value_axis(shown: Sequence[float], log: bool, from_zero: bool) -> dict[str, Any]:
    least, most = float(min(shown)), float(max(shown))
    if least == most == 0:
        # Nothing but zeros: a scale of billionths would say nothing.
        return {"range": [0, 1]}
    if log:
        return {"type": "log", "dtick": "D2" if most / least < 30 else 1}
    # Noise on a constant should look like it.
    room = max(0.06 * (most - least), 0.05 * max(abs(most), 1e-9) - (most - least) / 2)
    return {"range": [min(0, least) if from_zero else least - room, most + room]}


def bar_chart(
    title: str,
    edges: Sequence[float],
    groups: Sequence[tuple[str, Sequence[float], str]],
    *,
    x_label: str,
    y_label: str,
    log: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Chart | None:
    """A histogram: bins by their edges, groups of heights (label, heights, color) side by side; None when all are 0.

    Args:
        log: Heights on a logarithmic axis; a bin of 0 has no bar.
        marks: Vertical dashed lines as (x, label).
    """
    if len(edges) < 2 or max((h for _, heights, _ in groups for h in heights), default=0) <= 0:
        return None
    first, last = edges[0], edges[-1]
    bins = [(_text(a), _text(b)) for a, b in pairwise(edges)]
    middles = _shorts((a + b) / 2 for a, b in pairwise(edges))
    traces = [
        {"type": "bar", "name": _plain(label), "x": middles, "y": _shorts(h if h > 0 else math.nan for h in heights)}
        | {"marker": {"color": f"--{color}"}, "hoverinfo": "text+y+name" if len(groups) > 1 else "text+y"}
        | {"hovertext": [f"{a} to {b}" for a, b in bins]}
        for label, heights, color in groups
    ]
    layout = {
        "xaxis": _axis(x_label, range=_shorts([first, last])),
        "yaxis": _axis(y_label, **({"type": "log", "dtick": 1} if log else {})),
        "shapes": [
            _guide(words, "top", "right" if x > (first + last) / 2 else "left", yref="paper", y0=0, y1=1, x0=x, x1=x)
            for x, words in marks
            if first <= x <= last
        ],
    }
    spoken = "; ".join(f"{label}: {len(hs)} bins, largest {number(max(hs))}" for label, hs, _ in groups)
    head = ["from", "to", *(label for label, _, _ in groups)]
    columns = [map(_text, heights) for _, heights, _ in groups]
    rows = [[*ends, *heights] for ends, *heights in zip(bins, *columns, strict=True)]
    return Chart(title, "bars", traces, layout, spoken, head, rows, [(label, c) for label, _, c in groups], note)


def point_chart(title: str, points: Sequence[tuple[str, float, float]], *, x_label: str, y_label: str) -> Chart | None:
    """Points (label, x, y), named in the legend: labels next to them would lie over each other; None where there are fewer
    than two."""
    if len(points) < 2:
        return None
    labels, x, y = zip(*points, strict=True)
    colors = [f"c{n % 6}" for n in range(len(points))]
    marker = {"size": 10, "color": [f"--{color}" for color in colors]}
    more = {"mode": "markers", "text": list(map(_plain, labels)), "hovertemplate": "%{text}: %{x}, %{y}<extra></extra>"}
    trace = _scatter(_shorts(x), y, marker=marker, **more)
    layout = {
        "xaxis": _axis(x_label, **_value_axis(x, False, False)),
        "yaxis": _axis(y_label, **_value_axis(y, False, False)),
    }
    rows = [[label, _text(a), _text(b)] for label, a, b in points]
    spoken = "; ".join(f"{label}: {number(b)} at {number(a)}" for label, a, b in points)
    return Chart(
        title, "points", [trace], layout, spoken, ["", x_label, y_label], rows, list(zip(labels, colors, strict=True))
    )


def interval_chart(title: str, rows: Sequence[dict[str, Any]], *, x_label: str) -> Chart | None:
    """Means with their intervals, one a row: {"label", "mean", "low", "high", "verdict"}; None without rows."""
    if not rows:
        return None
    traces = []
    for row in rows:
        mean, low, high = row["mean"], row["low"], row["high"]
        color = {"better": "--c2", "worse": "--c1"}.get(row["verdict"], "--c0")
        more: dict[str, Any] = {"hovertext": interval_words(row), "marker": {"size": 9, "color": color}}
        if low is not None:
            reach = {"array": [short(high - mean)], "arrayminus": [short(mean - low)]}
            more["error_x"] = {"symmetric": False, "thickness": 2, "width": 5, "color": color, **reach}
        trace = _scatter([short(mean)], [], mode="markers", hoverinfo="text", **more)
        traces.append(trace | {"y": [_plain(row["label"])]})
    layout = {
        "height": 90 + 30 * len(rows),
        "xaxis": _axis(x_label, zeroline=True, zerolinewidth=2, zerolinecolor="--muted"),
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    spoken = "; ".join(f"{row['label']}: {interval_words(row)}" for row in rows)
    texts = [[row["label"], *(number(row[name]) for name in ("mean", "low", "high"))] for row in rows]
    return Chart(title, "intervals", traces, layout, spoken, ["", "mean", "low", "high"], texts)


def interval_words(row: dict[str, Any]) -> str:
    """A mean with its interval in words."""
    mean = f"{row['mean']:+.3g}"
    return mean if row["low"] is None else f"{mean} [{row['low']:+.3g}, {row['high']:+.3g}]"


def ordered_colors(count: int) -> list[str]:
    """`count` colors with an order, from q0 (faint) to q7 (strong)."""
    return [f"q{round(7 * i / max(count - 1, 1)) if count > 1 else 7}" for i in range(count)]


def short(value: float) -> float | int | None:
    """Five significant digits: more would only make the page larger. None for what JSON has no number for."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def _shorts(values: Iterable[float]) -> list[float | int | None]:
    return [short(float(v)) for v in values]


def _text(value: float) -> str:
    return number(short(value))


def _scatter(x: list[Any], y: Iterable[float], **more: Any) -> dict[str, Any]:
    return {"type": "scatter", "x": x, "y": _shorts(y), **more}


def _guide(words: str, yanchor: str, xanchor: str = "right", **at: Any) -> dict[str, Any]:
    """A straight line across the chart, with words at its end."""
    return {"type": "line", **at, "label": {"text": _plain(words), "xanchor": xanchor, "yanchor": yanchor}}


def _axis(title: str, **more: Any) -> dict[str, Any]:
    words = title + " (log)" if more.get("type") == "log" else title
    return {"title": {"text": "<br>".join(map(_plain, textwrap.wrap(words, TITLE_CHARACTERS)))}, **more}


def _plain(text: object) -> str:
    """plotly reads a few HTML tags in its texts; ours are shown as they are."""
    return html.escape(str(text), quote=False)
