"""`transcoder watch RUN --terminal`: a run in progress, in place on a terminal, as lines elsewhere."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn, TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from transcoder.checkpoint_folder import candidates
from transcoder.files import local_path
from transcoder.reporting.format import MISSING, clock, number, percent, thousands
from transcoder.reporting.metrics_table import FILE_NAME, Metrics, Series
from transcoder.reporting.progress import PLAIN_SECONDS, metrics_text
from transcoder.reporting.tables import visible
from transcoder.reporting.watch_state import Snapshot, look

INTERVAL = 1.0
EXIT_OK, EXIT_DEAD, EXIT_STOPPED = 0, 1, 75
"""As `transcoder train` itself exits."""
BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
OF_THE_START = ("data", "checkpoint_budget")
"""Events that every run begins with, which say nothing of its progress."""
CURVES = (
    ("loss", "losses/overall_loss"),
    ("FVU", "metrics/fvu"),
    ("held-out FVU", "evaluation/fvu"),
    ("duplicates", "duplicates/pairs"),
)
"""Label and name; drawn where they were logged."""
COLORS = {
    "running": "green",
    "finished": "green",
    "slow": "yellow",
    "stopped": "yellow",
    "unclear": "yellow",
    "dead": "red",
}


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


def picture(snapshot: Snapshot, ascii_only: bool = False) -> Group:
    """The picture, which rich draws and cuts to the terminal's width.

    Args:
        ascii_only: no other characters, for terminals without UTF-8.
    """

    def text(words: str, style: str = "") -> Text:
        words = visible(words)
        if ascii_only:
            words = words.replace(MISSING, "-").encode("ascii", "replace").decode()
        return Text(words, style, no_wrap=True, overflow="crop")

    curves = Table.grid(padding=(0, 2, 0, 0))
    curves.add_column(no_wrap=True, min_width=max(len(label) for label, _ in CURVES))
    curves.add_column(no_wrap=True, min_width=8, justify="right")
    # Only a column that may wrap gets narrower where the terminal is narrow.
    curves.add_column(min_width=8)
    curves.add_column(no_wrap=True)
    for label, name in CURVES:
        series = snapshot.run.metrics.get(name)
        if series.last() is not None:
            curves.add_row(text(label), text(number(series.last())), _Sparkline(series), text(_note(label, snapshot)))
    facts = [
        ("L0", number(snapshot.metric("metrics/l0"))),
        ("dead", percent(snapshot.metric("sparsity/dead_share"))),
        (
            "tokens/s",
            thousands(rate) if (rate := snapshot.metric("metrics/tokens_per_second")) is not None else MISSING,
        ),
    ]
    parts = [
        text(f"{snapshot.run.name}  {snapshot.words}", f"bold {COLORS[snapshot.state]}"),
        _progress(snapshot, text),
        Text(),
        curves,
        Text(),
        text("   ".join(f"{label} {value}" for label, value in facts)),
        text(_last_seen(snapshot)),
    ]
    known = (
        e for e in snapshot.run.metrics.events if isinstance(e.get("step"), int) and e["event"] not in OF_THE_START
    )
    if events := list(known)[-3:]:
        parts.append(text("events: " + ", ".join(f"{e['event']} at {e['step']:,}" for e in events)))
    return Group(*parts)


def _progress(snapshot: Snapshot, text: Callable[[str], Text]) -> RenderableType:
    done, total = snapshot.step, snapshot.steps
    head = "no step yet" if done is None else f"step {number(done)}"
    if not done or not total:
        return text(head if not total else f"{head} of {number(total)}")
    seconds = snapshot.run.metrics.seconds
    elapsed = "" if seconds is None else f"elapsed {clock(seconds)}"
    left = "" if snapshot.left is None or snapshot.ended else f"left about {clock(snapshot.left)}"
    row = Table.grid(padding=(0, 2, 0, 0))
    row.add_column(no_wrap=True)
    row.add_column(max_width=30)
    row.add_column(no_wrap=True)
    share = 100 * min(1.0, done / total)
    row.add_row(
        text(f"{head} of {number(total)}  {share:.0f} %"),
        ProgressBar(100, share),
        text("  ".join(filter(None, [elapsed, left]))),
    )
    return row


def _note(label: str, snapshot: Snapshot) -> str:
    if label == "held-out FVU":
        linear = snapshot.metric("evaluation/baseline_linear_fvu")
        return "" if linear is None else f"linear map {number(linear)}"
    if label == "duplicates":
        known = [(word, snapshot.metric(f"duplicates/{word}")) for word in ("flagged", "mergeable")]
        return ", ".join(f"{word} {number(value)}" for word, value in known if value is not None)
    return ""


def _last_seen(snapshot: Snapshot) -> str:
    age = snapshot.run.metrics.age_seconds
    saved = candidates([snapshot.run.path / "checkpoints"])
    seen = "no line yet" if age is None else f"last line {clock(age)} ago"
    return f"{seen}, {f'checkpoint of step {saved[0][0]:,}' if saved else 'no checkpoint yet'}"


@dataclass(frozen=True)
class _Sparkline:
    series: Series

    def __rich_console__(self, _: Console, options: ConsoleOptions) -> RenderResult:
        drawn = sparkline(self.series, options.max_width, PLAIN_BLOCKS if options.ascii_only else BLOCKS)
        yield Text(drawn, no_wrap=True, overflow="crop")

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(8, 60)


def sparkline(series: Series, size: int, blocks: str = BLOCKS) -> str:
    """The curve in `size` characters: means over equal parts of the values, low to high; blanks where none is finite."""
    values: Sequence[float] = series.values
    size = min(size, len(values))
    means: list[float | None] = []
    for n in range(size):
        part = [v for v in values[n * len(values) // size : (n + 1) * len(values) // size] if math.isfinite(v)]
        means.append(math.fsum(part) / len(part) if part else None)
    known = [m for m in means if m is not None]
    if not known:
        return " " * size
    low, span = min(known), max(known) - min(known)
    top = len(blocks) - 1
    return "".join(" " if m is None else blocks[round(top * (m - low) / span) if span > 0 else 0] for m in means)
