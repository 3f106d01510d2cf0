"""A producer that runs ahead of its consumer in a thread of its own."""

from __future__ import annotations

import queue
import threading
import weakref
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")
_POLL_SECONDS = 0.2


class _Failure:
    def __init__(self, error: BaseException) -> None:
        self.error = error


class Prefetcher(Generic[T]):
    """Calls `produce` ahead of `next()`, at most `depth` results waiting; depth 0 calls it inline.

    The thread starts at the first `next()`. An exception of `produce` is raised by the `next()` that would
    have had its result, and by every later one. `close()`, the garbage collector or the interpreter's end
    stop the thread after the call that it is in; waiting never blocks for longer than a poll, so an
    interrupt (Ctrl-C) gets through.
    """

    def __init__(self, produce: Callable[[], T], depth: int) -> None:
        self._produce, self._depth = produce, depth
        self._queue: queue.Queue[T | _Failure] = queue.Queue(max(depth, 1))
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._failure: _Failure | None = None
        self._closed = False

    def next(self) -> T:
        """The next result, in the order of production."""
        if self._closed:
            raise RuntimeError("Prefetcher.next: this source was closed; build a new one")
        if self._depth == 0:
            return self._produce()
        if self._failure is not None:
            raise self._failure.error
        if self._thread is None:
            self._thread = threading.Thread(
                target=_run, args=(self._produce, self._queue, self._stop), name="activations", daemon=True
            )
            # Not a bound method: the finalizer must not keep this object alive.
            weakref.finalize(self, _end, self._thread, self._queue, self._stop)
            self._thread.start()
        while True:
            try:
                item = self._queue.get(timeout=_POLL_SECONDS)
            except queue.Empty:
                continue
            if isinstance(item, _Failure):
                self._failure = item
                raise item.error
            return item

    def close(self) -> None:
        """End the thread; what it had produced is dropped. May be called twice."""
        self._closed = True
        if self._thread is not None:
            _end(self._thread, self._queue, self._stop)
            self._thread = None


def _run(produce: Callable[[], T], results: queue.Queue[T | _Failure], stop: threading.Event) -> None:
    while not stop.is_set():
        item: T | _Failure
        try:
            item = produce()
        except BaseException as error:
            item = _Failure(error)
        while not stop.is_set():
            try:
                results.put(item, timeout=_POLL_SECONDS)
                break
            except queue.Full:
                continue
        if isinstance(item, _Failure):
            return
        # The queue's slot is the only owner now: a result that waits must not be held twice.
        del item


def _end(thread: threading.Thread, results: queue.Queue[T | _Failure], stop: threading.Event) -> None:
    stop.set()
    while True:
        try:
            results.get_nowait()
        except queue.Empty:
            break
    if thread is not threading.current_thread():
        # A read from a dead network may hang in there; the thread is a daemon and produces nothing any more.
        thread.join(timeout=60)
