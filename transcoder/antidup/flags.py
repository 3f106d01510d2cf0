"""Which pairs are duplicates: evidence from disjoint blocks, with hysteresis."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

Pair = tuple[int, int]
MAX_PAIRS = 1 << 18
"""Pairs that a book holds of each kind. A dictionary with more duplicates than this has failed as a whole, and
which of its pairs are the worst no longer matters; the state stays within 4 MiB a kind."""


class FlagBook:
    """Flags a pair when its lower bound was above the threshold in `needed` of the last `remembered` closed
    blocks, and releases it when its upper bound in a closed block falls below the release threshold, or one
    of the two died."""

    def __init__(self, needed: int, remembered: int) -> None:
        self._needed = needed
        self._blocks: deque[set[Pair]] = deque(maxlen=remembered)
        self.flagged: set[Pair] = set()

    def close_block(self, above: Iterable[Pair], released: Iterable[Pair]) -> None:
        """Evidence of one block: pairs whose lower bound exceeds the threshold, and flagged pairs that no
        longer hold. Of more than `MAX_PAIRS` in `above` the first are taken, and new flags only while there is
        room."""
        self._blocks.append(set(itertools.islice(above, MAX_PAIRS)))
        gone = set(released)
        self.flagged -= gone
        known = set().union(*self._blocks) - self.flagged - gone
        enough = sorted(p for p in known if self.blocks_above(p) >= self._needed)
        self.flagged.update(enough[: MAX_PAIRS - len(self.flagged)])

    def forget(self, latents: set[int]) -> None:
        """Drop every pair that one of these latents is in, flagged or remembered."""
        for pairs in (*self._blocks, self.flagged):
            pairs -= {pair for pair in pairs if latents.intersection(pair)}

    def blocks_above(self, pair: Pair) -> int:
        """Closed blocks, of those remembered, in which the pair's lower bound was above the threshold."""
        return sum(pair in block for block in self._blocks)

    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": [_table(block) for block in self._blocks],
            "flagged": _table(self.flagged),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        blocks, flagged = [_pairs(table) for table in state["blocks"]], _pairs(state["flagged"])
        self._blocks.clear()
        self._blocks.extend(blocks)
        self.flagged = flagged


def _table(pairs: set[Pair]) -> Tensor:
    """[P, 2] int64, ascending."""
    return torch.tensor(sorted(pairs), dtype=torch.int64, device="cpu").view(-1, 2)


def _pairs(table: Tensor) -> set[Pair]:
    return {(i, j) for i, j in table.tolist()}
