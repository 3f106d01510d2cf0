"""Charts of the page: plotly figures as JSON values, with the same content as words and as a table.

The figures are plain dicts: importing plotly's Python package would take longer than writing the page. A color is the name of
one of the page's CSS variables ("--c0"; "--c0/0.2" with opacity), so that one figure serves light and dark.
"""

from __future__ import annotations

import html
import math
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from transcoder.reporting.format import number

MAX_POINTS = 360
"""Points a line is drawn with; a longer series is averaged over buckets, with its range as a band behind the line."""
MAX_MARKERS = 40
"""Points beyond which a line of markers would be a thick line."""
LOG_RATIO = 12.0
"""Positive values that span more than this are drawn on a logarithmic axis."""
TABLE_ROWS = 24
"""Rows of a line chart's table, spread evenly over its longest line."""
GRAPH_TABLE_ROWS = 200
TITLE_CHARACTERS = 40
"""An axis title is broken at this length: a narrow chart would cut it."""

FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
_AXIS = {
    "title": {"standoff": 8, "font": {"size": 12, "color": "--muted"}},
    "tickfont": {"size": 11, "color": "--muted"},
    "gridcolor": "--grid",
    "linecolor": "--line",
    "zerolinecolor": "--line",
    "tickcolor": "--line",
    "automargin": True,
    "fixedrange": True,
}
LOOK = {
    "layout": {
        "height": 250,
        "margin": {"l": 50, "r": 14, "t": 8, "b": 42},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": FONT, "size": 12, "color": "--fg"},
        "hovermode": "closest",
        "hoverlabel": {
            "bgcolor": "--panel",
            "bordercolor": "--line",
            "font": {"family": FONT, "size": 12, "color": "--fg"},
        },
        "showlegend": False,
        "xaxis": _AXIS,
        "yaxis": _AXIS,
        "shapedefaults": {"line": {"color": "--muted", "width": 1, "dash": "dash"}},
        "annotationdefaults": {"showarrow": False, "font": {"size": 11, "color": "--muted"}},
    }
}
"""plotly template (https://plotly.com/javascript/reference/layout/#layout-template) that every chart is drawn with."""


@dataclass(frozen=True)
class Chart:
    """A chart as the page shows it.

    Fields:
        look: "lines", "bars", "intervals" or "graph": its class in the style sheet.
        figure: {"data", "layout"} for `Plotly.react`, without the template.
        spoken: the chart in one sentence, for a screen reader.
        head, rows: its values as a table of texts.
        legend: (label, color) of each series; shown where there are several.
    """

    title: str
    look: str
    figure: dict[str, Any]
    spoken: str
    head: list[str]
    rows: list[list[str]]
    legend: list[tuple[str, str]] = field(default_factory=list)
    note: str = ""


@dataclass(frozen=True)
class Line:
    """One line: x ascending, y of the same length; a value that is not finite breaks the line.

    `color`: "c0" to "c5" are distinct, "q0" to "q7" ordered.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
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
    least, most = min(p.least for p in drawn), max(p.most for p in drawn)
    log = allow_log and least > 0 and most / least > LOG_RATIO
    first, last = min(p.x[0] for p in drawn), max(p.x[-1] for p in drawn)
    layout = {
        "hovermode": "x unified",
        "xaxis": _axis(x_label, separatethousands=True, **({"range": [first, last]} if first < last else {})),
        "yaxis": _axis(y_label, **_value_axis([least, most, *(value for value, _ in references)], log, from_zero)),
        "shapes": [{"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": v, "y1": v} for v, _ in references],
        "annotations": [
            {"xref": "paper", "x": 1, "xanchor": "right", "yanchor": "bottom", "text": _plain(label)}
            | {"y": math.log10(value) if log else value}
            for value, label in references
        ],
    }
    return Chart(
        title,
        "lines",
        {"data": [trace for p in drawn for trace in p.traces(len(drawn) > 1)], "layout": layout},
        "; ".join(f"{p.line.label} ends at {number(p.last)}" for p in drawn),
        [x_label, *(p.line.label for p in drawn)],
        _line_rows(drawn),
        [(p.line.label, p.line.color) for p in drawn],
        note,
    )


class _Points:
    """What is drawn of a line: its points, or means over `MAX_POINTS` buckets with their lowest and highest value."""

    def __init__(self, line: Line) -> None:
        x, y = np.asarray(line.x), np.asarray(line.y, np.float64)
        y = np.where(np.isfinite(y), y, np.nan)
        self.line, self.banded = line, len(x) > MAX_POINTS
        self.low = self.high = y
        if self.banded:
            cuts = np.arange(MAX_POINTS + 1) * len(x) // MAX_POINTS
            self.low, self.high = np.fmin.reduceat(y, cuts[:-1]), np.fmax.reduceat(y, cuts[:-1])
            known = np.add.reduceat(np.isfinite(y).astype(np.int64), cuts[:-1])
            with np.errstate(invalid="ignore"):
                y = np.add.reduceat(np.nan_to_num(y), cuts[:-1]) / known
            # The last bucket stands at the last step, so that the line ends where the run does.
            x = x[cuts[1:] - 1]
        self.x, self.y = x.tolist(), y
        self.least, self.most = float(np.nanmin(self.low)), float(np.nanmax(self.high))
        self.last = float(y[np.isfinite(y)][-1])

    def traces(self, named: bool) -> list[dict[str, Any]]:
        line, color = self.line, f"--{self.line.color}"
        dotted = (line.markers and len(self.x) <= MAX_MARKERS) or len(self.x) == 1
        own = {
            "type": "scatter",
            "mode": "lines+markers" if dotted else "lines",
            "name": _plain(line.label),
            "x": self.x,
            "y": _shorts(self.y),
            "line": {"color": color, "width": 1.8},
            "marker": {"size": 6, "color": color},
            "hovertemplate": _hover("%{y:.4~g}", named),
        }
        if not self.banded:
            return [own]
        edge = {"type": "scatter", "mode": "lines", "x": self.x, "line": {"width": 0}, "hoverinfo": "skip"}
        filled = {"fill": "tonexty", "fillcolor": f"{color}/0.16"}
        return [{**edge, "y": _shorts(self.low)}, {**edge, "y": _shorts(self.high), **filled}, own]


def _line_rows(drawn: Sequence[_Points]) -> list[list[str]]:
    """Values of every line nearest to `TABLE_ROWS` places of the longest one."""
    longest = max(drawn, key=lambda p: len(p.x)).x
    places = np.unique(np.linspace(0, len(longest) - 1, min(TABLE_ROWS, len(longest))).round().astype(int))
    nearest = [np.abs(np.subtract.outer(np.asarray(longest)[places], p.x)).argmin(1) for p in drawn]
    return [
        [number(longest[place]), *(number(short(p.y[near[n]])) for p, near in zip(drawn, nearest, strict=True))]
        for n, place in enumerate(places)
    ]


def _value_axis(shown: Sequence[float], log: bool, from_zero: bool) -> dict[str, Any]:
    least, most = min(shown), max(shown)
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
    heights = [h for _, hs, _ in groups for h in hs]
    if len(edges) < 2 or not heights or max(heights) <= 0:
        return None
    first, last = edges[0], edges[-1]
    bins = list(pairwise(edges))
    marks = [(x, label) for x, label in marks if first <= x <= last]
    traces = [
        {
            "type": "bar",
            "name": _plain(label),
            "x": _shorts([(a + b) / 2 for a, b in bins]),
            "y": [short(h) if h > 0 else None for h in hs],
            "customdata": [f"{number(short(a))} to {number(short(b))}" for a, b in bins],
            "marker": {"color": f"--{color}", "cornerradius": 2},
            "hovertemplate": _hover("%{customdata}: %{y:.4~g}", len(groups) > 1),
        }
        for label, hs, color in groups
    ]
    layout = {
        "bargap": 0.12,
        "bargroupgap": 0.05,
        "xaxis": _axis(x_label, range=_shorts([first, last])),
        "yaxis": _axis(y_label, **({"type": "log", "dtick": 1} if log else {})),
        "shapes": [{"type": "line", "yref": "paper", "y0": 0, "y1": 1, "x0": x, "x1": x} for x, _ in marks],
        "annotations": [
            {"yref": "paper", "y": 1, "yanchor": "top", "x": x, "text": _plain(label)}
            | {"xanchor": "right" if x > (first + last) / 2 else "left"}
            for x, label in marks
        ],
    }
    rows = [
        [number(short(a)), number(short(b)), *(number(short(hs[n])) for _, hs, _ in groups)]
        for n, (a, b) in enumerate(bins)
    ]
    return Chart(
        title,
        "bars",
        {"data": traces, "layout": layout},
        "; ".join(f"{label}: {len(hs)} bins, largest {number(max(hs))}" for label, hs, _ in groups),
        ["from", "to", *(label for label, _, _ in groups)],
        rows,
        [(label, color) for label, _, color in groups],
        note,
    )


def interval_chart(title: str, rows: Sequence[dict[str, Any]], *, x_label: str) -> Chart | None:
    """Means with their intervals, one a row: {"label", "mean", "low", "high", "verdict"}; None without rows."""
    if not rows:
        return None
    traces: list[dict[str, Any]] = []
    for row in rows:
        mean, low, high = row["mean"], row["low"], row["high"]
        color = {"better": "--c2", "worse": "--c1"}.get(row.get("verdict") or "", "--c0")
        trace: dict[str, Any] = {
            "type": "scatter",
            "mode": "markers",
            "x": [short(mean)],
            "y": [_plain(row["label"])],
            "marker": {"size": 9, "color": color},
            "hovertemplate": _hover("%{x:.4~g}" if low is None else f"%{{x:.4~g}} [{number(low)}, {number(high)}]"),
        }
        if low is not None:
            reach = {"array": [short(high - mean)], "arrayminus": [short(mean - low)], "color": color}
            trace["error_x"] = {"type": "data", "symmetric": False, "thickness": 2, "width": 5, **reach}
        traces.append(trace)
    layout = {
        "height": 90 + 30 * len(rows),
        "xaxis": _axis(x_label, zeroline=True, zerolinewidth=2, zerolinecolor="--muted"),
        "yaxis": {"autorange": "reversed", "type": "category"},
    }
    return Chart(
        title,
        "intervals",
        {"data": traces, "layout": layout},
        "; ".join(f"{row['label']}: {interval_words(row)}" for row in rows),
        ["", "mean", "low", "high"],
        [[row["label"], *(number(row[name]) for name in ("mean", "low", "high"))] for row in rows],
    )


def graph_chart(
    title: str,
    groups: Sequence[Sequence[int]],
    edges: Sequence[tuple[int, int, float, bool, bool]],
    *,
    total: int,
    note: str,
) -> Chart:
    """Groups of latents, each drawn as a circle; the circles stand in rows.

    Args:
        groups: the latents of each group, the largest group first.
        edges: pairs as (latent, latent, correlation, flagged, mergeable).
        total: groups in all, those included that are not drawn.
    """
    place: dict[int, tuple[float, float]] = {}
    radii = [0.7 if len(g) == 2 else max(0.9, 1.15 * len(g) / math.pi) for g in groups]
    wide = max(8.0, 1.1 * math.sqrt(sum((2 * r + 1.6) * (2 * r + 1.2) for r in radii)))
    left = top = row_height = 0.0
    for group, radius in zip(groups, radii, strict=True):
        if left > 0 and left + 2 * radius > wide:
            left, top, row_height = 0.0, top - row_height - 1.2, 0.0
        for n, latent in enumerate(group):
            turn = 2 * math.pi * n / len(group) + (0 if len(group) == 2 else math.pi / 2)
            place[latent] = (left + radius + radius * math.cos(turn), top - radius - radius * math.sin(turn))
        left += 2 * radius + 1.6
        row_height = max(row_height, 2 * radius)
    traces: list[dict[str, Any]] = []
    for flagged in (False, True):
        for mergeable in (False, True):
            ends = [(i, j) for i, j, _, f, m in edges if (f, m) == (flagged, mergeable)]
            color = "--c1" if mergeable else "--muted" if flagged else "--muted/0.45"
            traces.append(
                {
                    "type": "scatter",
                    "mode": "lines",
                    "hoverinfo": "skip",
                    "line": {"color": color, "width": 4.5 if flagged else 2},
                    "x": [v for i, j in ends for v in (short(place[i][0]), short(place[j][0]), None)],
                    "y": [v for i, j in ends for v in (short(place[i][1]), short(place[j][1]), None)],
                }
            )
    latents = list(place)
    traces.append(
        {
            "type": "scatter",
            "mode": "markers" if len(latents) > 90 else "markers+text",
            "x": _shorts([x for x, _ in place.values()]),
            "y": _shorts([y for _, y in place.values()]),
            "text": list(map(str, latents)),
            "customdata": latents,
            "textposition": "top center",
            "textfont": {"size": 10, "color": "--muted"},
            "cliponaxis": False,
            "marker": {
                "size": 9 if len(latents) > 60 else 12,
                "color": "--c0",
                "line": {"color": "--panel", "width": 1.5},
            },
            "hovertemplate": _hover("latent %{customdata}"),
        }
    )
    layout = {
        "height": 560,
        "margin": {"l": 14, "r": 14, "t": 18, "b": 8},
        "xaxis": {"visible": False},
        "yaxis": {"visible": False, "scaleanchor": "x"},
    }
    yes = ("no", "yes")
    return Chart(
        title,
        "graph",
        {"data": traces, "layout": layout},
        f"{total} groups; {len(groups)} drawn, the largest of {len(groups[0])} latents",
        ["latent", "latent", "correlation", "flagged", "mergeable"],
        [[str(i), str(j), number(short(r)), yes[f], yes[m]] for i, j, r, f, m in edges[:GRAPH_TABLE_ROWS]],
        note=note,
    )


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


def _axis(title: str, **more: Any) -> dict[str, Any]:
    words = title + " (log)" if more.get("type") == "log" else title
    return {"title": {"text": "<br>".join(map(_plain, textwrap.wrap(words, TITLE_CHARACTERS)))}, **more}


def _hover(text: str, named: bool = False) -> str:
    return f"{text}<extra>{'%{fullData.name}' if named else ''}</extra>"


def _plain(text: object) -> str:
    """plotly reads a few HTML tags in its texts; ours are shown as they are."""
    return html.escape(str(text), quote=False)
