"""metrics.jsonl by metric, compact enough for a run of a million steps; of a run that goes on, only what was added is read."""

from __future__ import annotations

import difflib
import math
import os
import time
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.follow_metrics import FILE_NAME as FILE_NAME
from transcoder.reporting.follow_metrics import values_of
from transcoder.reporting.format import MISSING, as_float, number, whole
from transcoder.reporting.jsonl import parse_record
from transcoder.reporting.parts import RunPartMissingError
from transcoder.reporting.tables import ShownAsTable

if TYPE_CHECKING:
    import pandas as pd

TAIL = 10
"""Logged values that a noisy training metric is averaged over."""
CHUNK = 1 << 23
RECENT = 50
"""Lines that the pace is taken over: some minutes of a usual run, a few evaluations."""


@dataclass(frozen=True, eq=False)
class Series:
    """One metric over the run: steps and values of equal length; what was NaN or infinite is kept as such.

    Unpacks into NumPy arrays: `steps, values = run.metrics["metrics/fvu"]`.
    """

    steps: array[int] = field(default_factory=lambda: array("q"))
    values: array[float] = field(default_factory=lambda: array("d"))

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[NDArray[Any]]:
        yield np.array(self.steps, dtype=np.int64)
        yield np.array(self.values, dtype=np.float64)

    def last(self) -> float | None:
        """The last finite value."""
        return next((v for v in reversed(self.values) if math.isfinite(v)), None)

    def tail_mean(self, count: int = TAIL) -> float | None:
        """The mean of the last `count` values that are finite: a single batch's value is noise."""
        tail = [v for v in self.values[-count:] if math.isfinite(v)]
        return math.fsum(tail) / len(tail) if tail else None

    def rate(self) -> float | None:
        """The harmonic mean: of rates over equal amounts, the whole amount over the whole time. Without the first value, which
        carries the start-up."""
        finite = [v for v in self.values[1:] or self.values if math.isfinite(v) and v > 0]
        return len(finite) / math.fsum(1 / v for v in finite) if finite else None

    def at_steps(self) -> dict[int, float]:
        """Finite values by step; of a step that comes twice, the later line."""
        return {s: v for s, v in zip(self.steps, self.values, strict=True) if math.isfinite(v)}


class Metrics(ShownAsTable, Mapping[str, Series]):
    """Metric name -> Series, from metrics.jsonl. `poll` reads what was added; a file that a resumed run has cut or replaced is
    read again from its start.

    Attributes:
        series: by name, in the order in which they were first logged.
        events: what happened (data, checkpoints, evaluations, resumes), in order.
        last_step, seconds: of the last line that has them.
        unreadable: lines that are no record.
    """

    HEAD = ("metric", "last", "least", "most", "values")

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._forget()

    def _forget(self) -> None:
        self.series: dict[str, Series] = {}
        self.events: list[dict[str, Any]] = []
        self.last_step: int | None = None
        self.seconds: float | None = None
        self.unreadable = 0
        self._pace: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._offset, self._file = 0, (0, 0)

    def poll(self, torn_end: bool = False) -> bool:
        """Read what is new; whether anything was. A file that is not there (yet) has nothing.

        Args:
            torn_end: read a last line without a line end too; otherwise it is left for the next time.

        Raises:
            OSError: the file is there and cannot be read.
        """
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
                    self._forget()
                    self._file = (found.st_dev, found.st_ino)
                file.seek(self._offset)
                before, rest = self._offset, b""
                while chunk := file.read(CHUNK):
                    lines, newline, rest = (rest + chunk).rpartition(b"\n")
                    self._offset += len(lines) + len(newline)
                    self._add(lines.splitlines())
                if torn_end:
                    self._offset += len(rest)
                    self._add([rest])
        except FileNotFoundError:
            self._forget()
            return False
        return self._offset > before

    def get(self, name: str, default: object = None) -> Series:
        """The series of that name; an empty one where there is none."""
        return self.series.get(name) or Series()

    def frame(self) -> pd.DataFrame:
        """A column a metric and a row a logged step; NaN where a metric was not logged."""
        import pandas as pd

        columns = {name: pd.Series(series.at_steps()) for name, series in sorted(self.series.items())}
        return pd.DataFrame(columns).rename_axis("step")

    @property
    def why_empty(self) -> str:
        """Why there are no metrics, where there are none."""
        if not self.path.exists():
            return "not in the folder: there are no curves"
        return "holds no metrics: the run ended before its first logging step"

    @property
    def age_seconds(self) -> float | None:
        """Seconds since a line was last written, by the clocks of the file system and of this machine."""
        try:
            return max(0.0, time.time() - self.path.stat().st_mtime)
        except OSError:
            return None

    @property
    def seconds_per_step(self) -> float | None:
        """The pace of the last lines, evaluations and checkpoints included; None before there are two."""
        if len(self._pace) < 2:
            return None
        (first, begun), (last, now) = self._pace[0], self._pace[-1]
        return (now - begun) / (last - first) if last > first and now > begun else None

    @property
    def seconds_per_line(self) -> float | None:
        """Seconds between the last lines; None before there are two."""
        if len(self._pace) < 2:
            return None
        return (self._pace[-1][1] - self._pace[0][1]) / (len(self._pace) - 1)

    def __getitem__(self, name: str) -> Series:
        if not self.series:
            raise RunPartMissingError(f"run {str(self.path.parent)!r} has no metrics: {self.why_empty}")
        if name not in self.series:
            near = difflib.get_close_matches(name, self.series, n=3)
            hint = f"; near are {', '.join(near)}" if near else ""
            raise KeyError(f"{FILE_NAME} has no metric {name!r}{hint}")
        return self.series[name]

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self.series))

    def __len__(self) -> int:
        return len(self.series)

    def _headline(self) -> str:
        return "" if self.series else f"{FILE_NAME}: {self.why_empty}"

    def _cells(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name in self:
            series = self.series[name]
            finite = [v for v in series.values if math.isfinite(v)]
            shown = (finite[-1], min(finite), max(finite)) if finite else (None, None, None)
            rows.append((name, *(MISSING if v is None else number(v) for v in shown), str(len(series))))
        return rows

    def _left_out(self) -> str:
        return ""

    def _add(self, lines: Iterable[bytes]) -> None:
        for record in (parse_record(line) for line in lines if line.strip()):
            if record is None:
                self.unreadable += 1
                continue
            seconds, step = record.get("time"), whole(record.get("step"))
            timed = isinstance(seconds, (int, float))
            if timed:
                self.seconds = as_float(seconds)  # type: ignore[arg-type]
            if "event" in record:
                self.events.append(record)
                continue
            if step is None:
                self.unreadable += 1
                continue
            self.last_step = step
            if timed:
                self._pace.append((step, as_float(seconds)))  # type: ignore[arg-type]
            for name, value in values_of(record):
                column = self.series.setdefault(name, Series())
                column.steps.append(step)
                column.values.append(as_float(value))
