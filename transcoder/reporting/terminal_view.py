"""One picture of a run in progress: what is known of it at one moment, and how a terminal shows that."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from transcoder.checkpoint_folder import candidates
from transcoder.reporting.format import MISSING, clock, number, percent, thousands
from transcoder.reporting.metrics_table import Metrics, Series
from transcoder.reporting.run import Run
from transcoder.reporting.run_process import RunProcess, process_of
from transcoder.reporting.tables import visible

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
QUIET_SECONDS, QUIET_LINES = 60.0, 10.0
"""A run is slow when its last line is older than this and than so many of its usual intervals."""
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


@dataclass(frozen=True)
class Snapshot:
    """What is known of a run at one moment.

    Fields:
        state: "running", "slow", "finished", "stopped", "dead" or "unclear".
        words: the state in words, with its reason.
        step, steps: done, and of the whole run; left: seconds.
    """

    state: str
    words: str
    step: int | None
    steps: int | None
    left: float | None
    run: Run

    def metric(self, name: str) -> float | None:
        """The last value that was logged. summary.json is not asked: of a resumed run it is the earlier session's."""
        return self.run.metrics.get(name).last()

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "stopped", "dead")


def look(run_dir: Path, metrics: Metrics) -> Snapshot:
    """Read what is new in the folder; `metrics` follows its metrics.jsonl. Nothing is written, no lock is touched."""
    # The process first: one that ends while the files are read has written them all.
    process = process_of(run_dir)
    metrics.poll()
    run = Run(run_dir, empty_ok=True, metrics=metrics)
    steps, step, pace = run.setting("training.steps"), run.last_step, metrics.seconds_per_step
    steps = steps if isinstance(steps, int) else None
    left = None if pace is None or steps is None or step is None else max(0, steps - step) * pace
    state, words = _state(process, run)
    return Snapshot(state, words, step, steps, left, run)


def _state(process: RunProcess, run: Run) -> tuple[str, str]:
    status, age = run.status, run.metrics.age_seconds
    if process.state == "running":
        usual = run.metrics.seconds_per_line
        quiet = age is not None and age > max(QUIET_SECONDS, QUIET_LINES * (usual or 0.0))
        if not quiet or age is None:
            return "running", f"running, process {process.pid}"
        often = "" if usual is None else f", usually one every {clock(usual)}"
        return "slow", f"slow: process {process.pid} is alive, but its last line is {clock(age)} old{often}"
    # A summary that is older than the last line is of an earlier session.
    if run.finished:
        return "finished", "finished"
    if status.startswith("stopped"):
        return "stopped", f"{status}; its state is saved, --resume goes on"
    old = "it wrote no line" if age is None else f"its last line is {clock(age)} old"
    if process.state == "gone":
        return "dead", f"dead: process {process.pid} is gone without a summary, {old}; --resume goes on"
    if process.state == "elsewhere":
        return "unclear", f"runs on {process.host}, which cannot be seen from here; {old}"
    return "unclear", f"nothing says which process writes this folder; {old}"


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
