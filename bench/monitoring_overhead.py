"""The trainer with its anti-duplication parts on and off: the runs take their steps in turn.

Much of what these parts do is due every so many steps: reports every 100 (and with them the adding of waiting pairs), sample
files and checkpoints every 500. A round is therefore PERIOD steps of each run, from one report to the next, including the wait
for files written in the background; the result is the ratio of total times, over enough rounds that the rarest work has its
true rate.
"""

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
from bench.statistics import mean, whole_ratio
from transcoder.activations import ActivationBatch
from transcoder.config import RunConfig
from transcoder.training.profile import QUIET
from transcoder.training.train import opened_run

PARTS = ("regularizer", "positions", "monitor", "samples", "recycle")
KINDS: dict[str, tuple[str, ...]] = {
    "off": (),
    "monitor": ("monitor",),
    "monitor and samples": ("monitor", "samples"),
    "all": ("monitor", "samples", "regularizer"),
}
"""The first is what the others are compared with. Position sampling chooses tokens before they become batches: it does not
apply to ready batches."""


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
            **DUE,
            # The demo's blocks are for a run of 1200 steps. By default one closes every 4,000,000 tokens; here often enough to
            # be among the steps.
            "antidup.monitor.block_tokens": RARE * size.rows,
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


PERIOD = 100
"""Steps of a round: `antidup.monitor.correlation_save_frequency`."""
RARE = 500
"""Steps in which everything comes at least once: `antidup.samples.save_frequency`, `checkpoint.every`."""
DUE = {
    "antidup.monitor.correlation_save_frequency": PERIOD,
    "antidup.samples.save_frequency": RARE,
    "checkpoint.every": RARE,
    # The end of a run (evaluation, its page) is not among the steps.
    "training.steps": 10_000,
}
"""The default frequencies, set explicitly: rounds are built for them."""


def seconds_of(run: Any, steps: int) -> float:
    """Seconds of `steps` steps and all work that is due between them, including the wait for the device and for files written
    in the background."""
    _wait()
    start = time.perf_counter()
    for _ in range(steps):
        run.advance()
    _wait()
    run.saver.flush()
    return time.perf_counter() - start


def compared(taken: Mapping[str, Sequence[float]], steps: int, rows: int) -> dict[str, dict[str, Any]]:
    """{kind: its statistics}, from its seconds in each round of `steps` steps, the same rounds for all."""
    base = next(iter(taken.values()))
    return {
        kind: {
            "seconds": sum(samples),
            "seconds_per_step": mean([sample / steps for sample in samples]),
            "tokens_per_second": rows * steps * len(samples) / sum(samples),
            "ratio": whole_ratio(samples, base),
        }
        for kind, samples in taken.items()
    }


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
