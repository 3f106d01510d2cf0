"""One picture of a run in progress, as lines of text for a terminal."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from transcoder.checkpoint_folder import candidates
from transcoder.reporting.format import MISSING, clock, number, percent, thousands
from transcoder.reporting.metrics_tail import MetricsTail
from transcoder.reporting.run_process import RunProcess, process_of
from transcoder.reporting.run_tables import visible
from transcoder.reporting.runfolder import RunFolder
from transcoder.reporting.series import Series

BLOCKS, PLAIN_BLOCKS = "▁▂▃▄▅▆▇█", "_.-=+*%#"
QUIET_SECONDS, QUIET_LINES = 60.0, 10.0
"""A run is slow when its last line is older than this and than so many of its usual intervals."""
NARROW = 40
OF_THE_START = ("data", "checkpoint_budget")
"""Events that every run begins with and nobody watches for."""
CURVES = (
    ("loss", "losses/overall_loss"),
    ("FVU", "metrics/fvu"),
    ("held-out FVU", "evaluation/fvu"),
    ("duplicates", "duplicates/pairs"),
)
"""Label and name; drawn where they were logged."""


@dataclass(frozen=True)
class Snapshot:
    """What is known of a run at one moment.

    Fields:
        state: "running", "slow", "finished", "stopped", "dead" or "unclear".
        words: the state in words, with its reason.
    """

    state: str
    words: str
    name: str
    step: int | None
    steps: int | None
    elapsed: float | None
    left: float | None
    tail: MetricsTail
    folder: RunFolder

    def figure(self, name: str) -> float | None:
        """The last value that was logged. summary.json is not asked: of a resumed run it is the earlier session's."""
        return self.tail.table.get(name).last()

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "stopped", "dead")


def look(run_dir: Path, tail: MetricsTail) -> Snapshot:
    """Read what is new in the folder. Nothing is written, no lock is touched."""
    # The process first: one that ends while the files are read has written them all.
    process = process_of(run_dir)
    tail.poll()
    folder = RunFolder(run_dir)
    # The curves come from the tail, which has read them already.
    folder.__dict__["metrics"] = tail.table
    steps = folder.setting("training.steps")
    steps = steps if isinstance(steps, int) else None
    step = folder.last_step
    pace = tail.seconds_per_step
    left = None if pace is None or steps is None or step is None else max(0, steps - step) * pace
    state, words = _state(process, folder, tail)
    return Snapshot(state, words, folder.name, step, steps, tail.table.seconds, left, tail, folder)


def _state(process: RunProcess, folder: RunFolder, tail: MetricsTail) -> tuple[str, str]:
    status, age = folder.status, tail.age_seconds
    if process.state == "running":
        usual = tail.seconds_per_line
        quiet = age is not None and age > max(QUIET_SECONDS, QUIET_LINES * (usual or 0.0))
        if not quiet or age is None:
            return "running", f"running, process {process.pid}"
        often = "" if usual is None else f", usually one every {clock(usual)}"
        return "slow", f"slow: process {process.pid} is alive, but its last line is {clock(age)} old{often}"
    # A summary that is older than the last line is of an earlier session.
    if folder.finished:
        return "finished", "finished"
    if status.startswith("stopped"):
        return "stopped", f"{status}; its state is saved, --resume goes on"
    old = "it wrote no line" if age is None else f"its last line is {clock(age)} old"
    if process.state == "gone":
        return "dead", f"dead: process {process.pid} is gone without a summary, {old}; --resume goes on"
    if process.state == "elsewhere":
        return "unclear", f"runs on {process.host}, which cannot be seen from here; {old}"
    return "unclear", f"nothing says which process writes this folder; {old}"


def frame(snapshot: Snapshot, columns: int, plain: bool = False) -> list[str]:
    """The picture, each line at most `columns` wide.

    Args:
        plain: ASCII only, for terminals without UTF-8.
    """
    columns = max(columns, NARROW)
    figure = snapshot.figure
    lines = [f"{visible(snapshot.name)}  {visible(snapshot.words)}", _progress(snapshot, columns, plain), ""]
    label_size = max(len(label) for label, _ in CURVES)
    for label, name in CURVES:
        series = snapshot.tail.table.get(name)
        value = series.last()
        if value is None:
            continue
        head = f"{label.ljust(label_size)}  {number(value):>8}  "
        note = _note(label, snapshot)
        room = max(8, min(60, columns - len(head) - (len(note) + 2 if note else 0)))
        lines.append(f"{head}{sparkline(series, room, plain)}  {note}")
    facts = [
        ("L0", number(figure("metrics/l0"))),
        ("dead", percent(figure("sparsity/dead_share"))),
        ("tokens/s", thousands(rate) if (rate := figure("metrics/tokens_per_second")) is not None else MISSING),
    ]
    lines += ["", "   ".join(f"{label} {value}" for label, value in facts), _last_seen(snapshot)]
    every = (e for e in snapshot.tail.table.events if isinstance(e.get("step"), int) and e["event"] not in OF_THE_START)
    events = list(every)[-3:]
    if events:
        lines.append("events: " + ", ".join(f"{visible(str(e['event']))} at {e['step']:,}" for e in events))
    if plain:
        lines = [line.replace(MISSING, "-").encode("ascii", "replace").decode() for line in lines]
    return [fit(line, columns) for line in lines]


def _note(label: str, snapshot: Snapshot) -> str:
    figure = snapshot.figure
    if label == "held-out FVU":
        linear = figure("evaluation/baseline_linear_fvu")
        return "" if linear is None else f"linear map {number(linear)}"
    if label == "duplicates":
        known = [(word, figure(f"duplicates/{word}")) for word in ("flagged", "mergeable")]
        return ", ".join(f"{word} {number(value)}" for word, value in known if value is not None)
    return ""


def _progress(snapshot: Snapshot, columns: int, plain: bool) -> str:
    done, total = snapshot.step, snapshot.steps
    head = "no step yet" if done is None else f"step {number(done)}"
    if not done or not total:
        return head if not total else f"{head} of {number(total)}"
    share = min(1.0, done / total)
    elapsed = "" if snapshot.elapsed is None else f"  elapsed {clock(snapshot.elapsed)}"
    left = "" if snapshot.left is None or snapshot.ended else f"  left about {clock(snapshot.left)}"
    head, tail = f"{head} of {number(total)}  {100 * share:.0f} %  ", f"{elapsed}{left}"
    size = min(30, columns - len(head) - len(tail))
    if size < 5:
        return head + tail.strip()
    full = int(share * size)
    on, off = ("#", ".") if plain else ("█", "░")
    return head + on * full + off * (size - full) + tail


def _last_seen(snapshot: Snapshot) -> str:
    age = snapshot.tail.age_seconds
    saved = candidates([snapshot.folder.path / "checkpoints"])
    seen = "no line yet" if age is None else f"last line {clock(age)} ago"
    return f"{seen}, {f'checkpoint of step {saved[0][0]:,}' if saved else 'no checkpoint yet'}"


def sparkline(series: Series, size: int, plain: bool = False) -> str:
    """The curve in `size` characters: means over equal parts of the values, low to high; blanks where none is finite."""
    blocks = PLAIN_BLOCKS if plain else BLOCKS
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


def fit(line: str, columns: int) -> str:
    """`line` cut to `columns` cells; letters of East Asian scripts take two."""
    used = 0
    for n, char in enumerate(line):
        used += 0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1
        if used > columns:
            return line[:n]
    return line
