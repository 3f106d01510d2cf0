"""The native check must pass on what is right and see what is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from transcoder.kernels.encode import torch_backend
from transcoder.kernels.sparse_codes import SparseCodes

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(gpu_check: ModuleType) -> dict[str, str | None]:
    return dict(gpu_check.checks(torch.device("cpu"), gpu_check.SMALL, seed=3))


def test_every_op_passes_in_every_dtype(gpu_check: ModuleType) -> None:
    found = run(gpu_check)
    assert len(found) >= 30
    assert sum(name.startswith("compiled step") for name in found) >= 2
    assert {name: problem for name, problem in found.items() if problem is not None} == {}


def test_a_left_out_winner_and_a_wrong_gradient_are_seen(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSCODER_BACKEND", "torch")
    right = torch_backend._topk_ids

    def second_best(activations: torch.Tensor, k: int) -> torch.Tensor:
        return right(activations, min(k + 1, activations.shape[1]))[:, -k:]

    monkeypatch.setattr(torch_backend, "_topk_ids", second_best)
    original = torch_backend.gradients

    def no_bias_gradient(
        grad: torch.Tensor, x: torch.Tensor, W: torch.Tensor, codes: SparseCodes, needs: tuple
    ) -> tuple:
        grad_x, grad_W, grad_b = original(grad, x, W, codes, needs)
        return grad_x, grad_W, torch.zeros_like(grad_b)

    monkeypatch.setattr(torch_backend, "gradients", no_bias_gradient)
    found = {name: problem for name, problem in run(gpu_check).items() if " torch " in name}
    # Wrong alike in both modes: that is not for this check to see.
    assert found["compiled step torch topk"] is None
    topk = [problem or "" for name, problem in found.items() if name.startswith("topk_encode")]
    assert sum("left out" in problem for problem in topk) >= 3
    threshold = [problem or "" for name, problem in found.items() if name.startswith("threshold_encode")]
    assert sum("db_enc" in problem for problem in threshold) >= 3


def test_a_compiled_step_that_differs_is_seen(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    right = torch_backend.gradients

    def other_the_second_time(*arguments: object) -> tuple:
        nonlocal calls
        calls += 1
        grad_x, grad_W, grad_b = right(*arguments)
        return grad_x, grad_W, grad_b if calls == 1 else grad_b + 1

    monkeypatch.setattr(torch_backend, "gradients", other_the_second_time)
    check = lambda: gpu_check.check_compiled(torch.device("cpu"), "topk", 0)  # noqa: E731
    assert "compiled gradients: result 1 differs" in gpu_check.outcome("torch", check)


def test_times_of_a_step_are_told_and_kept(gpu_check: ModuleType) -> None:
    """Of the eager step: a graph needs a GPU."""
    words = (
        "import torch; from bench import gpu_check as g; g.tell_times(torch.device('cpu'), {'B 8': (8, 16, 64, 4)}, 0)"
    )
    found = gpu_check.run_part([sys.executable, "-c", words], 120.0)
    assert gpu_check.green({"graph": found}), found
    assert set(found["measured"]) == {"topk B 8", "batch_topk B 8"}
    for times in found["measured"].values():
        assert 0 < times["eager host ms"] <= times["eager step ms"]


def program(*checks: str, then: str = "") -> list[str]:
    """A part that says its checks, then does something else."""
    lines = [json.dumps({"check": name, "problem": None, "seconds": 0.1}) for name in checks]
    return [sys.executable, "-c", "\n".join([*(f"print({line!r}, flush=True)" for line in lines), then])]


ENDED = """print('{"ended": true}')"""


@pytest.mark.parametrize(
    ("then", "how"),
    [
        ("import time; time.sleep(60)", "stopped after 3 s, after second"),
        ("import os; os.abort()", "exit -6, after second"),
        ("", "exit 0, after second"),
        (ENDED, None),
    ],
    ids=["hangs", "crashes", "leaves", "ends"],
)
def test_a_part_keeps_what_it_said_and_how_it_ended(gpu_check: ModuleType, then: str, how: str | None) -> None:
    found = gpu_check.run_part(program("first", "second", then=then), 3.0 if how and "stopped" in how else 60.0)
    assert (found["passed"], found["failed"], found.get("unfinished")) == (2, {}, how)
    assert gpu_check.green({"part": found}) == (how is None)


def test_a_process_that_is_asked_to_end_may_write_first(gpu_check: ModuleType, tmp_path: Path) -> None:
    words = "import time, sys\nprint('.', flush=True)\ntry: time.sleep(60)\nexcept KeyboardInterrupt: open(sys.argv[1], 'w')"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a shell starts what runs behind it
    try:
        gpu_check.hear_interrupts()
        process = subprocess.Popen(
            [sys.executable, "-c", words, str(tmp_path / "rows")], stdout=subprocess.PIPE, start_new_session=True
        )
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout is not None
    assert process.stdout.read(1) == b"."
    assert not gpu_check.ended(process, 0.5, signal.SIGINT)
    assert (tmp_path / "rows").exists()


def test_each_part_is_on_the_disk_before_the_next_has_ended(gpu_check: ModuleType, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    looks = f"""
import pathlib, time
file = pathlib.Path({str(out)!r})
while not (file.exists() and '"first"' in file.read_text()):
    time.sleep(0.05)
{ENDED}
"""
    arguments = argparse.Namespace(minutes=1.0, out=out, seed=0, only=["checks"], quick=True)
    check = gpu_check.Check(torch.device("cpu"), arguments)
    check.run("checks", {"first": program("one", then=ENDED), "second": program("two", then=looks)})
    assert gpu_check.green(check.found["checks"])
    # Another stage keeps them: the code and the versions are the same.
    arguments.only = ["checker"]
    later = gpu_check.Check(torch.device("cpu"), arguments)
    later.checker()
    kept = json.loads(out.read_text())
    assert set(kept["checks"]) == {"first", "second"}
    assert kept["checker"] == {"skipped": "no GPU"}


def test_a_part_tells_each_check(gpu_check: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_check.tell("torch decode", torch.device("cpu"), gpu_check.SMALL[:1], 0)
    *checks, last = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [c["check"].split()[:2] for c in checks] == [["decode", "torch"]] * 3
    assert last == {"ended": True}


def test_without_pytest_the_benchmarks_fail_loudly(
    gpu_check: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_check, "have_pytest", lambda: False)
    monkeypatch.setattr(gpu_check, "hear_interrupts", lambda: None)
    monkeypatch.setattr(sys, "argv", ["gpu_check", "--only", "benchmarks", "--out", str(tmp_path / "out.json")])
    assert gpu_check.main() == 1
    said = capsys.readouterr().out
    assert said.count(gpu_check.NO_PYTEST) == 2, "at the start and at the end"
    assert json.loads((tmp_path / "out.json").read_text())["benchmarks"] == {"ended": gpu_check.NO_PYTEST}
