"""Cost of a checkpoint in the step that saves it, written within the step or asynchronously: `python bench/checkpoint_cost.py`.

One line of JSON a run: milliseconds that each save took, wall time and CPU time of the training thread (which hardly depends on
other work on the machine).
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from transcoder.activations import ActivationBatch
from transcoder.config import RunConfig
from transcoder.training import train_transcoder
from transcoder.training.observers import Checkpoints
from transcoder.training.trainer import Trainer

WIDTH, LATENTS, TOKENS, EVERY = 512, 8192, 64, 10
SAVES = 3


def batches() -> Iterator[ActivationBatch]:
    generator = torch.Generator().manual_seed(0)
    while True:
        x = torch.randn(TOKENS, WIDTH, generator=generator)
        ids = torch.arange(TOKENS)
        yield ActivationBatch(source=x, target=x.tanh(), tokens=ids, positions=ids)


def measure(asynchronous: bool, out: Path) -> dict[str, Any]:
    anti = {f"antidup.{part}.enabled": False for part in ("regularizer", "positions", "monitor", "samples")}
    settings = RunConfig().replace(
        {
            **anti,
            "model.device": "cpu",
            "transcoder.d_sae": LATENTS,
            "transcoder.normalization_tokens": TOKENS,
            "training.steps": EVERY * SAVES + 1,
            "training.batch_size": TOKENS,
            "training.evaluation_tokens": TOKENS,
            "checkpoint.every": EVERY,
            "checkpoint.asynchronous": asynchronous,
            "logging.every": 1000,
            "logging.progress": False,
        }
    )
    inside, took = Checkpoints.act, []

    def timed(checkpoints: Checkpoints, run: Trainer) -> None:
        clock, cpu = time.perf_counter(), time.thread_time()
        inside(checkpoints, run)
        took.append((1e3 * (time.perf_counter() - clock), 1e3 * (time.thread_time() - cpu)))

    Checkpoints.act = timed  # type: ignore[method-assign]
    try:
        train_transcoder(settings, out, batches=batches())
    finally:
        Checkpoints.act = inside  # type: ignore[method-assign]
    (newest, *_) = sorted((out / "checkpoints").iterdir(), reverse=True)
    return {
        "asynchronous": asynchronous,
        "megabytes": round(sum(f.stat().st_size for f in newest.iterdir()) / 1e6, 1),
        "clock_ms": [round(clock, 1) for clock, _ in took],
        "cpu_ms": [round(cpu, 1) for _, cpu in took],
    }


if __name__ == "__main__":
    logging.disable()
    with tempfile.TemporaryDirectory() as folder:
        for round_number in range(2):
            for asynchronous in (False, True):
                print(json.dumps(measure(asynchronous, Path(folder) / f"{round_number}{asynchronous}")), flush=True)
