"""One row of the results: a computation at one size, every variant of it checked and then timed in the same rounds, with the
floor of this machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from bench import machine, peers
from bench.cases import Case, dense_bytes
from bench.interleaved_timing import Race, Variant, WrongResultError, held_bytes, rounds_for, verify
from bench.peers import ours
from bench.reference_rates import Yardsticks
from bench.statistics import ratios, summary


class Contest:
    """The variants of one row that gave the right answer, ready to be timed.

    Raises WrongResultError if a variant of ours is wrong. A wrong peer is left out and named in `wrong`.
    """

    def __init__(self, operation: str, case: Case, names: Sequence[str], only_default: bool = False) -> None:
        """`only_default`: of our backends, only the default one."""
        needed, free = dense_bytes(case.size), machine.free_bytes()
        if needed < 0.7 * free:
            others, self.skipped = peers.variants(operation, case, names)
        else:
            why = f"dense codes need about {needed / 1e9:.0f} GB at {case.size}, {free / 1e9:.0f} GB are free"
            others, self.skipped = [], dict.fromkeys(names, why)
        self.operation, self.case = operation, case
        self.wrong: dict[str, str] = {}
        mine = ours.variants(operation, case)[: 1 if only_default else None]
        self.variants = right(operation, case, [*mine, *others], self.wrong)
        for variant in self.variants:
            if not variant.ours and not variant.note:
                raise ValueError(f"{variant.name}: expected a note of what it computes differently, got none")
        self.yardsticks = Yardsticks(case, case.floors()[operation])
        self.race = Race([*self.variants, *self.yardsticks.variants], case.device)

    def row(self) -> dict[str, Any]:
        """The row for the result file, after the race. Ratios are to the first variant, taken round by round."""
        race, mine = self.race, self.race.seconds[self.variants[0].name]
        variants: dict[str, Any] = {}
        for variant in self.variants:
            times = race.seconds[variant.name]
            variants[variant.name] = {
                "ours": variant.ours,
                "note": variant.said(),
                "rounds": len(times["forward"]),
                "seconds": {direction: summary(samples) for direction, samples in times.items()},
                "ratio": {d: ratios(samples, mine[d]) for d, samples in times.items() if d in mine},
                "peak_bytes": race.peak_bytes(variant),
                "held_bytes": held_bytes(variant, self.case),
            }
        variants |= {name: {"ours": False, "wrong": why} for name, why in self.wrong.items()}
        return {
            "operation": self.operation,
            "activation": self.case.activation,
            "widths": list(self.case.widths),
            "size": asdict(self.case.size),
            "floor": self.yardsticks.floors(race.seconds),
            "product_seconds": self.yardsticks.product_seconds(race.seconds),
            "rates": self.yardsticks.rates(race.seconds),
            "variants": variants,
        }


def right(operation: str, case: Case, variants: Sequence[Variant], wrong: dict[str, str]) -> list[Variant]:
    """The variants with right results on every probe; `wrong` gets the errors of the others. Raises WrongResultError for one of
    ours."""
    found = list(variants)
    for probe in case.probes:
        expected = case.expect(operation, probe)
        for variant in list(found):
            try:
                verify(variant, probe, expected)
            except WrongResultError as error:
                if variant.ours:
                    raise
                wrong[variant.name] = str(error)
                found.remove(variant)
    return found


def measure(operation: str, case: Case, names: Sequence[str], budget: float) -> tuple[dict[str, Any], dict[str, str]]:
    """The row of a peer and of our default backend, without pytest. Returns (row, skipped)."""
    contest = Contest(operation, case, names, only_default=True)
    contest.race.run(rounds_for(contest.race.warm_up(), budget))
    return contest.row(), contest.skipped
