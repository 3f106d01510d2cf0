"""A thread between the run and a sink that may be slow, hang or fail."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

logger = logging.getLogger(__name__)
Item = TypeVar("Item")
_END = object()


class BackgroundFeed(Generic[Item]):
    """Hands items to `consume` in a daemon thread through a bounded queue.

    `offer` never blocks: what does not fit is counted and dropped. The first exception of `consume` ends the
    feed with one warning; later offers are ignored. `finish` runs in the thread after the last item.
    """

    def __init__(
        self,
        name: str,
        consume: Callable[[Item], None],
        finish: Callable[[], None] = lambda: None,
        capacity: int = 4096,
    ) -> None:
        self.name = name
        self.dropped = 0
        self.failed = False
        self._consume = consume
        self._finish = finish
        self._queue: queue.Queue[object] = queue.Queue(capacity)
        self._thread = threading.Thread(target=self._run, name=f"transcoder-{name}", daemon=True)
        self._thread.start()

    def offer(self, item: Item) -> None:
        if self.failed:
            return
        try:
            self._queue.put_nowait(item)
        except queue.Full:
            self.dropped += 1
            if self.dropped == 1:
                logger.warning(
                    "%s cannot keep up; further lines are dropped there (metrics.jsonl has them all)",
                    self.name,
                )

    def close(self, timeout: float) -> bool:
        """Wait at most `timeout` seconds for the queue to empty. True when everything was handed over."""
        deadline = time.monotonic() + timeout
        while self._thread.is_alive():
            try:
                self._queue.put(_END, timeout=0.05)
                break
            except queue.Full:
                if time.monotonic() >= deadline:
                    return False
        self._thread.join(max(0.0, deadline - time.monotonic()))
        return not self._thread.is_alive() and not self.failed

    def fail(self, reason: str) -> None:
        """Warn once and ignore everything from now on."""
        if not self.failed:
            self.failed = True
            logger.warning("%s: %s; the run goes on and metrics.jsonl keeps everything", self.name, reason)

    def _run(self) -> None:
        try:
            while (item := self._queue.get()) is not _END:
                self._consume(item)  # type: ignore[arg-type]
            self._finish()
        except Exception as error:  # a sink may fail in any way; the run must not
            self.fail(f"{type(error).__name__}: {error}")
