"""Strict JSON lines: written whole or not at all, bounded, cut back to a step on resume, read past damage."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transcoder.files import replacing

logger = logging.getLogger(__name__)

BACKLOG_LINES = 10_000
"""Lines kept in memory while the disk refuses them; a line is about 1 KB."""


class JsonlFile:
    """An append-only file of JSON objects that outlives a full disk and a folder that is deleted under it.

    A line is one write(2), so a killed process loses none; `flush` brings the lines to the disk, and a machine that loses its
    power may lose those since. A line that cannot be written is kept and tried again with the next one; the file is cut back
    to its last whole line, so that a torn one never stays, and the run goes on. A file that was deleted is made again, with
    what was in it.

    Args:
        max_bytes: where the file grows beyond, every second line of its older half that is no event goes (where that is
            not enough, every second one of any kind), with a warning; None: it grows without bound.
    """

    def __init__(self, path: Path, max_bytes: int | None = None) -> None:
        self.path, self._max_bytes = Path(path), max_bytes
        # Readable: what was in it can be saved when its name is gone.
        self._file = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed in close()
        self._size = os.fstat(self._file.fileno()).st_size
        self._backlog: deque[bytes] = deque(maxlen=BACKLOG_LINES)
        self._lost = 0
        self._thin_beyond = 0
        self._warned = False

    def append(self, record: dict[str, Any]) -> None:
        """Write one object as a line. NaN and Inf are refused (ValueError): they are not JSON."""
        line = json.dumps(record, allow_nan=False, separators=(", ", ": ")).encode() + b"\n"
        if len(self._backlog) == self._backlog.maxlen:
            self._lost += 1
        self._backlog.append(line)
        self._drain()
        if self._max_bytes is not None and self._size > max(self._max_bytes, self._thin_beyond):
            # A copy that finds no room is not made again for every line: it reads the whole file.
            self._thin_beyond = 0 if self._rewrite(_thinned) else self._size + self._size // 8

    def flush(self) -> None:
        """Bring what was written to the disk (fsync)."""
        self._drain()
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            self._warn(error)

    def close(self) -> None:
        if self._file.closed:
            return
        self.flush()
        self._file.close()
        missing = len(self._backlog) + self._lost
        if missing:
            logger.warning("%s: %d lines could not be written before the run ended", self.path, missing)

    def _drain(self) -> None:
        if os.fstat(self._file.fileno()).st_nlink == 0:
            logger.warning("%s: was deleted; it is made again with what was in it", self.path)
            self._rewrite(lambda lines: lines)
        while self._backlog:
            line = self._backlog[0]
            try:
                written = self._file.write(line)
                if written != len(line):
                    raise OSError(f"{written} of {len(line)} bytes fitted")
            except OSError as error:
                self._cut_back()
                self._warn(error)
                return
            self._backlog.popleft()
            self._size += len(line)
        self._warned = False

    def _rewrite(self, change: Callable[[list[bytes]], list[bytes]]) -> bool:
        """Put the file's lines, changed, in its place; a failure leaves it as it is and is told."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file.seek(0)
            lines = change(self._file.readall().splitlines(keepends=True))
            with replacing(self.path) as new:
                new.writelines(lines)
            again = open(self.path, "a+b", buffering=0)  # noqa: SIM115 - closed in close()
        except OSError as error:
            self._warn(error)
            return False
        if (before := self._size) > (after := sum(map(len, lines))):
            logger.warning("%s: thinned from %d to %d bytes (logging.max_megabytes)", self.path, before, after)
        self._file.close()
        self._file, self._size = again, after
        return True

    def _cut_back(self) -> None:
        try:
            os.ftruncate(self._file.fileno(), self._size)
        except OSError as error:
            self._warn(error)

    def _warn(self, error: OSError) -> None:
        if not self._warned:
            self._warned = True
            logger.warning("%s: cannot write (%s); lines are kept in memory and tried again", self.path, error)


def _thinned(lines: list[bytes]) -> list[bytes]:
    """Without every second line of metrics in the older half; where that frees less than an eighth, of any lines."""
    older = len(lines) // 2
    for spared in (b'"event": ', None):
        drop, kept = True, []
        for number, line in enumerate(lines):
            removable = spared is None or spared not in line
            drop = removable and not drop
            if number >= older or not (removable and drop):
                kept.append(line)
        if 8 * sum(map(len, kept)) <= 7 * sum(map(len, lines)):
            break
    return kept


def drop_after(path: Path, step: int) -> tuple[int, dict[str, Any] | None]:
    """Cut a file back to the lines whose "step" is at most `step`, atomically.

    Unreadable lines (the torn end of a killed run) go too. Returns the number of lines dropped and the last
    line kept.
    """
    if not path.exists():
        return 0, None
    dropped = 0
    last: dict[str, Any] | None = None
    with open(path, "rb") as old, replacing(path) as new:
        for line in old:
            if not line.strip():
                continue
            record = parse_record(line)
            at = None if record is None else record.get("step")
            if record is None or not isinstance(at, (int, float)) or at > step:
                dropped += 1
                continue
            new.write(line if line.endswith(b"\n") else line + b"\n")
            last = record
    return dropped, last


def parse_record(line: bytes) -> dict[str, Any] | None:
    """The object of one line; None where it is not one (a torn end)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # thousands of brackets are no record either
        return None
    return record if isinstance(record, dict) else None
