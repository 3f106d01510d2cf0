"""Variants of one computation, timed in turn within the same rounds: ratios mean something where absolute times do not.

A round runs every variant once, each on the next of several inputs that together do not fit the cache. A ratio is taken within
each round and then summarised, so that what slows a machine for a second slows both sides of it.
"""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench import machine

LEAST_ROUNDS, MOST_ROUNDS = 5, 25


class WrongResultError(AssertionError):
    """A variant computes something else than the reference: its time would mean nothing."""


@dataclass
class Variant:
    """One way to do it. `forward(i)` works on input i; `backward` takes what it returned."""

    name: str
    forward: Callable[[int], Any]
    backward: Callable[[Any], object] | None = None
    tidy: Callable[[], object] = lambda: None
    """Untimed, after each run: drops gradients."""
    answer: Callable[[], dict[str, Tensor]] | None = None
    """What it computes from the small input that every variant is checked on."""
    note: str = ""
    """What it computes differently from ours."""
    tolerance: float = 1e-4
    """Of the relative error (Frobenius norms): rounding of fp32 sums of some thousand terms is below 1e-5."""
    ours: bool = False
    per: int = 1
    """Times are divided by this: repetitions within one run."""


def verify(variant: Variant, expected: dict[str, Tensor]) -> None:
    """Raises WrongResultError where an answer is missing, of another shape, no number, or off by more than the tolerance."""
    if variant.answer is None:
        return
    found = variant.answer()
    variant.tidy()
    unknown = sorted(set(found) - set(expected))
    if unknown or not found:
        raise WrongResultError(f"{variant.name}: expected answers among {sorted(expected)}, got {sorted(found)}")
    for name, value in found.items():
        want, got = expected[name].detach().double(), value.detach().double()
        if got.shape != want.shape:
            raise WrongResultError(f"{variant.name}: {name}: expected shape {list(want.shape)}, got {list(got.shape)}")
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        if not error <= variant.tolerance:
            raise WrongResultError(
                f"{variant.name}: {name}: off by {error:.3g} of its norm, allowed {variant.tolerance:.3g}"
            )


@dataclass
class Race:
    """Times of every variant by direction. Where a variant has a backward pass, `both` is the sum of the two of one run."""

    variants: Sequence[Variant]
    inputs: int
    device: torch.device
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _turn: int = 0

    def warm_up(self) -> float:
        """One run of each, unrecorded. Returns the seconds of another round."""
        for variant in self.variants:
            self._run(variant)
        return sum(sum(self._run(variant).values()) * variant.per for variant in self.variants)

    def others(self) -> None:
        """All but the first, from another one on each time."""
        self._turn += 1
        rest = list(self.variants[1:])
        start = self._turn % len(rest) if rest else 0
        for variant in rest[start:] + rest[:start]:
            self.time(variant)

    def first(self) -> None:
        self.time(self.variants[0])

    def run(self, rounds: int) -> None:
        for _ in range(rounds):
            self.others()
            self.first()

    def time(self, variant: Variant) -> None:
        kept = self.seconds.setdefault(variant.name, {})
        taken = self._run(variant)
        for direction, value in taken.items():
            kept.setdefault(direction, []).append(value)
        if len(taken) > 1:
            kept.setdefault("both", []).append(sum(taken.values()))

    def _run(self, variant: Variant) -> dict[str, float]:
        self._turn += 1
        i = self._turn % self.inputs
        start = self._now()
        out = variant.forward(i)
        middle = self._now()
        taken = {"forward": middle - start}
        if variant.backward is not None:
            variant.backward(out)
            taken["backward"] = self._now() - middle
        del out
        variant.tidy()
        return {direction: value / variant.per for direction, value in taken.items()}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def peak_bytes(self, variant: Variant) -> int | None:
        """Most memory that one run holds beyond what was held before it. None where the system cannot say."""

        def once() -> None:
            out = variant.forward(0)
            if variant.backward is not None:
                variant.backward(out)

        found = peak_bytes(once, self.device)
        variant.tidy()
        return found


def rounds_for(round_seconds: float, budget: float) -> int:
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(round_seconds, 1e-9))))


def peak_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Most memory that `call` holds at once beyond what the process held before: CUDA's own count, or the resident set."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated()) - before
    try:
        # Freed memory that the allocator keeps would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
    except (OSError, AttributeError, KeyError):
        return None
    call()
    return max(0, _status("VmHWM") - before)


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def summary(samples: Sequence[float]) -> dict[str, float]:
    """Median and quartiles."""
    if len(samples) < 2:
        return {"median": samples[0], "low": samples[0], "high": samples[0]}
    low, middle, high = statistics.quantiles(samples, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def ratios(samples: Sequence[float], to: Sequence[float]) -> dict[str, float]:
    """Median and quartiles of the ratio taken round by round."""
    return summary([a / b for a, b in zip(samples, to, strict=True)])


def pool_size(bytes_each: int) -> int:
    """Inputs that together are twice the cache, at least 2."""
    return max(2, -(-2 * machine.cache_bytes() // max(1, bytes_each)))
