"""A run on the shipped language model, really killed, goes on to the same bits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

STEPS = 36
SETTINGS = {
    "transcoder.d_sae": 256,
    "transcoder.k": 8,
    "transcoder.widths": "[64, 256]",
    "transcoder.normalization_tokens": 2048,
    "transcoder.dead_after_tokens": 4096,
    "training.steps": STEPS,
    "training.batch_size": 256,
    "training.warmup_steps": 5,
    "training.evaluation_every": 16,
    "training.evaluation_tokens": 1024,
    "activations.buffer_tokens": 2048,
    "activations.sequences_per_forward": 8,
    "antidup.monitor.correlation_save_frequency": 10,
    "antidup.samples.collect_every": 5,
    "antidup.verify_at_step": 12,
    "checkpoint.every": 6,
    "logging.every": 2,
    "logging.progress": "false",
}


def start(out: Path, *more: str) -> subprocess.Popen[str]:
    flags = [f"--{name}={value}" for name, value in SETTINGS.items()]
    # One thread: the machine is shared with other tests, and the bits must not depend on that.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    return subprocess.Popen(
        [sys.executable, "-m", "transcoder", "train", "demo", "--out", str(out), *flags, *more],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(process: subprocess.Popen[str]) -> int:
    output, _ = process.communicate(timeout=240)
    print(output)
    return process.returncode


def last_step(out: Path) -> int:
    try:
        lines = (out / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return -1
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=-1)


def wait_for_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while last_step(out) < step:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def outcome(out: Path) -> dict[str, bytes]:
    folder = out / "checkpoints" / f"step_{STEPS:08d}"
    return {
        "weights": (folder / "transcoder.safetensors").read_bytes(),
        "state": (folder / "trainer.safetensors").read_bytes(),
        "report": (out / "anti_duplication_logs" / f"correlation_step_{STEPS:08d}.json").read_bytes(),
    }


@pytest.mark.slow
def test_killed_and_terminated_runs_resume_to_the_bits_of_the_undisturbed_one(tmp_path: Path) -> None:
    whole = start(tmp_path / "whole")
    disturbed = tmp_path / "disturbed"

    first = start(disturbed)
    wait_for_step(first, disturbed, 8)
    first.send_signal(signal.SIGKILL)
    assert finish(first) == -signal.SIGKILL

    second = start(disturbed, "--resume")
    wait_for_step(second, disturbed, 20)
    second.send_signal(signal.SIGTERM)
    assert finish(second) == 75

    third = start(disturbed, "--resume")
    assert finish(third) == 0
    assert finish(whole) == 0

    ours, theirs = outcome(disturbed), outcome(tmp_path / "whole")
    for name in theirs:
        assert ours[name] == theirs[name], f"{name} differs"
    steps = [json.loads(line) for line in (disturbed / "metrics.jsonl").read_text().splitlines()]
    logged = [r["step"] for r in steps if "losses/overall_loss" in r]
    assert logged == list(range(2, STEPS + 1, 2))
