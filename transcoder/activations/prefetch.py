"""A producer that runs ahead of its consumer in a thread of its own."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Prefetcher(Generic[T]):
    """Calls `produce` ahead of `next()` and keeps the results in order; depth 0 calls it inline.

    The next call is made while fewer than `depth` results wait, or while what waits weighs less than `enough`:
    so that a consumer that takes many results at once finds them all. At most
    max(`depth` results, `enough` and one result more) wait.

    The thread starts at the first `next()`. An exception of `produce` is raised by the `next()` that would
    have had its result, and by every later one. `close()`, the garbage collector or the interpreter's end
    stop the thread after the call that it is in. An interrupt (Ctrl-C) ends a `next()` that waits.

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
        self._worker = _Worker(produce, depth, enough, weigh)
        self._finalizer: weakref.finalize | None = None
        self._closed = False

    def next(self) -> T:
        """The next result, in the order of production."""
        if self._closed:
            raise RuntimeError("Prefetcher.next: this source was closed; build a new one")
        if self._depth == 0:
            return self._produce()
        if self._finalizer is None:
            self._finalizer = weakref.finalize(self, self._worker.end)
            self._worker.start()
        return self._worker.take()

    def waiting(self) -> int:
        """The weight of the results that wait now."""
        return self._worker.weight

    def close(self) -> None:
        """End the thread; what it had produced is dropped. May be called twice."""
        self._closed = True
        if self._finalizer is not None:
            self._finalizer()


class _Worker(threading.Thread, Generic[T]):
    """The thread and the results that wait. It holds no reference to its `Prefetcher`, which may so be collected."""

    def __init__(self, produce: Callable[[], T], depth: int, enough: int, weigh: Callable[[T], int]) -> None:
        super().__init__(name="activations", daemon=True)
        self._produce, self._depth, self._enough, self._weigh = produce, depth, enough, weigh
        self._results: deque[tuple[T, int]] = deque()
        self.weight = 0
        self._failure: BaseException | None = None
        self._ended = False
        self._changed = threading.Condition()

    def run(self) -> None:
        try:
            while self._wait_for_room():
                # Handed over without a name: a result that waits must not be held twice.
                self._put(self._produce())
        except BaseException as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_for_room(self) -> bool:
        """Wait until another result is wanted; False: the worker was ended."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended or len(self._results) < self._depth or self.weight < self._enough
            )
            return not self._ended

    def _put(self, result: T) -> None:
        weight = self._weigh(result)
        with self._changed:
            if not self._ended:
                self._results.append((result, weight))
                self.weight += weight
            self._changed.notify_all()

    def take(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._results or self._failure)
            if not self._results:
                assert self._failure is not None
                raise self._failure
            result, weight = self._results.popleft()
            self.weight -= weight
            self._changed.notify_all()
            return result

    def end(self) -> None:
        with self._changed:
            self._ended = True
            self._results.clear()
            self.weight = 0
            self._changed.notify_all()
        if self is not threading.current_thread():
            # A read from a dead network may hang in there; the thread is a daemon and produces nothing any more.
            self.join(timeout=60)
