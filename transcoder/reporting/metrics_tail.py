"""metrics.jsonl of a run that is still writing it: only what was added is read."""

from __future__ import annotations

import os
import time
from collections import deque
from pathlib import Path
from typing import Any

from transcoder.reporting.jsonl import parse_record
from transcoder.reporting.series import MetricsTable, Series, collect

CHUNK = 1 << 23
RECENT = 50
"""Lines that the pace is taken over: some minutes of a usual run, a few evaluations."""


class MetricsTail:
    """Follows `path`. A file that a resumed run has cut or replaced is read again from its start."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._forget()

    def _forget(self) -> None:
        self.table = MetricsTable({}, [], None, None, 0)
        """All that was read."""
        self._pace: deque[tuple[int, float]] = deque(maxlen=RECENT)
        self._offset, self._file = 0, (0, 0)

    def poll(self) -> bool:
        """Read what is new; whether anything was. A file that is not there (yet) has nothing."""
        try:
            with open(self.path, "rb") as file:
                found = os.fstat(file.fileno())
                if (found.st_dev, found.st_ino) != self._file or found.st_size < self._offset:
                    self._forget()
                    self._file = (found.st_dev, found.st_ino)
                file.seek(self._offset)
                before = self._offset
                rest = b""
                while chunk := file.read(CHUNK):
                    # A line that is still being written is left for the next time.
                    whole, newline, rest = (rest + chunk).rpartition(b"\n")
                    self._offset += len(whole) + len(newline)
                    self._add([parse_record(line) for line in whole.splitlines() if line.strip()])
        except FileNotFoundError:
            self._forget()
            return False
        return self._offset > before

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
        """Seconds between lines of late."""
        if len(self._pace) < 2:
            return None
        return (self._pace[-1][1] - self._pace[0][1]) / (len(self._pace) - 1)

    def _add(self, records: list[dict[str, Any] | None]) -> None:
        new = collect(records)
        old = self.table
        for name, series in new.series.items():
            kept = old.series.setdefault(name, Series())
            kept.steps.extend(series.steps)
            kept.values.extend(series.values)
        self.table = MetricsTable(
            old.series,
            old.events + new.events,
            new.last_step if new.last_step is not None else old.last_step,
            new.seconds if new.seconds is not None else old.seconds,
            old.unreadable + new.unreadable,
        )
        for record in records:
            if record is not None and "event" not in record:
                step, seconds = record.get("step"), record.get("time")
                if isinstance(step, int) and isinstance(seconds, (int, float)):
                    self._pace.append((step, float(seconds)))
