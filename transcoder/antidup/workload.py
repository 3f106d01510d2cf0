"""The budget of what the monitor does between steps: counted in work, never by the clock, so that a run is the same to the bit
on every machine and after every resume."""

from __future__ import annotations

from collections.abc import Mapping

SHARE = 0.01
"""Share of the steps' work that each of the two activities may take: 2 % together."""
SEARCH, TEST = "search", "test"
"""Searching all pairs for candidates; testing candidates on held-out tokens."""

# Work is counted in multiply-adds of a large fp32 product, 12 ps each on one core where the others were measured.
ENCODED = 3.0
"""For each of an encoder's multiply-adds: selection included, a product of few tokens is slower."""
STEP_ENCODER, STEP_ENTRY = 4.0, 200.0
"""Of a step: for each multiply-add of the encoder (with gradients and optimizer), and for each active latent and coordinate."""
CELL, FOUND, TESTED = 400.0, 100_000.0, 2_000.0
"""For a cell of a triangle that is searched, a pair that is found, and an activation of a pair that is tested."""


def step_work(tokens: int, d_sae: int, d_in: int, entries: int) -> float:
    """Work of a training step over `tokens` tokens with `entries` active latents in all."""
    return STEP_ENCODER * tokens * d_sae * d_in + STEP_ENTRY * entries * d_in


class WorkBudget:
    """Each activity runs up a debt that the steps after it pay off; in debt, it is not affordable.

    So an activity takes at most `SHARE` of the steps' work in the long run, however much each time costs, and the first time is
    never put off.
    """

    def __init__(self) -> None:
        self._debts = {SEARCH: 0.0, TEST: 0.0}

    def earn(self, work: float) -> None:
        """Of steps that were taken."""
        self._debts = {name: max(0.0, debt - SHARE * work) for name, debt in self._debts.items()}

    def spend(self, activity: str, work: float) -> None:
        self._debts[activity] += work

    def affords(self, activity: str) -> bool:
        return self._debts[activity] == 0.0

    def state_dict(self) -> dict[str, float]:
        return dict(self._debts)

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """All of it or, with a ValueError or KeyError, nothing."""
        self._debts = {name: float(state[name]) for name in self._debts}
