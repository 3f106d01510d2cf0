"""python -m bench.whole_run [--steps 4882] [--json FILE]: the lost run's steps at its shape, with monitoring on and off.

On a CUDA GPU the shape is the lost run's own (d 2304, 18432 latents, k 48, batch 1024, bf16 products); on a CPU d, latents and
k are divided by SCALE, every ratio between them as it was. The trainer's own steps run, with its logs, reports and a checkpoint
every 500 steps; the activations are synthetic and made in advance, so this is the transcoder's part of a run, without the
language model's forward passes. The runs take their steps in turn, CHUNK at a time, so that a slow machine affects both. A
chunk ends where a checkpoint is due, so that each holds one, sample files and five reports; every second one holds a block's
close.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.cases import Size
from bench.monitoring_overhead import KINDS, RARE, runs, seconds_of
from bench.statistics import mean, whole_ratio

LOST = Size(1024, 2304, 18432, 48)
STEPS = 4882
SCALE = 16
CHUNK = RARE
SETTINGS: dict[str, Any] = {
    "training.lr": 3e-4,
    "training.warmup_steps": 200,
    "training.betas": [0.9, 0.99],
    "transcoder.aux_coefficient": 1 / 32,
    "checkpoint.keep_last": 1,
    "antidup.samples.collect_every": 25,
    "logging.every": 10,
}


def shape() -> Size:
    if machine.device().type == "cuda":
        return LOST
    return Size(LOST.rows, LOST.d // SCALE, LOST.d_sae // SCALE, LOST.k // SCALE)


def measure(size: Size, steps: int, chunk: int = CHUNK) -> dict[str, Any]:
    """The whole-run section of a result file."""
    cuda = machine.device().type == "cuda"
    settings = {
        **SETTINGS,
        # AuxK over 256 of 18432 latents, dead after 20 batches.
        "transcoder.aux_k": max(1, 256 * size.d_sae // LOST.d_sae),
        "transcoder.dead_after_tokens": 20 * size.rows,
        # The schedule of the lost run. Its last step is not taken: the end of a run (evaluation, its page) is not counted.
        "training.steps": steps + 1,
        "training.compute_dtype": "bfloat16" if cuda else "float32",
        # As in the preset for that model.
        "antidup.monitor.block_tokens": 1_000_000,
    }
    kinds = {"monitoring off": KINDS["off"], "monitoring on": KINDS["all"]}
    taken: dict[str, list[float]] = {kind: [] for kind in kinds}
    with runs(size, kinds, settings) as opened:
        done = 0
        while done < steps:
            now = min(chunk, steps - done)
            for kind, run in opened.items():
                taken[kind].append(seconds_of(run, now))
            done += now
            said = ", ".join(f"{kind} {sum(samples):.1f} s" for kind, samples in taken.items())
            print(f"whole run, step {done} of {steps}: {said}", flush=True)
    whole = max(1, steps // chunk)
    off = taken["monitoring off"]
    return {
        **results.about(),
        "size": asdict(size),
        "lost_run": asdict(LOST),
        "steps": steps,
        "chunk": chunk,
        "compute_dtype": settings["training.compute_dtype"],
        "kinds": {
            kind: {
                "seconds": sum(samples),
                "tokens_per_second": steps * size.rows / sum(samples),
                "seconds_per_step": mean([sample / min(chunk, steps) for sample in samples[:whole]]),
                # The total is that of all steps, the interval that of whole chunks.
                "ratio": {**whole_ratio(samples[:whole], off[:whole]), "total": sum(samples) / sum(off)},
            }
            for kind, samples in taken.items()
        },
    }


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.whole_run", description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--json", type=Path, help="write the section to this file")
    options = parser.parse_args(words)
    found = measure(shape(), options.steps)
    for kind, one in found["kinds"].items():
        print(
            f"{kind:<16}{found['steps']} steps in {one['seconds']:8.1f} s, {one['tokens_per_second']:10,.0f} tokens/s, "
            f"{one['ratio']['total']:.3f} [{one['ratio']['low']:.3f}, {one['ratio']['high']:.3f}] of off"
        )
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
