"""Which pairs are duplicates: evidence from disjoint blocks, with hysteresis."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.pair_errors import pooled_lower_bound

Pair = tuple[int, int]
Evidence = tuple[float, float, float]
"""A pair in one block: its correlation, the standard error of the correlation, the weight of the block."""
MAX_PAIRS = 1 << 18
"""Most pairs above the threshold in a block, and most flagged pairs, that are stored, 4 MiB each. A dictionary with more
duplicates has failed as a whole."""


class FlagBook:
    """Flags a pair when its lower bound was above the threshold in `needed` of the last `remembered` closed
    blocks and, where its own standard error is known in some of those, also the lower bound over all of these blocks
    together; releases it when its upper bound in a closed block falls below the release threshold, or one of its latents died.
    A released pair starts over: evidence from before the release is dropped.

    Why both conditions: a single block's bounds by the rule of thumb are too narrow where amplitudes have heavy tails, and its
    bounds by the pair's own error are so wide that three of four blocks hardly ever clear the threshold. All blocks together
    do.
    """

    def __init__(self, needed: int, remembered: int, threshold: float) -> None:
        self._needed, self._threshold = needed, threshold
        self._blocks: deque[set[Pair]] = deque(maxlen=remembered)
        self._evidence: deque[dict[Pair, Evidence]] = deque(maxlen=remembered)
        self.flagged: set[Pair] = set()

    def close_block(
        self, above: Iterable[Pair], released: Iterable[Pair], evidence: Mapping[Pair, Evidence] | None = None
    ) -> None:
        """Take the evidence of one block, release flags and set new ones.

        Args:
            above: pairs whose lower bound exceeds the threshold; the first `MAX_PAIRS` are taken.
            released: flagged pairs to release.
            evidence: of the followed pairs, those below the threshold included.
        """
        gone = set(released)
        self.flagged -= gone
        for block in self._blocks:
            block -= gone
        for measured in self._evidence:
            for pair in gone & measured.keys():
                del measured[pair]
        self._blocks.append(set(itertools.islice(above, MAX_PAIRS)))
        self._evidence.append(dict(evidence or {}))
        known = self.remembered() - self.flagged - gone
        enough = sorted(p for p in known if self.blocks_above(p) >= self._needed and self._together(p))
        self.flagged.update(enough[: MAX_PAIRS - len(self.flagged)])

    def remembered(self) -> set[Pair]:
        """Pairs above the threshold in at least one remembered block."""
        return set().union(*self._blocks)

    def _together(self, pair: Pair) -> bool:
        blocks = [block[pair] for block in self._evidence if pair in block]
        return not blocks or pooled_lower_bound(blocks) > self._threshold

    def forget(self, latents: set[int]) -> None:
        """Drop every flagged or remembered pair that contains one of these latents."""
        for pairs in (*self._blocks, self.flagged):
            pairs -= {pair for pair in pairs if latents.intersection(pair)}
        for block in self._evidence:
            for pair in [pair for pair in block if latents.intersection(pair)]:
                del block[pair]

    def blocks_above(self, pair: Pair) -> int:
        """Closed blocks, of those remembered, in which the pair's lower bound was above the threshold."""
        return sum(pair in block for block in self._blocks)

    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": [_table(block) for block in self._blocks],
            "flagged": _table(self.flagged),
            "evidence": [{"pairs": _table(set(block)), "numbers": _numbers(block)} for block in self._evidence],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        blocks, flagged = [_pairs(table) for table in state["blocks"]], set(_pairs(state["flagged"]))
        evidence = [
            dict(zip(_pairs(block["pairs"]), map(tuple, block["numbers"].tolist()), strict=True))
            for block in state["evidence"]
        ]
        self._blocks.clear()
        self._blocks.extend(map(set, blocks))
        self._evidence.clear()
        self._evidence.extend(evidence)
        self.flagged = flagged


def _table(pairs: set[Pair]) -> Tensor:
    """[P, 2] int64, ascending."""
    return torch.tensor(sorted(pairs), dtype=torch.int64, device="cpu").view(-1, 2)


def _numbers(block: Mapping[Pair, Evidence]) -> Tensor:
    """[P, 3] float64, in the order of `_table`."""
    return torch.tensor([block[pair] for pair in sorted(block)], dtype=torch.float64, device="cpu").view(-1, 3)


def _pairs(table: Tensor) -> list[Pair]:
    return [(i, j) for i, j in table.tolist()]
