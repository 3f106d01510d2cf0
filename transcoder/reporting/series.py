"""The columns of metrics.jsonl, compact enough for a run of a million steps."""

from __future__ import annotations

import math
import statistics
from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from transcoder.reporting.format import as_float, whole

FILE_NAME = "metrics.jsonl"
RESERVED = ("step", "time", "event", "nonfinite")
"""Names in a line of metrics.jsonl that are no metric."""
TAIL = 10
"""Logged values that a noisy training figure is averaged over."""


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over the run: steps and values of equal length; what was NaN or infinite is kept as such."""

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def last(self) -> float | None:
        """The last finite value."""
        return next((v for v in reversed(self.values) if math.isfinite(v)), None)

    def tail_mean(self, count: int = TAIL) -> float | None:
        """The mean of the last `count` values that are finite: one batch's figure is noise."""
        tail = [v for v in self.values[-count:] if math.isfinite(v)]
        return math.fsum(tail) / len(tail) if tail else None

    def median(self) -> float | None:
        """The median over the run without the first value, which carries the start-up."""
        finite = [v for v in self.values[1:] or self.values if math.isfinite(v)]
        return statistics.median(finite) if finite else None

    def at_steps(self) -> dict[int, float]:
        """Finite values by step; of a step that comes twice, the later line."""
        return {s: v for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)}


@dataclass(frozen=True, eq=False)
class MetricsTable:
    """metrics.jsonl, by metric."""

    series: dict[str, Series]
    events: list[dict[str, Any]]
    last_step: int | None
    seconds: float | None
    unreadable: int

    def get(self, name: str) -> Series:
        """The series of that name; an empty one where there is none."""
        return self.series.get(name) or Series()


def collect(records: Iterable[dict[str, Any] | None]) -> MetricsTable:
    """Turn lines (None: unreadable) into columns."""
    series: dict[str, Series] = {}
    events: list[dict[str, Any]] = []
    last_step: int | None = None
    seconds: float | None = None
    unreadable = 0
    for record in records:
        if record is None:
            unreadable += 1
            continue
        if isinstance(record.get("time"), (int, float)):
            seconds = as_float(record["time"])
        if "event" in record:
            events.append(record)
            continue
        step = whole(record.get("step"))
        if step is None:
            unreadable += 1
            continue
        last_step = step
        spelled = record.get("nonfinite")
        for name, value in record.items():
            if name in RESERVED:
                continue
            number = _number(value, spelled.get(name) if isinstance(spelled, dict) else None)
            if number is not None:
                column = series.get(name)
                if column is None:
                    column = series[name] = Series()
                column.steps.append(step)
                column.values.append(number)
    return MetricsTable(series, events, last_step, seconds, unreadable)


def _number(value: object, spelled: object) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return as_float(value)
    if value is None and spelled in ("nan", "inf", "-inf"):
        return float(str(spelled))
    return None
