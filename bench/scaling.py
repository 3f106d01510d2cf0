"""python -m bench.scaling [--seconds 0.4] [--json FILE]: cost of a step and of its parts against N, B, k and d.

One axis at a time, the others fixed. Every operation of every point is checked before it is timed. The same step also runs in
dense PyTorch, as far as it fits in memory: where our default backend is not the fastest, the report says so.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from bench import machine, results
from bench.cases import Case, Size, dense_bytes
from bench.interleaved_timing import Race, Variant, WrongResultError, held_bytes
from bench.peers import eager, ours
from bench.rows import right
from bench.statistics import ratios, summary

AXES: dict[str, dict[str, Any]] = {
    "cpu": {
        "base": Size(1024, 128, 8192, 32),
        "d_sae": {"base": Size(512, 64, 2048, 32), "values": [2048 << n for n in range(10)]},
        "rows": {"values": [256 << n for n in range(7)]},
        "k": {"values": [4, 16, 64, 256, 1024]},
        "d": {"values": [32, 128, 512, 2048]},
    },
    "cuda": {
        "base": Size(4096, 2304, 18432, 48),
        "d_sae": {"base": Size(4096, 768, 2048, 48), "values": [2048 << n for n in range(10)]},
        "rows": {"values": [256 << n for n in range(7)]},
        "k": {"values": [4, 16, 64, 256, 1024]},
        "d": {"values": [128, 512, 2304, 8192]},
    },
    "small": {
        "base": Size(512, 64, 2048, 16),
        "d_sae": {"values": [2048, 8192, 32768, 131072]},
        "rows": {"values": [256, 1024, 4096]},
        "k": {"values": [4, 64, 512]},
        "d": {"values": [32, 256]},
    },
    "tiny": {
        "base": Size(32, 16, 128, 4),
        "d_sae": {"values": [64, 128]},
        "rows": {"values": [16, 32]},
        "k": {"values": [2, 8]},
        "d": {"values": [8, 16]},
    },
}
OPERATIONS = ("step", "encode", "nested_loss", "correlation")
CHECKED = 1 << 21
"""As `bench.cases.CHECKED`, for many points."""
LEAST, MOST = 3, 9
SLOWEST = 1.0
"""Seconds of one run beyond which a variant other than our default is not measured further along an axis."""


def points(kind: str) -> Iterator[tuple[str, Size]]:
    axes = AXES[kind]
    for axis, one in axes.items():
        if axis != "base":
            for value in one["values"]:
                yield axis, replace(one.get("base", axes["base"]), **{axis: value})


def dense_fits(size: Size, free: float) -> bool:
    return dense_bytes(size) + ours_bytes(size) < free


def ours_bytes(size: Size) -> int:
    """Memory of two backends' weights, gradients and moments, and of drawing them."""
    return 4 * 24 * size.d_sae * size.d


def measure_point(
    size: Size, operation: str, seconds: float, free: float, given_up: set[str]
) -> dict[str, dict[str, Any]]:
    """One operation at one size: {variant: seconds, ratio, bytes}. BatchTopK; the step and the loss with four prefixes. Raises
    WrongResultError where one computes something else.

    A variant other than ours by default that takes longer than SLOWEST is left out, and joins `given_up`.
    """
    case = Case(size, "batch_topk", nested=True, checked=CHECKED)
    variants: list[Variant] = ours.variants(operation, case)
    if operation == "correlation":
        variants = variants[:1]
    fits = dense_fits(size, free)
    if operation in ("step", "encode") and fits:
        variants += getattr(eager, operation)(case)
    variants = [variant for variant in variants if variant.name not in given_up]
    wrong: dict[str, str] = {}
    variants = right(operation, case, variants, wrong)
    if wrong:
        raise WrongResultError("; ".join(wrong.values()))
    race = Race(variants, case.device)
    first = variants[0]
    for variant in variants:
        race.time(variant)
    slow = {v.name for v in variants[1:] if sum(race.seconds[v.name]["forward"]) * v.per > SLOWEST}
    given_up |= slow
    race.variants = [variant for variant in variants if variant.name not in slow]
    race.seconds.clear()
    race.run(max(LEAST, min(MOST, int(seconds / max(race.warm_up(), 1e-9)))))
    found = {}
    for variant in race.variants:
        times = race.seconds[variant.name]
        direction = "both" if "both" in times else "forward"
        found[variant.name] = {
            "seconds": summary(times[direction]),
            "ratio": ratios(times[direction], race.seconds[first.name][direction]),
            "peak_bytes": race.peak_bytes(variant),
            "held_bytes": held_bytes(variant, case),
            "note": variant.said(),
        }
    return found


def measure(kind: str, seconds: float) -> dict[str, Any]:
    """The scaling section of a result file. `failed` has the errors by point; such points have no times."""
    free = 0.4 * machine.free_bytes()
    found, failed = [], {}
    given_up: dict[tuple[str, str], set[str]] = defaultdict(set)
    for axis, size in points(kind):
        if ours_bytes(size) > free:
            continue
        value = getattr(size, axis)
        # Only N and B reach sizes where the operations scale differently; the other axes time the step only.
        for operation in OPERATIONS if axis in ("d_sae", "rows") else ("step",):
            name = f"{axis} {value} {operation}"
            try:
                variants = measure_point(size, operation, seconds, free, given_up[axis, operation])
            except WrongResultError as error:
                failed[name] = str(error)
                print(f"{name}: WRONG: {error}", flush=True)
                continue
            found.append(
                {"axis": axis, "value": value, "operation": operation, "size": asdict(size), "variants": variants}
            )
            print(f"{name}: {said(variants)}", flush=True)
    return {**results.about(), "points": found, "failed": failed}


def said(variants: dict[str, Any]) -> str:
    return ", ".join(f"{name} {1e3 * one['seconds']['median']:.2f} ms" for name, one in variants.items())


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__)
    parser.add_argument("--size", choices=sorted(AXES), default=machine.device().type)
    parser.add_argument(
        "--seconds", type=float, default=0.4, help="of rounds a point and operation (at least 3 rounds)"
    )
    parser.add_argument("--json", type=Path, help="write the section to this file")
    options = parser.parse_args(words)
    found = measure(options.size, options.seconds)
    if options.json is not None:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    return int(bool(found["failed"]))


if __name__ == "__main__":
    sys.exit(main())
