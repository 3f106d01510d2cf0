"""One piece of work at a time, in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class BackgroundTask(Generic[T]):
    """Runs a function in a daemon thread; `collect` gives its result or raises its error.

    A thread that never ends (a dead network disk) is waited for as long as asked and no longer; the process can end without
    it.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        # Not the thread's own end: a `join` that Ctrl-C interrupts takes a living thread for a dead one (CPython 3.11).
        self._ended: threading.Event | None = None
        self._result: list[T] = []
        self._error: list[BaseException] = []

    @property
    def busy(self) -> bool:
        """Something was started and not collected yet."""
        return self._ended is not None

    def start(self, work: Callable[[], T]) -> None:
        """RuntimeError while something is in flight: collect it first."""
        if self.busy:
            raise RuntimeError(f"{self._name}: expected the last one to be collected first")
        self._result, self._error, ended = [], [], threading.Event()
        threading.Thread(
            target=self._run, args=(work, self._result, self._error, ended), name=self._name, daemon=True
        ).start()
        self._ended = ended

    def collect(self, seconds: float) -> T | None:
        """The result once it is there, waiting at most so long (0: not at all); None where there is none yet, or nothing
        was started.

        Raises:
            What the work raised.
        """
        if self._ended is None or not self._ended.wait(seconds):
            return None
        self._ended = None
        if self._error:
            raise self._error[0]
        return self._result[0]

    @staticmethod
    def _run(work: Callable[[], T], result: list[T], error: list[BaseException], ended: threading.Event) -> None:
        try:
            result.append(work())
        except BaseException as caught:
            error.append(caught)
        finally:
            ended.set()
