"""Named phases of a training step: ranges in a profiler's trace, and seconds for a clock where one runs.

Without a profiler and a clock `phase` costs a fraction of a microsecond.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_IDLE = nullcontext()
_clock: PhaseClock | None = None
_shares: TimeShares | None = None


def phase(name: str) -> AbstractContextManager[object]:
    """Marks what runs inside the `with` block as part of phase `name`."""
    if torch.compiler.is_compiling():
        return _IDLE
    if _clock is not None:
        return _clock.phase(name)
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return _IDLE if _shares is None else _shares.phase(name)


GROUPS = ("language_model", "transcoder", "antidup", "files")
_FILES = ("checkpoint", "logging", "anti-duplication: sample files", "anti-duplication: ledger")


def group_of(name: str) -> str:
    """Which of `GROUPS` a phase belongs to. Waiting for a batch is waiting for the language model."""
    if name == "batch":
        return "language_model"
    if name in _FILES:
        return "files"
    return "antidup" if name.startswith("anti-duplication") else "transcoder"


class TimeShares:
    """Seconds of the host's thread in each of `GROUPS`, each without those of phases inside it; a microsecond a phase.

    On a GPU the host is ahead of the device: a share is then the time for which the host was held up.
    """

    def __init__(self) -> None:
        self._thread = threading.get_ident()
        self.seconds = dict.fromkeys(GROUPS, 0.0)
        self._open: list[str] = []
        self._since = time.perf_counter()
        self._ran = False

    @contextmanager
    def running(self) -> Iterator[TimeShares]:
        """Inside the `with` block `phase` reports to this."""
        global _shares
        before, _shares = _shares, self
        self._thread, self._since, self._ran = threading.get_ident(), time.perf_counter(), True
        try:
            yield self
        finally:
            _shares = before

    def phase(self, name: str) -> AbstractContextManager[object]:
        return _InGroup(self, group_of(name)) if threading.get_ident() == self._thread else _IDLE

    def taken(self) -> dict[str, float]:
        """Share of the time since the last call, {"time/<group>_share"}; empty where it never ran, as in a layer of a set,
        whose time the set counts."""
        if not self._ran:
            return {}
        self.count()
        total = sum(self.seconds.values())
        found = {f"time/{name}_share": spent / total for name, spent in self.seconds.items()} if total > 0 else {}
        self.seconds = dict.fromkeys(GROUPS, 0.0)
        return found

    def count(self) -> None:
        """Add the time since the last change to the group that is open; outside all phases it is the transcoder's."""
        now = time.perf_counter()
        self.seconds[self._open[-1] if self._open else "transcoder"] += now - self._since
        self._since = now


class _InGroup:
    def __init__(self, shares: TimeShares, group: str) -> None:
        self._shares, self._group = shares, group

    def __enter__(self) -> None:
        self._shares.count()
        self._shares._open.append(self._group)

    def __exit__(self, *_: object) -> None:
        self._shares.count()
        self._shares._open.pop()


class PhaseClock:
    """Seconds and calls by phase, each without those of nested phases. Only the thread that made the clock is counted: other
    threads do not delay the steps.

    Args:
        device: waited for at the ends of every phase, while `synchronise` is set.
    """

    def __init__(self, device: torch.device) -> None:
        self._device, self._thread = device, threading.get_ident()
        self._inside: list[float] = []
        """For each open phase, outermost first: seconds of the phases that have ended inside it."""
        self.seconds: dict[str, float] = {}
        self.calls: dict[str, int] = {}
        self.synchronise = True

    @contextmanager
    def running(self) -> Iterator[PhaseClock]:
        """Inside the `with` block `phase` reports to this clock."""
        global _clock
        before, _clock = _clock, self
        try:
            yield self
        finally:
            _clock = before

    def clear(self) -> None:
        self.seconds, self.calls = {}, {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        if threading.get_ident() != self._thread:
            yield
            return
        start = self.now()
        self._inside.append(0.0)
        try:
            with torch.profiler.record_function(name):
                yield
        finally:
            taken, inside = self.now() - start, self._inside.pop()
            if self._inside:
                self._inside[-1] += taken
            self.seconds[name] = self.seconds.get(name, 0.0) + taken - inside
            self.calls[name] = self.calls.get(name, 0) + 1

    def now(self) -> float:
        """Seconds, after waiting for the device if `synchronise` is set."""
        if self.synchronise and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()
