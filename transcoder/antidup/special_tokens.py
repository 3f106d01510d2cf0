"""Which tokens are special, by a lookup that needs no device synchronisation."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


class SpecialTokens:
    """A boolean table over the vocabulary, up to the largest id given; ids beyond it, and negative ones, are not
    special. A gather from the table never waits for a device; `torch.isin` sorts, and may.

    Args:
        ids: token ids >= 0; order and repetition do not matter.
        device: where the table is made; `marked` moves it to its tokens' device, once.
    """

    def __init__(self, ids: Iterable[int], device: torch.device | str = "cpu") -> None:
        self.ids = sorted({int(x) for x in ids})
        if self.ids and self.ids[0] < 0:
            raise ValueError(f"special ids: expected token ids of at least 0, got {self.ids[0]}")
        # One extra place, False, stands for every id outside the table; index -1 addresses it.
        table = torch.zeros(self.ids[-1] + 2 if self.ids else 1, dtype=torch.bool, device="cpu")
        table[self.ids] = True
        self._table = table.to(device)

    def marked(self, tokens: Tensor) -> Tensor:
        """bool of the shape of `tokens` (integers): which are special.

        Equivalent to: `torch.isin(tokens, torch.tensor(ids))`.
        """
        if self._table.device != tokens.device:
            self._table = self._table.to(tokens.device)
        return self._table[tokens.long().clamp(-1, self._table.numel() - 1)]
