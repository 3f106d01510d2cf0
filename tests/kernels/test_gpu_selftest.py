"""`auto` trusts a GPU's kernels only after a process of its own saw them run right; every other end leaves torch in place.

There is no GPU here: the good verdict comes from Triton's interpreter, the bad ones from real failures of the child."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transcoder.kernels import CorrelatedPairs, FeatureCorrelation, active_backend, backend, gpu_selftest
from transcoder.kernels.adam.op import AdamUpdate
from transcoder.kernels.adam.reference import AdamStep
from transcoder.kernels.decode import torch_backend
from transcoder.kernels.gpu_selftest import Verdict

CPU = torch.device("cpu")
check_again = gpu_selftest.proof.__wrapped__  # type: ignore[attr-defined]
"""As in a new process: without what this one remembers."""

GOOD = """
import os, tempfile
os.environ |= {"TRANSCODER_CACHE": tempfile.mkdtemp(), "TRANSCODER_BUILD": "0"}
import torch
from transcoder.kernels import active_backend, gpu_selftest
first = gpu_selftest.proof("correlation", torch.device("cpu"), small=True)
assert first.good and first.passed == 4, first
before = os.stat(first.file).st_mtime_ns
assert gpu_selftest.proof.__wrapped__("correlation", torch.device("cpu"), small=True) == first
assert os.stat(first.file).st_mtime_ns == before, "checked again"
assert active_backend("cuda") == "torch", "the interpreter is no GPU"
print("GOOD AND KEPT")
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSCODER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TRANSCODER_BUILD", "0")  # in a cache of its own the C++ would be compiled anew
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.command("-c", GOOD, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
def test_a_good_verdict_of_the_real_kernels_is_kept(finished_command: subprocess.CompletedProcess[str]) -> None:
    assert finished_command.returncode == 0, finished_command.stdout
    assert "GOOD AND KEPT" in finished_command.stdout
    assert finished_command.stdout.count("checking the Triton kernels of correlation natively on cpu") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="the child would have kernels to run")
def test_kernels_that_cannot_run_are_no_proof(capfd: pytest.CaptureFixture[str]) -> None:
    verdict = check_again("decode", CPU, small=True)
    assert not verdict.good
    assert verdict.passed == 0
    assert "requested by name but is not available" in verdict.problem
    assert "backend auto does not use Triton: decode on cpu: failed" in capfd.readouterr().err

    assert check_again("decode", CPU, small=True) == verdict
    assert "checking" not in capfd.readouterr().err, "a bad verdict is remembered"
    long_ago = os.stat(verdict.file).st_mtime - gpu_selftest.RETRY_AFTER - 1
    os.utime(verdict.file, (long_ago, long_ago))
    check_again("decode", CPU, small=True)
    assert "checking" in capfd.readouterr().err, "but not for ever"


def test_a_child_that_crashes_or_hangs_is_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text("import os\nos.abort()\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    crashed = check_again("encode", CPU)
    assert not crashed.good
    assert "ended with -6 after its start" in crashed.problem
    (site / "sitecustomize.py").write_text("import time\ntime.sleep(60)\n")
    hung = check_again("correlation", CPU, seconds=0.5)
    assert hung.problem == "not ended after 0 s"
    assert hung.seconds < 30


def test_what_a_killed_check_leaves_running_holds_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    words = "import subprocess, time\nsubprocess.Popen(['sleep', '25'])\ntime.sleep(60)\n"
    (site / "sitecustomize.py").write_text(words)
    monkeypatch.setenv("PYTHONPATH", str(site))
    monkeypatch.setattr(gpu_selftest, "GRACE", 0.5)
    left = check_again("correlation", CPU, seconds=2.0)
    assert left.problem == "not ended after 2 s"
    assert left.seconds < 20


@pytest.mark.parametrize(
    "said", ["CUDA error: out of memory", "CUDA error: all CUDA-capable devices are busy or unavailable"]
)
def test_a_gpu_that_others_fill_is_not_remembered(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = tmp_path / "site"
    site.mkdir()
    advice = "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."
    words = f"torch.AcceleratorError: {said}\\nCUDA kernel errors might be reported later.\\n{advice}\\n"
    (site / "sitecustomize.py").write_text(f"import os\nos.write(2, b'{words}')\nos._exit(1)\n")
    monkeypatch.setenv("PYTHONPATH", str(site))
    verdict = check_again("encode", CPU)
    assert not verdict.good
    assert verdict.problem.endswith(said)
    assert not Path(verdict.file).exists()


@pytest.mark.parametrize("torn", ["", "{", "[]", '{"family": "encode"}', "null"])
def test_a_torn_verdict_is_checked_again(tmp_path: Path, torn: str) -> None:
    file = tmp_path / "verdict.json"
    file.write_text(torn)
    assert gpu_selftest._read(file) is None
    verdict = Verdict("encode", "a chip", 3, None, 1.0, str(file))
    gpu_selftest._write(file, verdict)
    assert gpu_selftest._read(file) == verdict


def test_without_a_place_for_it_nothing_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRANSCODER_CACHE", str(tmp_path / "file"))
    assert "cannot write a verdict" in check_again("encode", CPU).problem


def test_no_check_passed_is_no_proof() -> None:
    assert not Verdict("encode", "a chip", 0, None, 1.0).good


@pytest.mark.parametrize("good", [True, False])
def test_auto_follows_the_verdict(good: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = Verdict("decode", "a chip", 5, None if good else "decode: off by 1", 1.0)
    monkeypatch.setattr(gpu_selftest, "proof", lambda family, device: verdict)
    monkeypatch.setattr(backend, "has_backend", lambda name, family: name in ("triton", "torch"))
    monkeypatch.delenv("TRANSCODER_BACKEND", raising=False)
    assert active_backend(torch.device("cuda", 0), "decode") == ("triton" if good else "torch")


def test_a_wrong_kernel_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each family has a check that fails when its result is slightly wrong."""
    right = torch_backend.decode
    monkeypatch.setattr(torch_backend, "decode", lambda *given: right(*given) * (1 + 1e-3))
    found = dict(gpu_selftest.op_checks("torch", CPU, gpu_selftest.SMALL[1:], 0, ("decode",)))
    assert any("y_hat: off by" in (problem or "") for problem in found.values()), found

    pairs = FeatureCorrelation.pairs

    def one_short(self: FeatureCorrelation, *given: float) -> CorrelatedPairs:
        found = pairs(self, *given)
        return CorrelatedPairs(**{field.name: getattr(found, field.name)[1:] for field in dataclasses.fields(found)})

    monkeypatch.setattr(FeatureCorrelation, "pairs", one_short)
    found = dict(gpu_selftest.op_checks("torch", CPU, gpu_selftest.SMALL[1:], 0, ("correlation",)))
    assert all("is missing" in (problem or "") for problem in found.values()), found


@pytest.mark.parametrize("which", [1, 2])
def test_a_small_wrong_moment_of_the_step_is_seen(which: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Moments of a wide matrix are far below 1, and each step of the check starts from the op's own."""
    exact = gpu_selftest.adam_step_reference

    def inexact(*given: Any, **by: Any) -> AdamStep:
        found = exact(*given, **by)
        return found._replace(**{AdamStep._fields[which]: [1.001 * t for t in found[which]]})

    def step(module: Any, update: AdamUpdate) -> Tensor:
        ps, first, second = update.parameters, update.exp_avgs, update.exp_avg_sqs
        by = {name: getattr(update, name) for name in ("unit_rows", "lr", "betas", "eps", "max_norm")}
        found = exact(ps, update.gradients, first, second, 1, **by)
        for mine, new in zip((ps, first, second), found[:3], strict=True):
            for a, b in zip(mine, new, strict=True):
                a.copy_(b)
        return found.norm

    monkeypatch.setattr(gpu_selftest, "one_op_for", lambda parameters: "a module")
    monkeypatch.setattr(gpu_selftest, "adam_step", step)
    monkeypatch.setattr(gpu_selftest, "adam_step_reference", inexact)
    with pytest.raises(gpu_selftest.Mismatch, match=AdamStep._fields[which]):
        gpu_selftest.check_step([torch.full((3000, 2), 0.5)] * 3)


def test_the_child_says_what_it_found_line_by_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "transcoder.kernels.gpu_selftest", "correlation", "cpu", "small"],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "TRANSCODER_BACKEND": "triton"},
    )
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 5
