from __future__ import annotations

from dataclasses import asdict

import torch

from bench.monitoring_overhead import KINDS, PERIOD, RARE, compared, runs, seconds_of


def bench_training(size, benchmark, record_row):  # type: ignore[no-untyped-def]
    """Steps of the trainer itself, batches and logs included, with the anti-duplication parts on and off. A warm-up of one
    round, then as many as hold everything once."""
    # The ledger is verified at the end of a run, which these runs do not reach.
    with runs(size, KINDS, {"antidup.verify_at_step": 10_000}) as opened:
        for run in opened.values():
            seconds_of(run, PERIOD)
        # As many periods as the rarest work needs: at the larger size that takes minutes.
        rounds = RARE // PERIOD
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
