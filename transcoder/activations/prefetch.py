"""A producer that runs ahead of its consumer in a thread of its own."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.2


class Prefetcher(Generic[T]):
    """Calls `produce` ahead of `next()` and keeps the results in order; depth 0 calls it inline.

    The next call is made while fewer than `depth` results wait, or while what waits weighs less than `enough`:
    so that a consumer that takes many results at once finds them all. At most
    max(`depth` results, `enough` and one result more) wait.

    The thread starts at the first `next()`. An exception of `produce` is raised by the `next()` that would
    have had its result, and by every later one. `close()`, the garbage collector or the interpreter's end
    stop the thread after the call that it is in; waiting never blocks for longer than a poll, so an
    interrupt (Ctrl-C) gets through.

    Args:
        produce: gives the next result.
        depth: results that may wait whatever they weigh.
        enough: weight that may wait, whatever the number of results.
        weigh: the weight of a result; by default every result weighs 1.
    """

    def __init__(
        self, produce: Callable[[], T], depth: int, enough: int = 0, weigh: Callable[[T], int] = lambda _: 1
    ) -> None:
        self._produce, self._depth = produce, depth
        self._line = _Line(depth, enough, weigh)
        self._thread: threading.Thread | None = None
        self._closed = False

    def next(self) -> T:
        """The next result, in the order of production."""
        if self._closed:
            raise RuntimeError("Prefetcher.next: this source was closed; build a new one")
        if self._depth == 0:
            return self._produce()
        if self._thread is None:
            self._thread = threading.Thread(
                target=_run, args=(self._produce, self._line), name="activations", daemon=True
            )
            # Not a bound method: the finalizer must not keep this object alive.
            weakref.finalize(self, _end, self._thread, self._line)
            self._thread.start()
        return self._line.take()

    def waiting(self) -> int:
        """The weight of the results that wait now."""
        return self._line.weight()

    def close(self) -> None:
        """End the thread; what it had produced is dropped. May be called twice."""
        self._closed = True
        if self._thread is not None:
            _end(self._thread, self._line)
            self._thread = None


class _Line(Generic[T]):
    """The results that wait, shared by the thread and the consumer."""

    def __init__(self, depth: int, enough: int, weigh: Callable[[T], int]) -> None:
        self._depth, self._enough, self._weigh = depth, enough, weigh
        self._waiting: deque[tuple[T, int]] = deque()
        self._weight = 0
        self._failure: BaseException | None = None
        self._stopped = False
        self._changed = threading.Condition()

    def wait_for_room(self) -> bool:
        """Wait until another result is wanted; False: none ever will be."""
        with self._changed:
            while not self._stopped and len(self._waiting) >= self._depth and self._weight >= self._enough:
                self._changed.wait(_POLL_SECONDS)
            return not self._stopped

    def put(self, result: T) -> None:
        weight = self._weigh(result)
        with self._changed:
            if not self._stopped:
                self._waiting.append((result, weight))
                self._weight += weight
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def take(self) -> T:
        with self._changed:
            while not self._waiting:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait(_POLL_SECONDS)
            result, weight = self._waiting.popleft()
            self._weight -= weight
            self._changed.notify_all()
            return result

    def weight(self) -> int:
        with self._changed:
            return self._weight

    def stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._waiting.clear()
            self._weight = 0
            self._changed.notify_all()


def _run(produce: Callable[[], T], line: _Line[T]) -> None:
    while line.wait_for_room():
        try:
            # Handed over without a name: a result that waits must not be held twice.
            line.put(produce())
        except BaseException as error:
            line.fail(error)
            return


def _end(thread: threading.Thread, line: _Line[T]) -> None:
    line.stop()
    if thread is not threading.current_thread():
        # A read from a dead network may hang in there; the thread is a daemon and produces nothing any more.
        thread.join(timeout=60)
