"""What the page is made of: plain values that its script draws. Texts stay texts here; nothing is HTML."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from transcoder.reporting.format import as_float, number

Block = dict[str, Any]
Cell = str | dict[str, Any]
"""A text, or {"text", "pill": "good" | "warn" | "bad" | "", "note", "latents": [ids]}; every field may lack."""

MAX_POINTS = 360
"""Points a line is drawn with; a longer series is averaged over buckets, with its range as a band behind the line."""
DOTTED = 40
"""Points beyond which a line of markers would be a thick line."""
LOG_RATIO = 12.0
"""Positive values that span more than this are drawn on a logarithmic axis."""


def text(words: str, look: str = "") -> Block:
    """A paragraph. `look`: "", "lead", "note", "empty", "warn"."""
    return {"is": "text", "text": words, "look": look}


def heading(words: str) -> Block:
    return {"is": "heading", "text": words}


def tiles(facts: Iterable[tuple[str, str] | tuple[str, str, str]]) -> Block:
    """Figures side by side: (name, value) or (name, value, meaning)."""
    rows = [tuple(fact) for fact in facts]
    return {"is": "tiles", "rows": [[r[0], r[1], r[2] if len(r) > 2 else ""] for r in rows]}


def table(head: Sequence[str], rows: Iterable[Sequence[Cell]], numeric: Iterable[int] = (), caption: str = "") -> Block:
    """A table; columns in `numeric` are right-aligned."""
    return {
        "is": "table",
        "head": list(head),
        "rows": [list(r) for r in rows],
        "numeric": list(numeric),
        "caption": caption,
    }


def panel(title: str, blocks: Sequence[Block], look: str = "") -> Block:
    return {"is": "panel", "title": title, "blocks": list(blocks), "look": look}


def columns(*parts: Sequence[Block]) -> Block:
    """Blocks beside each other; below each other where the screen is narrow."""
    return {"is": "columns", "parts": [list(p) for p in parts]}


def charts(drawn: Iterable[Block | None]) -> Block:
    """A grid of charts; those that have nothing to show (None) are left out."""
    return {"is": "charts", "charts": [d for d in drawn if d is not None]}


def details(summary: str, blocks: Sequence[Block]) -> Block:
    """What is folded away until it is asked for."""
    return {"is": "details", "summary": summary, "blocks": list(blocks)}


@dataclass(frozen=True)
class Line:
    """One line: x ascending, y of the same length; a value that is not finite breaks the line.

    `color` names a colour of the page: c0..c5 are distinct, q0..q7 ordered.
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
) -> Block | None:
    """Lines over x; None when no line has a finite point.

    Args:
        references: Horizontal dashed lines as (value, label).
        from_zero: The y axis begins at 0 (never on a logarithmic axis).
        allow_log: Use a logarithmic y axis where the values span a factor of 12 or more.
    """
    drawn = [_series(line) for line in lines if any(math.isfinite(y) for y in line.y)]
    if not drawn:
        return None
    every = [y for line in lines for y in line.y if math.isfinite(y)]
    log = allow_log and min(every) > 0 and max(every) / min(every) > LOG_RATIO
    lost = sum(not math.isfinite(y) for line in lines for y in line.y)
    if lost:
        note = f"{note} {lost} value{'s' if lost > 1 else ''} not finite.".strip()
    return {
        "is": "chart",
        "kind": "lines",
        "title": title,
        "x": x_label,
        "y": y_label,
        "log": log,
        "zero": from_zero and not log,
        "series": drawn,
        "references": [[short(v), label] for v, label in references],
        "note": note,
        "spoken": "; ".join(f"{d['label']} ends at {_last(d['y'])}" for d in drawn),
    }


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
) -> Block | None:
    """A histogram: bins by their edges, groups of heights (label, heights, colour) beside each other; None when all are 0.

    Args:
        log: Heights on a logarithmic axis; a bin of 0 has no bar.
        marks: Vertical dashed lines as (x, label).
    """
    heights = [h for _, hs, _ in groups for h in hs]
    if len(edges) < 2 or not heights or max(heights) <= 0:
        return None
    return {
        "is": "chart",
        "kind": "bars",
        "title": title,
        "x": x_label,
        "y": y_label,
        "log": log,
        "edges": [short(e) for e in edges],
        "groups": [{"label": label, "heights": [short(h) for h in hs], "color": color} for label, hs, color in groups],
        "marks": [[short(x), label] for x, label in marks if edges[0] <= x <= edges[-1]],
        "note": note,
        "spoken": "; ".join(f"{label}: {len(hs)} bins, largest {number(max(hs))}" for label, hs, _ in groups),
    }


def interval_chart(title: str, rows: Sequence[dict[str, Any]], *, x_label: str, note: str = "") -> Block | None:
    """Means with their intervals, one a row: {"label", "mean", "low", "high", "verdict"}; None without rows."""
    if not rows:
        return None
    shown = [
        {
            "label": r["label"],
            "mean": short(r["mean"]),
            "low": None if r["low"] is None else short(r["low"]),
            "high": None if r["high"] is None else short(r["high"]),
            "verdict": r.get("verdict") or "",
        }
        for r in rows
    ]
    spoken = "; ".join(f"{r['label']}: {interval_words(r)}" for r in shown)
    return {
        "is": "chart",
        "kind": "intervals",
        "title": title,
        "x": x_label,
        "y": "",
        "rows": shown,
        "note": note,
        "spoken": spoken,
    }


def interval_words(row: dict[str, Any]) -> str:
    """A mean with its interval in words."""
    mean = f"{row['mean']:+.3g}"
    return mean if row["low"] is None else f"{mean} [{row['low']:+.3g}, {row['high']:+.3g}]"


def ordered_colors(count: int) -> list[str]:
    """`count` colours with an order, from q0 (faint) to q7 (strong)."""
    return [f"q{round(7 * i / max(count - 1, 1)) if count > 1 else 7}" for i in range(count)]


def short(value: float) -> float | int | None:
    """Five significant digits: more would only make the page larger. None for what JSON has no number for."""
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.5g}")
    return int(rounded) if rounded.is_integer() and abs(rounded) < 1e15 else rounded


def real(value: object) -> float | None:
    """`value` where it is a finite number, else None."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return None
    found = as_float(value)
    return found if math.isfinite(found) else None


def _series(line: Line) -> dict[str, Any]:
    if len(line.x) <= MAX_POINTS:
        xs, ys = list(line.x), [short(y) for y in line.y]
        return {"label": line.label, "color": line.color, "dots": line.markers and len(xs) <= DOTTED, "x": xs, "y": ys}
    buckets = []
    for b in range(MAX_POINTS):
        begin, end = b * len(line.x) // MAX_POINTS, (b + 1) * len(line.x) // MAX_POINTS
        finite = [y for y in line.y[begin:end] if math.isfinite(y)]
        # The last bucket stands at the last step, so that the line ends where the run does.
        buckets.append((line.x[end - 1], finite))
    return {
        "label": line.label,
        "color": line.color,
        "dots": False,
        "x": [x for x, _ in buckets],
        "y": [short(math.fsum(f) / len(f)) if f else None for _, f in buckets],
        "low": [short(min(f)) if f else None for _, f in buckets],
        "high": [short(max(f)) if f else None for _, f in buckets],
    }


def _last(values: Sequence[float | None]) -> str:
    return number(next((v for v in reversed(values) if v is not None), None))
