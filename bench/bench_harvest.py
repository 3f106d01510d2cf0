from __future__ import annotations

from bench import harvest


def bench_harvest(benchmark, record_row, pytestconfig):  # type: ignore[no-untyped-def]
    """The stream of the shipped model's activations against the bare model, on the same tokens."""
    tiny = pytestconfig.option.bench_size == "tiny"
    rounds = 1 if tiny else 3
    settings = {
        "activations.sequences_per_forward": 4 if tiny else 32,
        "activations.sequence_length": 32 if tiny else 128,
    }
    row = benchmark.pedantic(lambda: harvest.measured(settings, rounds), rounds=1, iterations=1)
    benchmark.extra_info["ratio to the bare model"] = row["kinds"]["the stream"]["ratio"]["total"]
    record_row(row)
