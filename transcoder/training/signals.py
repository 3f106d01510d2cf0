"""Signals that end a run early: they are noted, and obeyed between two steps."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

CAUGHT = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class StopRequest:
    """Inside the `with` block SIGTERM, SIGINT and SIGUSR1 set `.signal` to their name instead of ending the process, so
    that the run saves its state first. The same signal again ends it at once, as it would have without us.
    """

    def __init__(self) -> None:
        self.signal: str | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        # Python delivers signals to the main thread only, and refuses handlers from others.
        if threading.current_thread() is threading.main_thread():
            for number in CAUGHT:
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number).name
        signal.signal(number, self._previous[number])
