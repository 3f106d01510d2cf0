"""A run in two processes: a signal to one, a resume in one process, and the weights of a run that was never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

SETTINGS = {
    "model": {"name": "demo"},
    "activations": {
        "source_hook": "blocks.2.hook_resid_mid",
        "target_hook": "blocks.2.hook_mlp_out",
        "dataset": "stdlib",
        "sequence_length": 64,
        "buffer_tokens": 2048,
        "mask_norm_multiple": 10,
        "sequences_per_forward": 8,
    },
    "transcoder": {
        "d_sae": 256,
        "k": 8,
        "activation": "batch_topk",
        "widths": [64, 256],
        "dead_after_tokens": 1500,
        "normalization_tokens": 1024,
    },
    "training": {
        "steps": 24,
        "batch_size": 128,
        "lr": 2.0e-3,
        "warmup_steps": 5,
        "evaluation_tokens": 512,
        "evaluation_ce_tokens": 0,
        "dead_refresh_steps": 5,
    },
    "antidup": {
        "regularizer": {"enabled": True},
        "monitor": {"enabled": True, "block_tokens": 256, "correlation_save_frequency": 8},
        "samples": {"enabled": True, "collect_every": 4},
        "verify_at_step": 8,
    },
    "checkpoint": {"every": 8},
    "logging": {"report": False, "report_tokens": 0, "progress": False},
    "parallel": {"streams": 4},
}
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def command(config: Path, out: Path, processes: int, *more: str) -> list[str]:
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), "-m"]
    words = ["-m", *(torchrun if processes > 1 else []), "transcoder", "train", str(config), "--out", str(out), *more]
    return [sys.executable, *words]


def process_of_rank(torchrun: int, rank: int) -> int:
    for pid in Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text(encoding="utf-8").split():
        if f"RANK={rank}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
            return int(pid)
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds a process by /proc")
def test_a_signal_to_one_process_and_a_resume_in_one_keep_the_batches_and_the_weights(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(SETTINGS), encoding="utf-8")
    stopped, whole = tmp_path / "stopped", tmp_path / "whole"
    with subprocess.Popen(
        command(config, stopped, 2), env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as run:
        while not (stopped / "checkpoints" / "step_00000008" / "state.json").exists():
            assert run.poll() is None, run.stdout and run.stdout.read()[-4000:]
            time.sleep(0.02)
        os.kill(process_of_rank(run.pid, 1), signal.SIGTERM)
        said, _ = run.communicate(timeout=240)
    assert run.returncode == 1, said
    assert said.count("stopped by SIGTERM after step") == 1, said
    for out, more in ((stopped, ["--resume"]), (whole, [])):
        done = subprocess.run(
            command(config, out, 1, *more), env=ENVIRONMENT, capture_output=True, text=True, timeout=240
        )
        assert done.returncode == 0, done.stderr[-4000:]
    found, expected = (
        [load_file(run / "checkpoints" / "step_00000024" / f"{name}.safetensors") for name in ("transcoder", "trainer")]
        for run in (stopped, whole)
    )
    for part, wanted_part in zip(found, expected, strict=True):
        assert part.keys() == wanted_part.keys()
    for name, value in expected[0].items():
        wanted = value.double()
        assert (found[0][name].double() - wanted).abs().max() <= 1e-5 * wanted.abs().max().clamp_min(1), name
    for name, value in expected[1].items():
        # The rows that wait are those of the same tokens; what was counted is exact.
        if name.startswith("source/") or not value.is_floating_point():
            assert torch.equal(found[1][name], value), name
