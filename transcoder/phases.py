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


def phase(name: str) -> AbstractContextManager[object]:
    """Marks what runs inside the `with` block as part of phase `name`."""
    if torch.compiler.is_compiling():
        return _IDLE
    if _clock is not None:
        return _clock.phase(name)
    return torch.profiler.record_function(name) if torch.autograd._profiler_enabled() else _IDLE


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
