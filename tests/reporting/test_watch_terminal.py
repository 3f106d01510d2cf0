"""The terminal view: what it shows, how it ends, and that it leaves the run and the terminal alone."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from rich.console import Console

from transcoder.reporting import watch_state
from transcoder.reporting import watch_terminal as terminal
from transcoder.reporting.metrics_table import Metrics, Series
from transcoder.reporting.watch_state import LOCK_FILE, Snapshot, process_of
from transcoder.reporting.watch_terminal import sparkline, watch_terminal
from transcoder.training.run_folder import LOCK_NAME, FolderLock

MakeRun = Callable[..., Path]
# Holds the lock as a trainer does, says so, and writes what it is told until its input ends.
TRAINER = """
import fcntl, json, os, socket, sys
lock = open(sys.argv[1] + "/.lock", "w")
fcntl.flock(lock, fcntl.LOCK_EX)
json.dump({"pid": os.getpid(), "host": socket.gethostname(), "since": "now"}, lock)
lock.flush()
print("locked", flush=True)
for line in sys.stdin:
    with open(sys.argv[1] + "/metrics.jsonl", "a") as metrics:
        metrics.write(line)
    print("written", flush=True)
"""


class Trainer:
    """A process of its own that holds a run folder."""

    def __init__(self, run_dir: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-c", TRAINER, str(run_dir)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._answer()

    def write(self, step: int, seconds: float, **figures: float) -> None:
        assert self.process.stdin is not None
        named = {name.replace("__", "/"): value for name, value in figures.items()}
        self.process.stdin.write(json.dumps({"step": step, "time": seconds, **named}) + "\n")
        self.process.stdin.flush()
        self._answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _answer(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline()


@pytest.fixture
def unfinished(make_run: MakeRun) -> Path:
    """A run of 100 steps that has come to step 40."""
    return make_run(steps=100, interrupted=True)


@pytest.fixture
def trainer(unfinished: Path) -> Iterator[Trainer]:
    made = Trainer(unfinished)
    yield made
    made.kill()


def look(run_dir: Path) -> Snapshot:
    return watch_state.look(run_dir, Metrics(run_dir / "metrics.jsonl"))


def picture(run_dir: Path, columns: int = 100, encoding: str = "utf-8") -> str:
    """What a terminal of so many columns shows."""
    shown = io.TextIOWrapper(io.BytesIO(), encoding=encoding, write_through=True)
    console = Console(file=shown, width=columns, highlight=False)
    console.print(terminal.picture(look(run_dir), console.options.ascii_only))
    return shown.buffer.getvalue().decode(encoding)


def age(run_dir: Path, seconds: float) -> None:
    then = time.time() - seconds
    os.utime(run_dir / "metrics.jsonl", (then, then))


# -- who holds the folder


def test_the_lock_is_the_trainers_own(tmp_path: Path) -> None:
    assert LOCK_FILE == LOCK_NAME
    assert process_of(tmp_path).state == "unknown"
    with FolderLock(tmp_path):
        assert process_of(tmp_path) == watch_state.RunProcess("running", os.getpid(), socket.gethostname())
    # This process lives on, as a notebook's kernel does after training.
    if watch_state.LOCK_TABLE.exists():
        assert process_of(tmp_path).state == "gone"


def test_a_killed_process_is_gone(unfinished: Path, trainer: Trainer) -> None:
    assert process_of(unfinished).state == "running"
    trainer.kill()
    assert process_of(unfinished).state == "gone"


def test_without_a_table_of_locks_the_process_itself_is_asked_for(
    unfinished: Path, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_state, "LOCK_TABLE", unfinished / "no such table")
    assert process_of(unfinished).state == "running"
    trainer.kill()
    assert process_of(unfinished).state == "gone"


def test_another_machines_process_cannot_be_seen(unfinished: Path) -> None:
    (unfinished / LOCK_FILE).write_text(json.dumps({"pid": os.getpid(), "host": "node17", "since": "now"}))
    assert process_of(unfinished).state == "elsewhere"
    assert "runs on node17, which cannot be seen from here" in picture(unfinished)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "host": 3}', '{"host": "a"}'])
def test_a_damaged_lock_file_says_nothing(unfinished: Path, content: str) -> None:
    (unfinished / LOCK_FILE).write_text(content)
    assert process_of(unfinished).state == "unknown"


def test_a_lock_without_its_owners_name_holds(unfinished: Path, trainer: Trainer) -> None:
    # A full disk: the lock is taken, the name could not be written.
    (unfinished / LOCK_FILE).write_text("")
    if watch_state.LOCK_TABLE.exists():
        assert process_of(unfinished) == watch_state.RunProcess("running", trainer.process.pid, socket.gethostname())
    trainer.kill()
    assert process_of(unfinished).state == "unknown"


def test_looking_never_holds_the_lock(unfinished: Path) -> None:
    done = threading.Event()

    def look_on() -> None:
        while not done.is_set():
            process_of(unfinished)

    watcher = threading.Thread(target=look_on)
    watcher.start()
    try:
        for _ in range(200):
            FolderLock(unfinished).release()
    finally:
        done.set()
        watcher.join()


# -- what is new in the file


def test_the_tail_reads_what_was_added(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    tail = Metrics(file)
    assert tail.poll() is False
    assert tail.age_seconds is None
    file.write_text('{"step": 1, "time": 10, "a": 1}\n{"step": 2, "time": 12, "a": 2}\n{"step": 3, "ti')
    assert tail.poll() is True
    assert list(tail.get("a").values) == [1, 2]
    assert tail.poll() is False
    with open(file, "a") as more:
        more.write(
            'me": 14, "a": null, "nonfinite": {"a": "nan"}}\nno JSON\n{"event": "checkpoint", "step": 3, "time": 15}\n'
        )
    assert tail.poll() is True
    assert list(tail.get("a").steps) == [1, 2, 3]
    assert (tail.unreadable, tail.last_step, tail.seconds) == (1, 3, 15)
    assert tail.seconds_per_step == tail.seconds_per_line == 2
    assert [e["event"] for e in tail.events] == ["checkpoint"]


def test_a_file_that_a_resumed_run_cut_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text("".join(f'{{"step": {n}, "time": {n}, "a": {n}}}\n' for n in range(10)))
    tail = Metrics(file)
    tail.poll()
    # As drop_after does it: another file takes the name, and is soon longer than the old one was.
    other = tmp_path / "other"
    other.write_text("".join(f'{{"step": {n}, "time": {n}, "a": {-n}}}\n' for n in range(20)))
    os.replace(other, file)
    assert tail.poll() is True
    assert list(tail.get("a").values) == [-n for n in range(20)]
    file.write_text('{"step": 0, "time": 0, "a": 7}\n')
    tail.poll()
    assert list(tail.get("a").values) == [7]


# -- the picture


def test_a_picture_of_a_running_run(unfinished: Path, trainer: Trainer) -> None:
    trainer.write(50, 4.0, metrics__fvu=0.5, losses__overall_loss=0.75)
    shown = picture(unfinished)
    assert shown.startswith(f"synthetic  running, process {trainer.process.pid}")
    assert "step 50 of 100  50 %" in shown
    assert re.search(r"left about \d+:\d\d", shown)
    assert re.search(r"^loss +0\.75  [▁▂▃▄▅▆▇█]{5}", shown, re.M)
    assert re.search(r"^FVU +0\.5  [▁▂▃▄▅▆▇█]{5}", shown, re.M)
    assert "last line 0:0" in shown
    assert "no checkpoint yet" in shown
    assert "checkpoint at 40" in shown


def test_a_slow_run_is_told_from_a_dead_one(unfinished: Path, trainer: Trainer) -> None:
    age(unfinished, 400)
    slow = look(unfinished)
    assert slow.state == "slow"
    assert f"process {trainer.process.pid} is alive, but its last line is 6:40 old" in slow.words
    assert not slow.ended
    trainer.kill()
    dead = look(unfinished)
    assert dead.state == "dead"
    assert "is gone without a summary, its last line is 6:40 old" in dead.words
    assert dead.ended


def test_a_run_whose_lines_are_far_apart_is_not_slow(unfinished: Path, trainer: Trainer) -> None:
    for n in range(60):
        trainer.write(50 + n, 100.0 * n, metrics__fvu=0.5)
    age(unfinished, 400)
    assert look(unfinished).state == "running"


def test_an_earlier_sessions_summary_does_not_end_the_view(unfinished: Path, trainer: Trainer) -> None:
    summary = {"finished": False, "interrupted_by": "SIGTERM", "step": 40, "metrics/fvu": 0.123}
    (unfinished / "summary.json").write_text(json.dumps(summary))
    snapshot = look(unfinished)
    assert snapshot.state == "running"
    assert "0.123" not in picture(unfinished)
    trainer.kill()
    stopped = look(unfinished)
    assert stopped.state == "stopped"
    assert "stopped by SIGTERM" in stopped.words


@pytest.mark.parametrize("columns", [10, 40, 57, 80, 200])
def test_no_line_is_wider_than_the_terminal(unfinished: Path, trainer: Trainer, columns: int) -> None:
    lines = picture(unfinished, columns).splitlines()
    assert max(map(len, lines)) <= max(columns, 40)


def test_hostile_names_and_events_stay_text(unfinished: Path, trainer: Trainer) -> None:
    config = (unfinished / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(config.replace("name: synthetic", 'name: "\\e]0;x\\a\\e[2J"', 1))
    with open(unfinished / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"event": "\x1b[31m\u202e", "step": 41, "time": 9}) + "\n")
    shown = picture(unfinished, 200)
    assert "\\x1b[31m\\u202e at 41" in shown
    assert all(c.isprintable() or c == "\n" for c in shown)


def test_plain_pictures_are_ascii(unfinished: Path, trainer: Trainer) -> None:
    config = (unfinished / "config.yaml").read_text()
    (unfinished / "config.yaml").write_text(config.replace("name: synthetic", "name: größe", 1))
    assert picture(unfinished, encoding="ascii").isascii()


def test_sparklines() -> None:
    def drawn(values: list[float], size: int) -> str:
        return sparkline(Series(array("q", range(len(values))), array("d", values)), size)

    assert drawn([0, 1, 2, 3, 4, 5, 6, 7], 8) == "▁▂▃▄▅▆▇█"
    assert drawn([0, 0, 7, 7], 2) == "▁█"
    assert drawn([5, 5, 5], 3) == "▁▁▁"
    assert drawn([0, float("nan"), 7], 3) == "▁ █"
    assert drawn([float("inf")], 1) == " "
    assert drawn([], 5) == ""
    assert drawn([1, 2], 10) == "▁█"


# -- the whole view


def test_lines_where_it_is_no_terminal(finished_run: Path) -> None:
    out = io.StringIO()
    before = {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")}
    assert watch_terminal(finished_run, stream=out) == 0
    assert out.getvalue().count("\n") == 1
    assert out.getvalue().startswith("step 600/600  loss ")
    assert "finished" in out.getvalue()
    assert "\x1b" not in out.getvalue()
    assert {p: p.stat().st_mtime_ns for p in finished_run.rglob("*")} == before


def test_lines_follow_a_run_to_its_death(unfinished: Path, trainer: Trainer) -> None:
    out, codes = io.StringIO(), []
    watching = threading.Thread(
        target=lambda: codes.append(watch_terminal(unfinished, stream=out, interval=0.01, line_seconds=0))
    )
    watching.start()

    def until(text: str) -> None:
        deadline = time.monotonic() + 60
        while text not in out.getvalue():
            assert time.monotonic() < deadline, out.getvalue()
            time.sleep(0.01)

    until("step 40/100")
    trainer.write(60, 5.0, losses__overall_loss=0.25)
    until("step 60/100  loss 0.25")
    trainer.kill()
    watching.join(60)
    assert codes == [1]
    assert "dead: process" in out.getvalue().splitlines()[-1]


def test_a_terminal_is_drawn_in_place_and_left_as_it_was(unfinished: Path, trainer: Trainer) -> None:
    # A real terminal and the real command, left as a person leaves it.
    pid, master = pty.fork()
    if pid == 0:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a shell's background job would hand on that it ignores Ctrl-C
        os.environ.update(TERM="xterm", PYTHONUTF8="1", OMP_NUM_THREADS="1")
        os.execv(sys.executable, [sys.executable, "-m", "transcoder", "watch", str(unfinished), "--terminal"])
    seen = b""

    def until(text: str) -> None:
        nonlocal seen
        deadline = time.monotonic() + 120
        while text.encode() not in seen:
            assert time.monotonic() < deadline, seen.decode(errors="replace")
            if select.select([master], [], [], 1)[0]:
                try:
                    seen += os.read(master, 1 << 16)
                except OSError:
                    break
        assert text.encode() in seen, seen.decode(errors="replace")

    try:
        until("step 40 of 100")
        trainer.write(60, 5.0, losses__overall_loss=0.25)
        until("step 60 of 100")
        os.write(master, b"\x03")
        until("\x1b[?1049l")
        _, status = os.waitpid(pid, 0)
    finally:
        os.close(master)
    assert os.waitstatus_to_exitcode(status) == 0
    text = seen.decode()
    assert text.count("\x1b[?1049h") == text.count("\x1b[?1049l") == 1
    assert text.index("\x1b[?25l") < text.index("\x1b[?25h")
    # Drawn over, not below: every picture begins in the corner.
    assert text.count("\x1b[H") >= 2
    assert "Traceback" not in text
    assert process_of(unfinished).state == "running"


def test_a_killed_view_gives_the_terminal_back(unfinished: Path, trainer: Trainer) -> None:
    code = """
import sys, threading, os, signal
from pathlib import Path
from transcoder.reporting.watch_terminal import watch_terminal
threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
sys.stdout.isatty = lambda: True
watch_terminal(Path(sys.argv[1]), interval=0.05)
"""
    done = subprocess.run(
        [sys.executable, "-c", code, str(unfinished)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "TERM": "xterm"},
    )
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    assert done.stdout.endswith("\x1b[?25h\x1b[?1049l")


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        watch_terminal(tmp_path / "nowhere", stream=io.StringIO())


def test_a_folder_that_goes_away_ends_the_view_with_its_name(unfinished: Path, trainer: Trainer) -> None:
    shutil.rmtree(unfinished)
    with pytest.raises(FileNotFoundError, match=re.escape(str(unfinished))):
        watch_terminal(unfinished, stream=io.StringIO())
