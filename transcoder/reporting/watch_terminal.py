"""`transcoder watch RUN --terminal`: a run in progress, in place on a terminal, as lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from transcoder.files import local_path
from transcoder.reporting.format import clock
from transcoder.reporting.metrics_table import FILE_NAME, Metrics
from transcoder.reporting.progress import PLAIN_SECONDS, metrics_text
from transcoder.reporting.terminal_view import Snapshot, look, picture

INTERVAL = 1.0
EXIT_OK, EXIT_DEAD, EXIT_STOPPED = 0, 1, 75
"""As `transcoder train` itself exits."""


def watch_terminal(
    run_dir: str | Path,
    *,
    stream: TextIO | None = None,
    interval: float = INTERVAL,
    line_seconds: float = PLAIN_SECONDS,
) -> int:
    """Show a run until it ends or Ctrl-C is pressed. Nothing in the folder is written or locked.

    On a terminal one picture is drawn over and over, on its alternate screen; the last one stays on the ordinary screen. A
    stream that is no terminal (or TERM=dumb) gets a line every `line_seconds` while there is something new.

    Args:
        run_dir: the run's folder.
        stream: where to; None is stdout.
        interval: seconds between two looks.
        line_seconds: least seconds between two lines where it is no terminal.

    Returns:
        0: the run finished, or Ctrl-C; 75: it was stopped with its state saved; 1: its process is gone without a word.

    Raises:
        FileNotFoundError: no such folder.
    """
    out = sys.stdout if stream is None else stream
    metrics = Metrics(local_path(run_dir) / FILE_NAME)
    show = _draw if out.isatty() and os.environ.get("TERM", "dumb") != "dumb" else _lines
    try:
        last = show(local_path(run_dir), metrics, out, interval, line_seconds)
    except KeyboardInterrupt:
        return EXIT_OK
    return {"dead": EXIT_DEAD, "stopped": EXIT_STOPPED}.get(last.state, EXIT_OK)


def _draw(run_dir: Path, metrics: Metrics, out: TextIO, interval: float, _: float) -> Snapshot:
    console = Console(file=out, highlight=False)

    def drawn(*below: str) -> Group:
        return Group(picture(snapshot, console.options.ascii_only), *map(Text, below))

    snapshot = look(run_dir, metrics)
    live = Live(console=console, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False)
    try:
        if not snapshot.ended:
            with _signals_raise(signal.SIGTERM, signal.SIGHUP), _stopping(live):
                while not snapshot.ended:
                    live.update(drawn("", "Ctrl-C leaves; the run goes on"), refresh=True)
                    time.sleep(interval)
                    snapshot = look(run_dir, metrics)
    finally:
        # On the ordinary screen the last picture stays, after Ctrl-C too.
        if sys.exc_info()[0] in (None, KeyboardInterrupt):
            console.print(drawn())
    return snapshot


@contextlib.contextmanager
def _stopping(live: Live) -> Iterator[None]:
    """The terminal is as it was when the block ends, however it ends: a kill and a closed ssh connection included."""
    live.start()
    try:
        yield
    finally:
        # A terminal that went away cannot be put back.
        with contextlib.suppress(OSError):
            live.stop()


def _lines(run_dir: Path, metrics: Metrics, out: TextIO, interval: float, line_seconds: float) -> Snapshot:
    said: tuple[int | None, str] | None = None
    said_at = -line_seconds
    while True:
        snapshot = look(run_dir, metrics)
        now = time.monotonic()
        news = (snapshot.step, snapshot.state)
        due = now - said_at >= line_seconds or said is None or snapshot.state != said[1]
        if snapshot.ended or (news != said and due):
            print(_line(snapshot), file=out, flush=True)
            said, said_at = news, now
        if snapshot.ended:
            return snapshot
        time.sleep(interval)


def _line(snapshot: Snapshot) -> str:
    known = {name: value for name in snapshot.run.metrics if (value := snapshot.metric(name)) is not None}
    of = "" if snapshot.steps is None else f"/{snapshot.steps}"
    parts = ["no step yet" if snapshot.step is None else f"step {snapshot.step}{of}", metrics_text(known)]
    if snapshot.run.metrics.seconds is not None:
        parts.append(f"elapsed {clock(snapshot.run.metrics.seconds)}")
    if snapshot.left is not None and not snapshot.ended:
        parts.append(f"left {clock(snapshot.left)}")
    # That a run goes on needs no words.
    if snapshot.state != "running":
        parts.append(snapshot.words)
    return "  ".join(filter(None, parts))


@contextlib.contextmanager
def _signals_raise(*numbers: signal.Signals) -> Iterator[None]:
    def leave(number: int, _: FrameType | None) -> NoReturn:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
