"""Variants of one computation, checked, then timed in turn within the same rounds: ratios are reliable where absolute times are
not.

A round runs every variant once, each on another of several inputs that together do not fit the cache. A ratio is taken within
each round and then summarised, so that a short slowdown of the machine affects both of its times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from bench import machine, memory

LEAST_ROUNDS, MOST_ROUNDS = 5, 25
MOST_INPUTS = 1024
"""Only the sizes of tests would need more to leave the cache."""


class WrongResultError(AssertionError):
    """A variant's result differs from the reference, so its time is meaningless."""


@dataclass
class Variant:
    """One implementation of the computation. `forward(i)` works on input i modulo its number of inputs; `backward` takes what
    it returned."""

    name: str
    forward: Callable[[int], Any]
    backward: Callable[[Any], object] | None = None
    tidy: Callable[[], object] = lambda: None
    """Untimed, after each run: drops gradients."""
    answer: Callable[[Any], dict[str, Tensor]] | None = None
    """Its results for a probe (`bench.cases.Probe`), which are checked."""
    lacks: Mapping[str, str] = field(default_factory=dict)
    """{result that it does not give: reason}. All other results are required."""
    unchecked: str = ""
    """Reason why it has no `answer`; a variant needs one of the two."""
    note: str = ""
    """Differences from our computation."""
    tolerance: float = 1e-4
    """Of the relative error (Frobenius norms): rounding of fp32 sums of some thousand terms is below 1e-5."""
    ours: bool = False
    per: int = 1
    """Times are divided by this: repetitions within one run."""

    def said(self) -> str:
        """The note, and the results that were not compared."""
        apart = [f"not compared: {self.unchecked}"] if self.unchecked else []
        apart += [f"{name} not compared ({why})" for name, why in self.lacks.items()]
        return "; ".join(filter(None, [self.note, *apart]))


def verify(variant: Variant, probe: Any, expected: Mapping[str, Tensor]) -> None:
    """Raises WrongResultError where an answer is missing, unknown, of another shape, no number, or off by more than the
    tolerance. `lacks` must say exactly which are missing."""
    if variant.answer is None:
        if not variant.unchecked:
            raise WrongResultError(f"{variant.name}: gives no answer to check, and does not say why")
        return
    found = variant.answer(probe)
    variant.tidy()
    asked = sorted(set(expected) - set(variant.lacks))
    if sorted(found) != asked:
        raise WrongResultError(f"{variant.name}: expected the answers {asked}, got {sorted(found)}")
    for name, value in found.items():
        want, got = expected[name].detach().double(), value.detach().double()
        if got.shape != want.shape:
            raise WrongResultError(f"{variant.name}: {name}: expected shape {list(want.shape)}, got {list(got.shape)}")
        error = float((got - want).norm() / want.norm().clamp_min(1e-30))
        if not error <= variant.tolerance:
            raise WrongResultError(
                f"{variant.name}: {name}: off by {error:.3g} of its norm, allowed {variant.tolerance:.3g}, "
                f"on {len(probe.x)} rows"
            )


@dataclass
class Race:
    """Times of every variant by direction. Where a variant has a backward pass, `both` is the sum of the two of one run."""

    variants: Sequence[Variant]
    device: torch.device
    seconds: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    _round: int = 0

    def __post_init__(self) -> None:
        self._place = {variant.name: place for place, variant in enumerate(self.variants)}
        # Odd, and the number of inputs is a power of two, so each variant uses every input.
        self._stride = len(self.variants) | 1

    def warm_up(self) -> float:
        """Two unrecorded rounds. Returns the seconds of the second."""
        taken = 0.0
        for _ in range(2):
            self._round += 1
            taken = sum(sum(self._run(variant).values()) * variant.per for variant in self.variants)
        return taken

    def others(self) -> None:
        """Begin a round: run all variants but the first, starting with another one each time."""
        self._round += 1
        rest = list(self.variants[1:])
        start = self._round % len(rest) if rest else 0
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
        # Within a round variants use different inputs, and each variant uses another one in the next round.
        i = self._round * self._stride + self._place[variant.name]
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
        """Peak memory of one run beyond the memory held before it. None if the system cannot measure it."""

        def once() -> None:
            out = variant.forward(0)
            if variant.backward is not None:
                variant.backward(out)

        found = memory.peak_bytes(once, self.device)
        variant.tidy()
        return found


def held_bytes(variant: Variant, case: Any) -> int:
    """Bytes that a variant keeps between runs: weights, moments, statistics. The case's inputs and weights are not counted."""
    return memory.held_bytes([variant.forward, variant.backward], [case])


def rounds_for(round_seconds: float, budget: float) -> int:
    return max(LEAST_ROUNDS, min(MOST_ROUNDS, int(budget / max(round_seconds, 1e-9))))


def pool_size(bytes_each: int) -> int:
    """Inputs that together are at least twice the cache: a power of two from 2 to MOST_INPUTS."""
    least = max(2, -(-2 * machine.cache_bytes() // max(1, bytes_each)))
    return min(MOST_INPUTS, 1 << (least - 1).bit_length())
