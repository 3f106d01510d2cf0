"""`transcoder watch RUN --terminal`: a run in progress, in place on a terminal, as lines elsewhere."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from transcoder.reporting.format import clock
from transcoder.reporting.metrics_tail import MetricsTail
from transcoder.reporting.progress import PLAIN_SECONDS, figures
from transcoder.reporting.terminal_view import Snapshot, frame, look

INTERVAL = 1.0
EXIT_OK, EXIT_DEAD, EXIT_STOPPED = 0, 1, 75
"""As `transcoder train` itself exits."""
_ALTERNATE, _ORDINARY = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_COLORS = {"running": "32", "finished": "32", "slow": "33", "stopped": "33", "unclear": "33", "dead": "31"}


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
    tail = MetricsTail(Path(run_dir) / "metrics.jsonl")
    show = _draw if out.isatty() and os.environ.get("TERM", "dumb") != "dumb" else _lines
    try:
        last = show(Path(run_dir), tail, out, interval, line_seconds)
    except KeyboardInterrupt:
        return EXIT_OK
    return {"dead": EXIT_DEAD, "stopped": EXIT_STOPPED}.get(last.state, EXIT_OK)


def _draw(run_dir: Path, tail: MetricsTail, out: TextIO, interval: float, _: float) -> Snapshot:
    plain = not _holds_blocks(out)
    snapshot = look(run_dir, tail)
    interrupted = False
    if not snapshot.ended:
        with _alternate_screen(out):
            try:
                while not snapshot.ended:
                    _paint(frame(snapshot, _columns(), plain), snapshot, out)
                    time.sleep(interval)
                    snapshot = look(run_dir, tail)
            except KeyboardInterrupt:
                interrupted = True
    # On the ordinary screen the last picture stays.
    lines = frame(snapshot, _columns(), plain)
    print(_colored(lines[0], snapshot), *lines[1:], sep="\n", file=out, flush=True)
    if interrupted:
        raise KeyboardInterrupt
    return snapshot


def _paint(lines: list[str], snapshot: Snapshot, out: TextIO) -> None:
    # As many as fit: a line too many would scroll the picture.
    rows = max(1, shutil.get_terminal_size().lines - 1)
    hint = ["", "Ctrl-C leaves; the run goes on"]
    shown = [_colored(lines[0], snapshot), *lines[1:], *hint][:rows]
    # Home, then each line erased behind its end: no flicker, and nothing of a wider picture is left.
    out.write("\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in shown) + "\x1b[J")
    out.flush()


def _colored(line: str, snapshot: Snapshot) -> str:
    if os.environ.get("NO_COLOR"):
        return line
    return f"\x1b[1;{_COLORS[snapshot.state]}m{line}\x1b[0m"


def _columns() -> int:
    # The last column is left free: some terminals wrap when it is written.
    return shutil.get_terminal_size().columns - 1


def _lines(run_dir: Path, tail: MetricsTail, out: TextIO, interval: float, line_seconds: float) -> Snapshot:
    said: tuple[int | None, str] | None = None
    said_at = -line_seconds
    while True:
        snapshot = look(run_dir, tail)
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
    known = {name: value for name in snapshot.tail.table.series if (value := snapshot.figure(name)) is not None}
    of = "" if snapshot.steps is None else f"/{snapshot.steps}"
    parts = ["no step yet" if snapshot.step is None else f"step {snapshot.step}{of}", figures(known)]
    if snapshot.elapsed is not None:
        parts.append(f"elapsed {clock(snapshot.elapsed)}")
    if snapshot.left is not None and not snapshot.ended:
        parts.append(f"left {clock(snapshot.left)}")
    # A run that goes well needs no word.
    if snapshot.state != "running":
        parts.append(snapshot.words)
    return "  ".join(filter(None, parts))


def _holds_blocks(out: TextIO) -> bool:
    try:
        "▁█░–".encode(getattr(out, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True


@contextlib.contextmanager
def _alternate_screen(out: TextIO) -> Iterator[None]:
    """The terminal is as it was when the block ends, however it ends: a kill and a closed ssh connection included."""
    with _signals_raise(signal.SIGTERM, signal.SIGHUP):
        out.write(_ALTERNATE)
        out.flush()
        try:
            yield
        finally:
            # A terminal that went away cannot be put back.
            with contextlib.suppress(OSError):
                out.write(_ORDINARY)
                out.flush()


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
