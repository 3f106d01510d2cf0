"""One row of the results: a computation at one size, every variant of it checked and then timed in the same rounds, beside the
floor of this very machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench import machine, peers
from bench.cases import Case, Floor, dense_bytes
from bench.peers import ours
from bench.race import Race, Variant, ratios, rounds_for, summary, verify

COPY_BYTES = 256 << 20
"""Longest copy that is timed; a longer one is worked out from it."""
GEMM_COLUMNS = 32768
COPY, GEMM = "copy", "product"


def contestants(operation: str, case: Case, names: Sequence[str]) -> tuple[list[Variant], dict[str, str]]:
    """(ours first, then the peers; what was skipped and why). Raises WrongResultError where one computes something else."""
    needed, free = dense_bytes(case.size), machine.free_bytes()
    if needed < 0.7 * free:
        others, skipped = peers.variants(operation, case, names)
    else:
        why = f"dense codes need about {needed / 1e9:.0f} GB at {case.size}, {free / 1e9:.0f} GB are free"
        others, skipped = [], dict.fromkeys(names, why)
    found = [*ours.variants(operation, case), *others]
    expected = getattr(case, f"expect_{operation}", None)
    if expected is not None:
        truth = expected()
        for variant in found:
            verify(variant, truth)
    return found, skipped


def floor_variants(case: Case, floors: dict[str, Floor]) -> list[Variant]:
    """A copy that moves as many bytes as the longest direction must, and the encoder's product into memory that is there."""
    moved = min(max(f.bytes for f in floors.values()), COPY_BYTES)
    source, target = torch.empty(2, max(1, int(moved) // 8), device=case.device).zero_().unbind()
    W = case.W_enc[:GEMM_COLUMNS]
    there = case.pool[0] @ W.T
    return [
        Variant(COPY, lambda i: target.copy_(source)),
        Variant(GEMM, lambda i: torch.mm(case.pool[i], W.T, out=there)),
    ]


def floor_seconds(race: Race, case: Case, floors: dict[str, Floor]) -> dict[str, dict[str, Any]]:
    """{direction: bytes, operations, and the seconds this machine needs to copy so many bytes or do so many operations}."""
    copied = 8 * max(1, int(min(max(f.bytes for f in floors.values()), COPY_BYTES)) // 8)
    done = 2 * case.size.rows * case.size.d * min(case.size.d_sae, GEMM_COLUMNS)
    copy, product = (summary(race.seconds[name]["forward"])["median"] for name in (COPY, GEMM))
    return {
        direction: {
            **floor.to_dict(),
            "copy_seconds": copy * floor.bytes / copied,
            "product_seconds": product * floor.operations / done,
            "seconds": max(copy * floor.bytes / copied, product * floor.operations / done),
        }
        for direction, floor in floors.items()
    }


def rates(race: Race, case: Case, floors: dict[str, Floor]) -> dict[str, float]:
    """Bytes a second of the copy (read and written), operations a second of the product."""
    one = floor_seconds(race, case, {"_": Floor(1, 1), **floors})["_"]
    return {
        "copy_bytes_per_second": 1 / one["copy_seconds"],
        "product_operations_per_second": 1 / one["product_seconds"],
    }


def row(operation: str, case: Case, race: Race, floors: dict[str, Floor], memory: bool = True) -> dict[str, Any]:
    """What is written down of a race that was run. Ratios are to the first variant, taken round by round."""
    first = race.variants[0]
    mine = race.seconds[first.name]
    variants = {}
    for variant in race.variants:
        if variant.name in (COPY, GEMM):
            continue
        times = race.seconds[variant.name]
        variants[variant.name] = {
            "ours": variant.ours,
            "note": variant.note,
            "rounds": len(times["forward"]),
            "seconds": {direction: summary(samples) for direction, samples in times.items()},
            "ratio": {d: ratios(samples, mine[d]) for d, samples in times.items() if d in mine},
            "peak_bytes": race.peak_bytes(variant) if memory else None,
        }
    at_floor = floor_seconds(race, case, floors)
    return {
        "operation": operation,
        "activation": case.activation,
        "widths": list(case.widths),
        "size": asdict(case.size),
        "floor": at_floor,
        "rates": rates(race, case, floors),
        "to_floor": {d: summary(mine[d])["median"] / f["seconds"] for d, f in at_floor.items() if d in mine},
        "variants": variants,
    }


def prepare(operation: str, case: Case, names: Sequence[str]) -> tuple[Race, dict[str, Floor], dict[str, str]]:
    """A race that is ready to be run: every variant gave the right answer."""
    variants, skipped = contestants(operation, case, names)
    floors = case.floors()[operation]
    inputs = len(case.pool) if operation in ("encode", "step", "optimizer") else len(case.coded)
    return Race([*variants, *floor_variants(case, floors)], inputs, case.device), floors, skipped


def measure(operation: str, case: Case, names: Sequence[str], budget: float) -> tuple[dict[str, Any], dict[str, str]]:
    """A row without pytest. Returns (row, skipped)."""
    race, floors, skipped = prepare(operation, case, names)
    race.run(rounds_for(race.warm_up(), budget))
    return row(operation, case, race, floors), skipped
