"""Checkpoints written beside training: the same bits, at another's pace, and its failures are those of any other."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from tests.training.planted import Planted, config, records
from transcoder import tensor_file
from transcoder.activations import ActivationBatch
from transcoder.checkpoint_folder import CheckpointError, find_checkpoint
from transcoder.training import RunResult, checkpointing, train_transcoder
from transcoder.training.state_tree import Snapshots


def files(run_dir: Path) -> dict[str, bytes]:
    return {str(p.relative_to(run_dir)): p.read_bytes() for p in run_dir.glob("checkpoints/*/*.safetensors")}


@pytest.fixture(scope="module")
def waited_for(tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    """A run that waits for each of its checkpoints."""
    settings = config(checkpoint__asynchronous=False, checkpoint__keep_last=9)
    return train_transcoder(settings, tmp_path_factory.mktemp("waited") / "run", batches=Planted())


class Gate:
    """Holds up the writing of a checkpoint's files, in the thread that does it."""

    def __init__(self) -> None:
        self.open, self.waited = threading.Event(), 0
        self.threads: set[str] = set()

    def __call__(self) -> None:
        self.threads.add(threading.current_thread().name)
        self.waited += not self.open.is_set()
        self.open.wait(60)


class Opening(Planted):
    """Opens the gate at a batch; some steps are done by then."""

    def __init__(self, gate: Gate, step: int) -> None:
        super().__init__()
        self.gate, self.at = gate, step + 4

    def __next__(self) -> ActivationBatch:
        if self.index == self.at:
            assert self.gate.waited == 1, "the write is on its way, and training is not waiting for it"
            self.gate.open.set()
        return super().__next__()


def test_the_state_is_that_of_its_step_however_late_it_is_written(
    waited_for: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate()
    inside = tensor_file.write_tensors

    def late(file: BinaryIO, tensors: dict[str, torch.Tensor]) -> Any:
        if threading.current_thread() is not threading.main_thread():
            gate()
        return inside(file, tensors)

    monkeypatch.setattr("transcoder.training.checkpoint.write_tensors", late)
    result = train_transcoder(config(checkpoint__keep_last=9), tmp_path / "run", batches=Opening(gate, 17))
    assert gate.threads == {"transcoder-checkpoint"}
    assert result.finished
    ours, theirs = files(tmp_path / "run"), files(waited_for.run_dir)
    assert len(theirs) == 6
    assert ours.keys() == theirs.keys()
    for name, content in theirs.items():
        assert ours[name] == content, name
    told = [r for r in records(tmp_path / "run") if r.get("event") == "checkpoint"]
    assert [(r["step"], r["payload"]["folder"]) for r in told] == [(n, f"step_{n:08d}") for n in (10, 20, 30)]


def test_a_signal_waits_for_what_is_in_writing_and_saves_what_came_after(
    waited_for: RunResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The write of step 10 hangs until the signal has come; both states are on the disk in the end."""
    slow = threading.Event()
    inside = tensor_file.write_tensors

    def late(file: BinaryIO, tensors: dict[str, torch.Tensor]) -> Any:
        slow.wait(60)
        return inside(file, tensors)

    class Signalled(Planted):
        def __next__(self) -> ActivationBatch:
            if self.index == self.stop_at:
                threading.Timer(0.2, slow.set).start()
            return super().__next__()

    monkeypatch.setattr("transcoder.training.checkpoint.write_tensors", late)
    stopped = train_transcoder(config(checkpoint__keep_last=9), tmp_path / "run", batches=Signalled(stop_at=4 + 15))
    assert stopped.interrupted_by == "SIGTERM"
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == [
        "step_00000010",
        f"step_{stopped.step:08d}",
    ]
    first = "checkpoints/step_00000010/transcoder.safetensors"
    assert files(tmp_path / "run")[first] == files(waited_for.run_dir)[first]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_write_that_fails_costs_one_checkpoint(waited_for: RunResult, tmp_path: Path, asynchronous: bool) -> None:
    """A file stands in the place of the folder of checkpoints while step 10's is due."""
    folder = tmp_path / "run" / "checkpoints"

    class Blocked(Planted):
        def __next__(self) -> ActivationBatch:
            if self.index == 4 + 5:
                folder.write_text("in the way")
            if self.index == 4 + 18:
                folder.unlink()
            return super().__next__()

    settings = config(checkpoint__asynchronous=asynchronous, checkpoint__keep_last=9)
    assert train_transcoder(settings, tmp_path / "run", batches=Blocked()).finished
    events = [
        (r["event"], r["step"]) for r in records(tmp_path / "run") if r.get("event", "").startswith("checkpoint_f")
    ]
    assert events == [("checkpoint_failed", 10)]
    theirs = files(waited_for.run_dir)
    ours = files(tmp_path / "run")
    assert sorted({name.split("/")[1] for name in ours}) == ["step_00000020", "step_00000030"]
    assert all(content == theirs[name] for name, content in ours.items())


def test_a_write_that_never_ends_is_given_up_and_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a network disk that is gone: the run goes on, and does not end as if its state were safe."""
    never = threading.Event()
    inside = tensor_file.write_tensors

    def hang(file: BinaryIO, tensors: dict[str, torch.Tensor]) -> Any:
        never.wait(60)
        return inside(file, tensors)

    monkeypatch.setattr("transcoder.training.checkpoint.write_tensors", hang)
    monkeypatch.setattr(checkpointing, "FLUSH_SECONDS", 0.1)
    with pytest.raises(CheckpointError, match=r"in writing for 0\.1 s: the state of step 30 cannot be written"):
        train_transcoder(config(), tmp_path / "run", batches=Planted())
    never.set()
    (thread,) = [t for t in threading.enumerate() if t.name == "transcoder-checkpoint"]
    thread.join(60)
    assert find_checkpoint(tmp_path / "run").name == "step_00000010"


INTERRUPTED = """
import signal, sys, threading, time
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell runs the tests behind itself
from planted_run import Planted, checkpoint, config
from transcoder.training import train_transcoder

def hang(file, tensors):
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    while signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        time.sleep(0.01)
    # The first is noted, and obeyed by waiting for this write. The second comes meanwhile.
    time.sleep(0.5)
    signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
    time.sleep(1000)

checkpoint.write_tensors = hang
train_transcoder(config(training__steps=100_000, checkpoint__every=10), Path(sys.argv[1]), batches=Planted())
"""


def test_a_second_interrupt_ends_a_run_whose_write_hangs(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, str(tmp_path / "run")],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == -signal.SIGINT, run.stderr
    assert run.stderr.rstrip().endswith("KeyboardInterrupt")
    assert "the checkpoint of step 10 was still being written" in run.stderr


def test_a_copy_does_not_follow_what_it_was_taken_of(device: torch.device) -> None:
    snapshots = Snapshots()
    base = torch.arange(64, dtype=torch.float32, device=device)
    state = {
        "a": base,
        "strided": base.view(8, 8).T,
        "list": [base[:3].bfloat16(), {"n": 1}],
        "none": None,
        "empty": base[:0],
        "scalar": base[5],
        7: (base > 3,),
    }
    copy, wait = snapshots.take(state)
    expected = base.clone()
    base.fill_(-1)
    state["list"][1]["n"] = 2
    wait()
    assert all(t.device.type == "cpu" for t in (copy["a"], copy["strided"], copy["list"][0], copy[7][0]))
    assert torch.equal(copy["a"], expected.cpu())
    assert torch.equal(copy["strided"], expected.view(8, 8).T.cpu())
    assert torch.equal(copy["list"][0], expected[:3].bfloat16().cpu())
    assert torch.equal(copy[7][0], (expected > 3).cpu())
    assert (copy["list"][1], copy["none"], float(copy["scalar"])) == ({"n": 1}, None, 5.0)
    assert copy["empty"].numel() == 0
    held, place = snapshots.bytes, copy["a"].data_ptr()
    again, wait = snapshots.take(state)
    wait()
    assert (again["a"].data_ptr(), snapshots.bytes) == (place, held), "the same memory again"
    snapshots.take({"a": base[:10]})
    assert snapshots.bytes == held, "a smaller state takes no more"


def test_an_error_that_is_no_refusal_of_the_disk_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(file: BinaryIO, tensors: dict[str, torch.Tensor]) -> Any:
        raise TypeError("no such dtype")

    monkeypatch.setattr("transcoder.training.checkpoint.write_tensors", broken)
    with pytest.raises(TypeError, match="no such dtype"):
        train_transcoder(config(), tmp_path / "run", batches=Planted())
