"""Backend `cpp` of the correlation statistics: the entries of a batch and the moments of each latent (csrc/count_ops.h), the
pair update of the packed triangle and the walk over all its pairs (csrc/correlation_ops.h), the sketch's update and its search
for pairs (csrc/sketch_ops.h); everything else is backend `torch`'s.

A batch touches each line of the triangle's memory about once, at the price of a miss. Batches are therefore kept until a row
of the triangle meets as many pairs as it has lines, and added row by row, each cell in the order of the tokens: the sums are
those of adding each batch at once, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.kernels.codes import SparseCodes
from transcoder.kernels.correlation.counter import key_state
from transcoder.kernels.correlation.torch_backend import Entries
from transcoder.kernels.counts_cpp import readable
from transcoder.kernels.extension import usable

__all__ = ["Mined", "WaitingPairs", "add_moments", "firing_entries", "mine", "similar_rows", "sketch_add", "usable"]

PAIRS_PER_WAITING_ENTRY = 16
"""Entries may wait until there is one for so many pairs of the triangle: 24 bytes for 192, and about 32 more while they are
added. At d_sae = 8192, k = 32 and 1024 tokens those are 64 batches; an update was measured at 10 ms alone, 7 by 8, 4 by 32 and
3 by 64 (one core; encoder product: 110 ms)."""
MOST_WAITING = 1 << 22
"""And never more than these, 100 MB."""


def firing_entries(
    codes: SparseCodes, weight: Tensor | None, tally: Tensor | None, count_dtype: torch.dtype
) -> Entries:
    """`torch_backend.entries_of`, compact."""
    values, ids, ptr = readable(codes), codes.indices.contiguous(), codes.row_ptr.contiguous()
    weight = None if weight is None else weight.contiguous()
    latent, row, value, weighted, local = torch.ops.transcoder_cpp.firing_entries(values, ids, ptr, weight)
    one = torch.ones(1, dtype=count_dtype, device="cpu").expand(latent.numel())
    increment = one if tally is None else tally[row].to(count_dtype)
    return Entries(latent, row, value, value if weight is None else weighted, increment, local, None)


def add_moments(entries: Entries, total: Tensor, square: Tensor, count: Tensor) -> None:
    """Add the entries to the sums of their latents, each [d_sae], in place."""
    tally = entries.tally[:1] if entries.tally.stride(0) == 0 and entries.tally.numel() else entries.tally
    torch.ops.transcoder_cpp.add_moments(
        entries.latent, entries.value, entries.weighted, tally.to(count.dtype), total, square, count
    )


class _Update(NamedTuple):
    latent: Tensor
    local: Tensor
    value: Tensor
    weighted: Tensor
    tally: Tensor


class WaitingPairs:
    """Entries whose pairs are still to be added to a packed triangle, oldest first."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.limit = min(d_sae * (d_sae - 1) // 2 // PAIRS_PER_WAITING_ENTRY, MOST_WAITING)
        self._updates: list[_Update] = []
        self._entries = 0

    def add(self, entries: Entries) -> bool:
        """Keep the entries of one batch, all of which fire. Returns whether it is time to settle."""
        # Copies: the caller may write over his codes.
        value = entries.value.clone()
        weighted = value if entries.weighted is entries.value else entries.weighted
        tally = entries.tally[:1] if entries.tally.stride(0) == 0 else entries.tally
        self._updates.append(_Update(entries.latent.int(), entries.local, value, weighted, tally))
        self._entries += entries.latent.numel()
        return self._entries >= self.limit

    def settle(self, product: Tensor, joint: Tensor) -> None:
        """Add everything that waits to the triangle's sums, in place."""
        if self._updates:
            columns = ([part.contiguous() for part in column] for column in zip(*self._updates, strict=True))
            torch.ops.transcoder_cpp.add_pairs(*columns, self.d_sae, product, joint)
            self._updates, self._entries = [], 0


class Mined(NamedTuple):
    """What one walk over the pairs that fired together finds."""

    i: Tensor
    j: Tensor
    """[P] int64, i < j, ordered by (j, i)."""
    product: Tensor
    joint: Tensor
    """[P]: the sums of those pairs, over all parts."""
    squared: Tensor
    """0-dim float64: sum of r^2 - (apart_i apart_j)^2."""
    histogram: Tensor
    """[bins] int64, empty without edges."""


def mine(
    products: Sequence[Tensor],
    joints: Sequence[Tensor],
    apart: Tensor,
    inverse: Tensor,
    least: float,
    edges: Tensor | None,
) -> Mined:
    """The pairs that fired together with r = product * inverse_i * inverse_j - apart_i * apart_j of at least `least`.

    Args:
        products, joints: the sums of parts of one stream, packed triangles.
        apart, inverse: [d_sae] float64.
        edges: [bins + 1] float64, ascending; None counts no histogram.
    """
    return Mined(*torch.ops.transcoder_cpp.survey_pairs(products, joints, apart, inverse, least, edges))


def sketch_add(rows: Tensor, ones: Tensor, entries: Entries, weights: Tensor | None, tokens: int, *keys: int) -> None:
    """`rows[latent] += weighted * signs[token]` over the entries, `ones += sum of weights * signs` over the tokens, in place.

    Args:
        rows: [d_sae, m] fp32.   ones: [m] fp32.   weights: [tokens] float64, None for 1.
        keys: of `counter.signs`, which is not built.

    `rows` are backend `torch`'s to the bit; so are `ones` without weights, with them their sum is in another order.
    """
    torch.ops.transcoder_cpp.sketch_add(
        entries.latent, entries.row, entries.weighted.contiguous(), weights, tokens, key_state(*keys), rows, ones
    )


def similar_rows(left: Tensor, right: Tensor, above: float, apart: int) -> tuple[Tensor, Tensor, Tensor]:
    """(i, j, left_i . right_j), each [P], of the pairs whose product exceeds `above` and j > i + apart. fp32; products are
    made in tiles and looked at while they are warm. The same bits for any number of threads."""
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.transcoder_cpp.similar_rows(left, right, above, apart)
    return found
