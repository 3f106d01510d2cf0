"""The trainer itself with its anti-duplication parts on and off: runs side by side, their steps taken in turn."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from bench import machine, synthetic
from bench.cases import Size
from transcoder.activations import ActivationBatch
from transcoder.config import RunConfig
from transcoder.training.profile import QUIET, opened_run

PARTS = ("regularizer", "positions", "monitor", "samples", "recycle")
KINDS: dict[str, tuple[str, ...]] = {
    "off": (),
    "monitor": ("monitor",),
    "monitor and samples": ("monitor", "samples"),
    "all": ("monitor", "samples", "regularizer"),
}
"""Position sampling chooses tokens before they become batches: with batches that are there already it has no place."""


def config(size: Size, parts: Sequence[str], settings: Mapping[str, Any]) -> RunConfig:
    return RunConfig.load(
        "demo",
        {
            "name": "bench",
            "transcoder.d_sae": size.d_sae,
            "transcoder.k": size.k,
            "transcoder.widths": size.prefixes,
            "transcoder.dead_after_tokens": 10_000_000,
            "training.batch_size": size.rows,
            "training.evaluation_every": 0,
            "training.evaluation_tokens": 4096,
            **{f"antidup.{part}.enabled": part in parts for part in PARTS},
            **QUIET,
            **settings,
        },
    )


@contextmanager
def runs(
    size: Size,
    kinds: Mapping[str, Sequence[str]],
    settings: Mapping[str, Any],
    made: list[ActivationBatch] | None = None,
) -> Iterator[dict[str, Any]]:
    """{kind: a run of the trainer}, all on the same batches, each in a folder that is deleted at the end."""
    device = machine.device()
    made = synthetic.batches(size.rows, size.d, 2 * size.d, device) if made is None else made
    heldout = synthetic.batches(4096, size.d, 2 * size.d, device, count=1, seed=1)
    with tempfile.TemporaryDirectory(prefix="transcoder-bench-") as folder, ExitStack() as stack:
        yield {
            kind: stack.enter_context(
                opened_run(config(size, parts, settings), Path(folder) / str(number), synthetic.endless(made), heldout)
            )
            for number, (kind, parts) in enumerate(kinds.items())
        }


def seconds_of(run: Any, steps: int) -> float:
    """Seconds of `steps` steps and all that is due between them, what the device owes included."""
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        run.advance()
    _wait()
    return time.perf_counter() - start


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
