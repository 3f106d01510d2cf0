"""What is known of a run in progress at one moment: whether a process still works on its folder, how far it is."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transcoder.files import process_is_alive
from transcoder.reporting.format import clock
from transcoder.reporting.metrics_table import Metrics
from transcoder.reporting.run import Run

LOCK_FILE = ".lock"
LOCK_TABLE = Path("/proc/locks")
QUIET_SECONDS, QUIET_LINES = 60.0, 10.0
"""A run is slow when its last line is older than this and than so many of its usual intervals."""


@dataclass(frozen=True)
class RunProcess:
    """`state` is "running"; "gone": it ran on this machine and holds the folder no more; "elsewhere": it ran on another
    machine, which cannot be seen from here; "unknown": nothing says who wrote the folder."""

    state: Literal["running", "gone", "elsewhere", "unknown"]
    pid: int | None = None
    host: str | None = None


def process_of(run_dir: Path) -> RunProcess:
    """Who holds the run folder's lock.

    The lock is never tried: for a moment that would hold it, and a run that starts in this moment would be refused. The
    kernel's own table says who holds it; where there is none, whether the process that the lock names is alive.
    """
    path = Path(run_dir) / LOCK_FILE
    try:
        found = path.stat()
    except OSError:
        return RunProcess("unknown")
    here, table = socket.gethostname(), _locks(found)
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        pid, host = int(owner["pid"]), str(owner["host"])
    except (OSError, ValueError, KeyError, TypeError):
        # On a full disk the lock holds, and only the name of its owner is missing.
        holder = next((p for p, same_device in table or () if same_device), None)
        return RunProcess("unknown") if holder is None else RunProcess("running", holder, here)
    if host != here:
        return RunProcess("elsewhere", pid, host)
    held = process_is_alive(pid) if table is None else any(p == pid or same_device for p, same_device in table)
    return RunProcess("running" if held else "gone", pid, host)


def _locks(found: os.stat_result) -> list[tuple[int, bool]] | None:
    """(process, whether the device is the file's too) of every flock on a file of this number; None where the kernel has no
    table of locks. Overlays and network disks give the table another device than the file has."""
    try:
        lines = LOCK_TABLE.read_text().splitlines()
    except OSError:
        return None
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    holders = []
    # "3: FLOCK  ADVISORY  WRITE 14132 fe:00:1183 0 EOF"
    for words in (line.split() for line in lines):
        if len(words) >= 6 and words[1] == "FLOCK" and words[4].isdecimal():
            at, _, inode = words[5].rpartition(":")
            if inode == str(found.st_ino):
                holders.append((int(words[4]), at == device))
    return holders


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
