"""Which pairs are duplicates: evidence from disjoint blocks, with hysteresis."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

Pair = tuple[int, int]


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
        longer hold."""
        self._blocks.append(set(above))
        self.flagged -= set(released)
        candidates = set().union(*self._blocks)
        self.flagged |= {p for p in candidates - set(released) if self.blocks_above(p) >= self._needed}

    def blocks_above(self, pair: Pair) -> int:
        """Closed blocks, of those remembered, in which the pair's lower bound was above the threshold."""
        return sum(pair in block for block in self._blocks)

    def state_dict(self) -> dict[str, Any]:
        return {
            "blocks": [sorted(map(list, block)) for block in self._blocks],
            "flagged": sorted(map(list, self.flagged)),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._blocks.clear()
        self._blocks.extend({(int(i), int(j)) for i, j in block} for block in state["blocks"])
        self.flagged = {(int(i), int(j)) for i, j in state["flagged"]}
