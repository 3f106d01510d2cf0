from __future__ import annotations

from dataclasses import asdict

import torch

from bench.monitored import KINDS, runs, seconds_of
from bench.race import ratios, summary

CHUNK = 10
"""Steps that are taken at a time: a log line and a share of what else is due is in each."""


def bench_training(size, benchmark, request, record_row):  # type: ignore[no-untyped-def]
    """Steps of the trainer itself, batches and logs included, with the anti-duplication parts on and off."""
    options = request.config.option
    chunks = max(3, int(4 * options.bench_seconds / (len(KINDS) * CHUNK * (0.03 if size.d_sae > 1000 else 0.01))))
    chunks = min(chunks, 12)
    # The report, due every 100 steps, falls into the chunks as it does into a run.
    with runs(size, KINDS, {"training.steps": 10_000, "antidup.verify_at_step": 10_000}) as opened:
        for run in opened.values():
            seconds_of(run, CHUNK)
        taken: dict[str, list[float]] = {kind: [] for kind in opened}

        def others() -> None:
            for kind, run in list(opened.items())[1:]:
                taken[kind].append(seconds_of(run, CHUNK))

        first = next(iter(opened))
        benchmark.pedantic(
            lambda: taken[first].append(seconds_of(opened[first], CHUNK)), setup=others, rounds=chunks, iterations=1
        )
        for run in opened.values():
            loss = float(torch.stack([p.detach().abs().max() for p in run.transcoder.parameters()]).max())
            assert loss < 1e3, "a run that diverged is no measure"
    found = {
        "operation": "training",
        "size": asdict(size),
        "steps": chunks * CHUNK,
        "kinds": {
            kind: {
                "seconds_per_step": {name: value / CHUNK for name, value in summary(samples).items()},
                "mean_seconds_per_step": sum(samples) / len(samples) / CHUNK,
                "tokens_per_second": size.rows * CHUNK * len(samples) / sum(samples),
                "ratio": ratios(samples, taken[first]),
            }
            for kind, samples in taken.items()
        },
    }
    record_row(found)
