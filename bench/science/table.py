"""The lines that a stage prints: what was measured, its target, and whether it was met."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Line:
    stage: str
    what: str
    value: str
    target: str
    """Empty where the line only informs."""
    met: bool | None
    """None where the line only informs."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def at_most(stage: str, what: str, value: float, limit: float, unit: str = "", span: str = "") -> Line:
    return Line(stage, what, f"{value:.4g}{unit}{span}", f"at most {limit:.4g}{unit}", value <= limit)


def at_least(stage: str, what: str, value: float, limit: float, unit: str = "", span: str = "") -> Line:
    return Line(stage, what, f"{value:.4g}{unit}{span}", f"at least {limit:.4g}{unit}", value >= limit)


def holds(stage: str, what: str, found: bool, target: str) -> Line:
    return Line(stage, what, "yes" if found else "no", target, found)


def told(stage: str, what: str, value: str) -> Line:
    return Line(stage, what, value, "", None)


def render(lines: Iterable[Line]) -> str:
    """A text table; the last column says pass or SHORT."""
    rows: list[Sequence[str]] = [("stage", "what", "measured", "target", "")]
    for line in lines:
        verdict = "" if line.met is None else "pass" if line.met else "SHORT"
        rows.append((line.stage, line.what, line.value, line.target, verdict))
    widths = [max(len(row[column]) for row in rows) for column in range(5)]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def markdown(lines: Iterable[Line]) -> str:
    rows = ["| stage | what | measured | target | |", "| --- | --- | --- | --- | --- |"]
    for line in lines:
        verdict = "" if line.met is None else "pass" if line.met else "**short**"
        rows.append(f"| {line.stage} | {line.what} | {line.value} | {line.target} | {verdict} |")
    return "\n".join(rows)
