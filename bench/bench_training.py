from __future__ import annotations

from dataclasses import asdict

import pytest
import torch

from bench.monitoring_overhead import KINDS, PERIOD, RARE, compared, runs, seconds_of

LARGEST = 2048
"""Latents of a size whose rounds take seconds."""


def bench_training(size, benchmark, record_row, pytestconfig):  # type: ignore[no-untyped-def]
    """Steps of the trainer itself, batches and logs included, with the anti-duplication parts on and off. For a file that is
    kept, a warm-up of one round, then as many as hold the rarest work once; else two rounds of two kinds, at a size where that
    takes seconds. Whole turns of the rarest work are `python -m bench.overhead`."""
    kept = bool(pytestconfig.option.bench_json)
    if not kept and size.d_sae > LARGEST:
        pytest.skip(f"takes minutes above {LARGEST} latents: with --bench-json, or python -m bench.overhead")
    kinds = KINDS if kept else {kind: KINDS[kind] for kind in ("off", "all")}
    # The ledger is verified at the end of a run, which these runs do not reach.
    with runs(size, kinds, {"antidup.verify_at_step": 10_000}) as opened:
        for run in opened.values():
            seconds_of(run, PERIOD)
        rounds = RARE // PERIOD if kept else 2
        taken: dict[str, list[float]] = {kind: [] for kind in opened}

        def others() -> None:
            for kind, run in list(opened.items())[1:]:
                taken[kind].append(seconds_of(run, PERIOD))

        first = next(iter(opened))
        benchmark.pedantic(
            lambda: taken[first].append(seconds_of(opened[first], PERIOD)), setup=others, rounds=rounds, iterations=1
        )
        for run in opened.values():
            largest = float(torch.stack([p.detach().abs().max() for p in run.layers[0].transcoder.parameters()]).max())
            assert largest < 1e3, "a run that diverged is no measure"
    record_row(
        {
            "operation": "training",
            "size": asdict(size),
            "rounds": rounds,
            "steps_per_round": PERIOD,
            "kinds": compared(taken, PERIOD, size.rows),
        }
    )
