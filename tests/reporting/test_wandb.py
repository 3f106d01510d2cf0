"""W&B in every bad state it can be in: the run neither stops nor waits."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from transcoder.config import RunConfig
from transcoder.reporting import MetricsWriter, follow_metrics
from transcoder.reporting import follower as follower_module
from transcoder.reporting.follower import sync_run

CONFIG = RunConfig(name="wandb-test").replace({"logging.wandb": "offline"})
ONLINE = CONFIG.replace({"logging.wandb": "online"})


@pytest.fixture(autouse=True)
def _own_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No real account, no real server, nothing outside the test's folder."""
    for name in list(os.environ):
        if name.startswith("WANDB_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)


@pytest.fixture
def fake_wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package `wandb` that comes first in the worker: each test writes what it does."""
    folder = tmp_path / "fake"
    (folder / "wandb").mkdir(parents=True)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    return folder / "wandb" / "__init__.py"


def use(config: RunConfig, run_dir: Path, writes: int = 20) -> float:
    """Write so many lines and close. Returns how long the close took, in seconds."""
    writer = MetricsWriter(run_dir, config)
    times = []
    for step in range(writes):
        began = time.perf_counter()
        writer.write(step, {"losses/overall_loss": 1.0 / (step + 1)})
        times.append(time.perf_counter() - began)
    began = time.perf_counter()
    writer.close()
    closing = time.perf_counter() - began
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == writes
    # W&B never answers in these tests, or takes half a minute to give up: a write that waited would take that long. The
    # machine's scheduler alone has been seen to take 1.1 s.
    assert max(times) < 5, "nothing here waits for W&B"
    return closing


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def test_offline_writes_its_files_inside_the_run_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = tmp_path / "run"
    closing = use(CONFIG, run)
    assert warnings(caplog) == []
    (data,) = run.glob("wandb/offline-run-*/run-*.wandb")
    assert data.stat().st_size > 0
    assert b"losses/overall_loss" in data.read_bytes()
    assert data.name == f"run-{(run / 'wandb' / 'run_id').read_text().strip()}.wandb"
    assert closing < 11
    assert not (tmp_path / "home").exists() or not any((tmp_path / "home").rglob("*.wandb"))


def test_raising_is_one_warning(tmp_path: Path, fake_wandb: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake_wandb.write_text("raise RuntimeError('this wandb is broken')\n")
    closing = use(CONFIG, tmp_path / "run")
    (warning,) = warnings(caplog)
    assert "this wandb is broken" in warning
    assert closing < 11


def test_absent_says_how_to_get_it(tmp_path: Path, fake_wandb: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake_wandb.write_text("raise ModuleNotFoundError(\"No module named 'wandb'\", name='wandb')\n")
    use(CONFIG, tmp_path / "run")
    (warning,) = warnings(caplog)
    assert "pip install wandb" in warning


def test_crashing_is_one_warning(tmp_path: Path, fake_wandb: Path, caplog: pytest.LogCaptureFixture) -> None:
    fake_wandb.write_text("import os\nos._exit(7)\n")
    use(CONFIG, tmp_path / "run")
    (warning,) = warnings(caplog)
    assert "worker ended unasked" in warning


def test_hanging_forever_costs_the_deadline_and_no_more(
    tmp_path: Path, fake_wandb: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pid_file = tmp_path / "pid"
    fake_wandb.write_text(HANGING.format(pid_file=str(pid_file)))
    monkeypatch.setattr(follower_module, "CLOSE_SECONDS", 1.5)
    closing = use(CONFIG, tmp_path / "run", writes=8000)
    assert closing < 4
    (told,) = warnings(caplog)
    assert "not finished 1.5 s after the run's end" in told
    for pid in map(int, pid_file.read_text().split()):
        assert _gone(pid), "the worker and its helpers are ended with it"


@pytest.mark.parametrize("server", ["refuses", "hangs"])
def test_a_server_that_cannot_be_used(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follower_module, "CLOSE_SECONDS", 3.0)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        if server == "hangs":
            listener.listen(64)  # connections are taken by the kernel and never answered
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{listener.getsockname()[1]}")
        closing = use(ONLINE, tmp_path / "run")
    assert closing < 6
    assert len(warnings(caplog)) >= 1


def test_an_online_run_that_cannot_start_goes_on_offline(
    tmp_path: Path, fake_wandb: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = tmp_path / "record.jsonl"
    fake_wandb.write_text(FAKE.format(record=str(record)))
    use(ONLINE, tmp_path / "run", writes=3)
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    assert [c["mode"] for c in calls if c["call"] == "init"] == ["online", "offline"]
    assert [c["step"] for c in calls if c["call"] == "log"] == [0, 1, 2]
    assert calls[-1] == {"call": "finish", "exit_code": 0}
    (warning,) = warnings(caplog)
    assert "logging offline instead" in warning


def test_name_project_and_identity(tmp_path: Path, fake_wandb: Path) -> None:
    record = tmp_path / "record.jsonl"
    fake_wandb.write_text(FAKE.format(record=str(record)))
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000001"
    for config in (CONFIG, CONFIG.replace({"logging.wandb_upload_checkpoints": True})):
        with MetricsWriter(tmp_path / "run", config, resume_step=0) as writer:
            writer.write(1, {"x": float("nan")})
            writer.upload_checkpoint(checkpoint, 1)
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    inits = [c for c in calls if c["call"] == "init"]
    assert {c["name"] for c in inits} == {"wandb-test"}
    assert {c["project"] for c in inits} == {"transcoder"}
    assert len({c["id"] for c in inits}) == 1, "a resumed run continues the same W&B run"
    uploads = [c for c in calls if c["call"] == "artifact"]
    assert [u["folder"] for u in uploads] == [str(checkpoint)], "only the run that asked for it uploads"


def test_a_killed_run_lets_its_worker_finish_as_failed(tmp_path: Path, fake_wandb: Path) -> None:
    record = tmp_path / "record.jsonl"
    fake_wandb.write_text(FAKE.format(record=str(record)))
    script = KILLED.format(run=str(tmp_path / "run"), record=str(record))
    assert subprocess.run([sys.executable, "-c", script], timeout=60).returncode == -9
    deadline = time.monotonic() + 10
    while '"finish"' not in record.read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    assert json.loads(record.read_text().splitlines()[-1]) == {"call": "finish", "exit_code": 1}


def test_a_disk_that_is_full_in_its_own_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file system of 64 KiB is mounted there and really filled; the run's own folder has room."""
    folder = tmp_path / "run" / "wandb"
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("needs the right to mount")
    try:
        (folder / "run_id").write_text("abcd1234")
        (folder / "filler").touch()
        with contextlib.suppress(OSError), open(folder / "filler", "wb", buffering=0) as file:
            while True:
                file.write(bytes(1024))
        use(CONFIG, tmp_path / "run")
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
    assert len(warnings(caplog)) >= 1


def test_its_own_log_is_bounded(tmp_path: Path, fake_wandb: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A W&B that prints without end."""
    monkeypatch.setattr(follower_module, "LOG_BYTES", 20_000)
    loud = FAKE.replace('note(call="log", step=step)', 'print("x" * 1000, flush=True); note(call="log", step=step)')
    record = tmp_path / "record.jsonl"
    fake_wandb.write_text(loud.format(record=str(record)))
    writer = MetricsWriter(tmp_path / "run", CONFIG)
    log = tmp_path / "run" / "wandb" / "worker.log"
    for step in range(100):
        writer.write(step, {"x": 1.0})
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline and not (record.exists() and f'"step": {step}}}' in record.read_text()):
            time.sleep(0.001)
        assert log.stat().st_size <= 22_000
    writer.close()


def test_figures_are_sent_afterwards(tmp_path: Path, fake_wandb: Path) -> None:
    """What W&B missed is in metrics.jsonl: all of it, each step once, without events."""
    run = tmp_path / "run"
    with MetricsWriter(run, RunConfig(name="late")) as writer:
        for step in (10, 20):
            writer.write(step, {"losses/overall_loss": 1 / step, "x": float("inf")})
            writer.write(step, {"evaluation/fvu": 0.5})
            writer.write_event("checkpoint", {"step": step})
    (run / "config.yaml").write_text(RunConfig(name="late").to_yaml())
    record = tmp_path / "record.jsonl"
    fake_wandb.write_text(FAKE.replace("step=step)", "step=step, metrics=metrics)").format(record=str(record)))
    said = sync_run(run, mode="offline")
    assert said["lines"] == 2
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    assert [(c["step"], c["metrics"]) for c in calls if c["call"] == "log"] == [
        (10, {"losses/overall_loss": 0.1, "x": float("inf"), "evaluation/fvu": 0.5}),
        (20, {"losses/overall_loss": 0.05, "x": float("inf"), "evaluation/fvu": 0.5}),
    ]
    assert calls[0]["name"] == "late"
    assert calls[-1] == {"call": "finish", "exit_code": 0}
    fake_wandb.write_text("raise RuntimeError('this wandb is broken')\n")
    with pytest.raises(RuntimeError, match="this wandb is broken"):
        sync_run(run)
    fake_wandb.write_text("import time\ntime.sleep(99)\n")
    with pytest.raises(RuntimeError, match=r"did not take 2 lines in 0\.5 s"):
        sync_run(run, seconds=0.5)
    with pytest.raises(FileNotFoundError, match=r"no metrics\.jsonl"):
        sync_run(tmp_path)


@pytest.mark.parametrize("content", [b"../../elsewhere\n", b"\xff\xfe", b""])
def test_an_id_that_is_none_is_replaced(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "run_id").write_bytes(content)
    fresh = follower_module.run_id(tmp_path)
    assert fresh.isalnum()
    assert follower_module.run_id(tmp_path) == fresh


def test_the_cursor_reads_what_is_added_also_to_a_file_that_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"

    def lines(*times: float) -> bytes:
        return b"".join(b'{"step": 1, "time": %.1f, "x": 1}\n' % time for time in times)

    def read(cursor: follow_metrics.MetricsCursor, ended: bool = False) -> list[float]:
        return [record["time"] for record in cursor.read(ended)]

    cursor = follow_metrics.MetricsCursor(str(path))
    assert read(cursor) == []
    path.write_bytes(lines(1, 2) + b"\xff[\n[1]\n" + lines(3)[:9])
    assert read(cursor) == [1, 2]
    path.write_bytes(lines(1, 2) + b"\xff[\n[1]\n" + lines(3)[:-1])
    assert read(cursor) == [], "the line is still being written"
    assert read(cursor, ended=True) == [3]
    thinned = tmp_path / "thinned"
    thinned.write_bytes(lines(1, 3, 4))
    thinned.replace(path)
    assert read(cursor) == [4]
    resumed = follow_metrics.MetricsCursor(str(path), len(lines(1, 3)), 3)
    assert read(resumed) == [4]
    thinned.write_bytes(lines(3, 4, 5))
    thinned.replace(path)
    assert read(resumed) == [5]
    path.unlink()
    assert read(resumed) == []


def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.02)
    return False


FAKE = """
import json
def note(**fields):
    with open({record!r}, "a") as file:
        file.write(json.dumps(fields) + "\\n")
class Settings:
    def __init__(self, **kwargs): pass
class Artifact:
    def __init__(self, name, type, metadata): self.folder = None
    def add_dir(self, folder, **kwargs): self.folder = folder
class Run:
    id, url, dir = "abc", None, "somewhere"
    def log(self, metrics, step): note(call="log", step=step)
    def log_artifact(self, artifact): note(call="artifact", folder=artifact.folder)
    def finish(self, exit_code=0): note(call="finish", exit_code=exit_code)
def init(mode, id, name, project, **kwargs):
    note(call="init", mode=mode, id=id, name=name, project=project)
    if mode == "online":
        raise ConnectionError("no route to host")
    return Run()
"""

HANGING = """
import os, subprocess, sys, time
helper = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
with open({pid_file!r}, "w") as file:
    file.write(f"{{os.getpid()}} {{helper.pid}}")
time.sleep(99)
"""

KILLED = """
import os, signal, time
from transcoder.config import RunConfig
from transcoder.reporting import MetricsWriter
config = RunConfig(name="killed").replace({{"logging.wandb": "offline"}})
writer = MetricsWriter({run!r}, config)
writer.write(5, {{"x": 1.0}})
while not (os.path.exists({record!r}) and '"log"' in open({record!r}).read()):
    time.sleep(0.02)
os.kill(os.getpid(), signal.SIGKILL)
"""
