from __future__ import annotations

from dataclasses import asdict

import torch

from bench.monitoring_overhead import KINDS, PERIOD, RARE, compared, runs, seconds_of

SECONDS = 30.0
"""Of rounds whose measurements are not kept."""


def bench_training(size, benchmark, record_row, pytestconfig):  # type: ignore[no-untyped-def]
    """Steps of the trainer itself, batches and logs included, with the anti-duplication parts on and off. A warm-up of one
    round, then as many as hold everything once."""
    # The ledger is verified at the end of a run, which these runs do not reach.
    with runs(size, KINDS, {"antidup.verify_at_step": 10_000}) as opened:
        warm_up = sum(seconds_of(run, PERIOD) for run in opened.values())
        # As many periods as the rarest work needs, which at the larger size takes minutes: for a file that is kept. Whole turns
        # of it are `python -m bench.overhead`.
        needed = RARE // PERIOD
        rounds = needed if pytestconfig.option.bench_json else max(2, min(needed, int(SECONDS / warm_up)))
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
