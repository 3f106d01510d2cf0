"""Planted activations and the small config of the tests that train whole runs."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from transcoder.activations import ActivationBatch
from transcoder.config import RunConfig
from transcoder.training import RunResult

D_IN, D_OUT, SEQUENCE = 12, 10, 16


class Planted:
    """Endless resumable batches: sparse nonnegative factors -> source, a nonlinear target, tokens with contexts."""

    def __init__(self, rows: int = 64, stop_at: int | None = None) -> None:
        self.rows, self.stop_at, self.index = rows, stop_at, 0

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        if self.index == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        g = torch.Generator().manual_seed(1000 + self.index)
        fixed = torch.Generator().manual_seed(1)
        into, out = torch.randn(40, D_IN, generator=fixed), torch.randn(40, D_OUT, generator=fixed)
        factors = torch.rand(self.rows, 40, generator=g) * (torch.rand(self.rows, 40, generator=g) < 0.08)
        tokens = torch.randint(0, 50, (self.rows,), generator=g)
        first = self.index * self.rows + torch.arange(self.rows)
        x = factors @ into
        self.index += 1
        return ActivationBatch(
            source=x,
            target=factors.square() @ out + 0.3,
            tokens=tokens,
            positions=first % SEQUENCE,
            sequences=first // SEQUENCE,
            contexts=torch.randint(0, 50, (self.rows, 6), generator=g, dtype=torch.int32),
            context_anchor=4,
        )

    def state_dict(self) -> dict[str, Any]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.index = state["index"]


def config(**overrides: Any) -> RunConfig:
    base: dict[str, Any] = {
        "name": "planted",
        "model.device": "cpu",
        "transcoder.d_sae": 64,
        "transcoder.k": 4,
        "transcoder.widths": [16, 64],
        "transcoder.normalization_tokens": 256,
        "transcoder.dead_after_tokens": 640,
        "training.steps": 30,
        "training.batch_size": 64,
        "training.lr": 3e-3,
        "training.warmup_steps": 5,
        "training.evaluation_tokens": 256,
        "training.dead_refresh_steps": 4,
        # A process of its own for every run would take longer than the runs: those that look at the page ask for it.
        "logging.report": False,
        "antidup.positions.enabled": False,
        "antidup.monitor.correlation_save_frequency": 8,
        "antidup.monitor.min_support": 10,
        "antidup.monitor.min_sequences": 2,
        "antidup.samples.collect_every": 3,
        "antidup.samples.save_frequency": 10,
        "antidup.samples.context_tokens": 6,
        "antidup.regularizer.orthogonality_every": 2,
        "antidup.regularizer.orthogonality_chunk": 16,
        "antidup.verify_at_step": 20,
        "checkpoint.every": 10,
        "logging.every": 5,
        "logging.progress": False,
        **{key.replace("__", "."): value for key, value in overrides.items()},
    }
    return RunConfig().replace(base)


ALL_OFF = {f"antidup__{part}__enabled": False for part in ("regularizer", "positions", "monitor", "samples")}


def weights(result: RunResult) -> dict[str, torch.Tensor]:
    return dict(result.transcoder.state_dict())


def assert_same(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def records(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
