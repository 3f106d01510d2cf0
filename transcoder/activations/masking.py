"""Which tokens are sinks, and the windows of token ids around the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transcoder.config import ActivationsSection


@dataclass(frozen=True, eq=False)
class SinkMask:
    """Per token of one forward pass, each [T]; no token is True in two of the first three.

    Fields:
        by_id: a special token.
        by_position: position 0, not masked by id.
        by_norm: a source norm above the multiple of the median, not masked otherwise.
        norm_ratio: fp32 source norm over the median norm of the pass's non-pad tokens.
    """

    by_id: Tensor
    by_position: Tensor
    by_norm: Tensor
    norm_ratio: Tensor

    @property
    def any(self) -> Tensor:
        return self.by_id | self.by_position | self.by_norm


class SinkMasker:
    """Finds sinks by token id, by norm and, if asked, by position.

    Sink tokens carry a nearly constant input of large norm, so every latent that fires on them is collinear
    with every other: they make duplicates and spend the dictionary on one vector. They are dropped from the
    data, and so from every loss and statistic behind it.
    """

    def __init__(
        self,
        section: ActivationsSection,
        special_ids: Sequence[int],
        vocabulary_size: int,
        pad_id: int | None,
        device: torch.device,
    ) -> None:
        self._section = section
        self._pad_id = pad_id
        special = torch.zeros(vocabulary_size, dtype=torch.bool, device="cpu")
        special[list(special_ids)] = True
        self._special = special.to(device)

    def find(self, source: Tensor, tokens: Tensor, positions: Tensor, valid: Tensor) -> SinkMask:
        """The sinks among T tokens of one pass. No host sync.

        Args:
            source: [T, d_in] activations, any floating dtype.
            tokens: [T] int64 ids; positions: [T] int64.
            valid: [T] bool, False on padding, which is neither a sink nor part of the median.
        """
        norms = torch.linalg.vector_norm(source, dim=-1, dtype=torch.float32)
        counted = valid if self._pad_id is None else valid & (tokens != self._pad_id)
        median = norms.masked_fill(~counted, float("nan")).nanmedian()
        ratio = norms / median
        nothing = torch.zeros_like(valid)
        by_id = self._special[tokens] & valid if self._section.mask_bos else nothing
        by_position = (positions == 0) & valid & ~by_id if self._section.mask_position_zero else nothing
        by_norm = nothing
        if self._section.mask_norm_multiple is not None:
            by_norm = (ratio > self._section.mask_norm_multiple) & valid & ~by_id & ~by_position
        return SinkMask(by_id, by_position, by_norm, ratio)


def context_anchor(width: int) -> int:
    """The column of a context window that holds the token itself: three quarters of the rest go before."""
    return 3 * (width - 1) // 4


def context_windows(tokens: Tensor, positions: Tensor, sequences: Tensor, index: Tensor, width: int) -> Tensor:
    """[n, width] int32: the token ids around each of `index` in its own sequence, -1 where there is none.

    Args:
        tokens, positions, sequences: [T] int64, in stream order.
        index: [n] int64, which of the T tokens.
        width: columns; column `context_anchor(width)` is the token itself.

    Equivalent to: `tokens[index[:, None] + offsets]` where sequence and distance agree, else -1.
    """
    offsets = torch.arange(width, device=tokens.device) - context_anchor(width)
    at = index[:, None] + offsets
    inside = at.clamp(0, tokens.numel() - 1)
    same = (sequences[inside] == sequences[index][:, None]) & (positions[inside] - positions[index][:, None] == offsets)
    return torch.where(same & (at == inside), tokens[inside], -1).to(torch.int32)
