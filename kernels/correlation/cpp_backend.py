"""Backend `cpp` of the correlation statistics: the entries of a batch and the moments of each latent (csrc/counts.cpp), the
pair update of the packed triangle (csrc/correlation.cpp), the walk over all its pairs, the sketch's update
and its search for pairs (csrc/sketch.cpp); everything else is backend `torch`'s.

A batch touches each cache line of the triangle about once, so every access is a miss. Entries are therefore buffered until a
row of the triangle has about as many pairs as cells, then added row by row, each cell in the order of the tokens: the sums
equal those of adding each batch at once, bit for bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from transcoder.kernels.correlation.counter_rng import key_state
from transcoder.kernels.correlation.torch_backend import Entries
from transcoder.kernels.counts_cpp import readable
from transcoder.kernels.extension import usable
from transcoder.kernels.sparse_codes import SparseCodes

if TYPE_CHECKING:
    from transcoder.kernels.correlation.statistics import Moments

__all__ = ["Mined", "WaitingPairs", "add_moments", "firing_entries", "mine", "similar_rows", "sketch_add", "usable"]

PAIRS_PER_WAITING_ENTRY = 8
"""Pairs of the triangle per buffered entry, which bounds the buffer: 8 bytes (16 for float64 codes) for 96 pairs, and 8 more
while entries are added. At d_sae = 8192, k = 32 and 1024 tokens those are 128 batches; measured (LOG.md)."""
MOST_WAITING = 1 << 23
"""Upper bound of buffered entries: 64 MiB."""


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


class WaitingPairs:
    """Entries whose pairs are still to be added to a packed triangle, oldest first."""

    def __init__(self, d_sae: int) -> None:
        self.d_sae = d_sae
        self.limit = min(d_sae * (d_sae - 1) // 2 // PAIRS_PER_WAITING_ENTRY, MOST_WAITING)
        self._entries = self._tokens = 0
        self._kind = (False, False, False)
        """Kind of the buffered entries: whether values are float64, whether tokens have a weight, whether they have a tally."""
        # The device is explicit: the process's default device may be another.
        self._partners = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._starts = torch.zeros(1, dtype=torch.int32, device="cpu")
        self._weights = torch.empty(0, dtype=torch.float64, device="cpu")
        self._tallies = torch.empty(0, dtype=torch.float64, device="cpu")

    def takes(self, codes: SparseCodes, weight: Tensor | None, tally: Tensor | None) -> bool:
        """Whether these codes fit into the buffer: it is empty or holds entries of the same kind."""
        return self._entries == 0 or self._kind == _kind(codes, weight, tally)

    def add(self, codes: SparseCodes, weight: Tensor | None, tally: Tensor | None, moments: Moments) -> bool:
        """Keep the entries that fire of codes that `takes`, and add them to the sums of their latents. Returns whether it is
        time to settle.

        Args:
            weight, tally: [B] float64, as in `torch_backend.entries_of`.
        """
        wide, weighted, tallied = self._kind = _kind(codes, weight, tally)
        entries, tokens = self._entries + codes.nnz, self._tokens + codes.shape[0]
        # Allocated whole: untouched memory costs nothing, and the system uses large pages.
        size = 16 if wide else 8
        self._partners = _with_room(
            self._partners, self._entries * size, entries * size, (self.limit + codes.nnz) * size
        )
        self._starts = _with_room(self._starts, self._tokens + 1, tokens + 1)
        if weighted:
            self._weights = _with_room(self._weights, self._tokens, tokens)
        if tallied:
            self._tallies = _with_room(self._tallies, self._tokens, tokens)
        self._entries, self._tokens = torch.ops.transcoder_cpp.keep_entries(
            readable(codes),
            codes.indices.contiguous(),
            codes.row_ptr.contiguous(),
            None if weight is None else weight.contiguous(),
            None if tally is None else tally.contiguous(),
            moments.total,
            moments.square,
            moments.count,
            self._partners,
            self._starts,
            self._weights if weighted else None,
            self._tallies if tallied else None,
            self._entries,
            self._tokens,
        )
        return self._entries >= self.limit

    def settle(self, product: Tensor, joint: Tensor) -> None:
        """Add all buffered entries to the triangle's sums, in place."""
        if self._entries:
            wide, weighted, tallied = self._kind
            weights, tallies = self._weights if weighted else None, self._tallies if tallied else None
            torch.ops.transcoder_cpp.add_kept(
                self._partners,
                self._starts,
                weights,
                tallies,
                self._entries,
                self._tokens,
                wide,
                self.d_sae,
                product,
                joint,
            )
        self._entries = self._tokens = 0


def _kind(codes: SparseCodes, weight: Tensor | None, tally: Tensor | None) -> tuple[bool, bool, bool]:
    return codes.values.dtype == torch.float64, weight is not None, tally is not None


def _with_room(kept: Tensor, used: int, needed: int, wanted: int = 0) -> Tensor:
    """`kept`, or a longer one that begins with its first `used` numbers, with room for `needed`, and `wanted` or twice as many
    as before."""
    if kept.numel() >= needed:
        return kept
    longer = torch.empty(max(needed, wanted or 2 * kept.numel()), dtype=kept.dtype, device="cpu")
    longer[:used] = kept[:used]
    return longer


class Mined(NamedTuple):
    """Result of one pass over the pairs that fired together."""

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
    total: int
    """Pairs that passed, of which P are listed."""


def mine(
    products: Sequence[Tensor],
    joints: Sequence[Tensor],
    apart: Tensor,
    inverse: Tensor,
    fired: Tensor,
    least: float,
    least_union: float,
    most: int,
    edges: Tensor | None,
) -> Mined:
    """The pairs that fired together with r = product * inverse_i * inverse_j - apart_i * apart_j of at least `least` and
    fired_i + fired_j - joint of at least `least_union`; of more than `most` those of the highest r.

    Args:
        products, joints: the sums of parts of one stream, packed triangles.
        apart, inverse: [d_sae] float64.   fired: [d_sae] in the dtype of the summed counts.
        edges: [bins + 1] float64, ascending; None counts no histogram.
    """
    edges = None if edges is None else edges.contiguous()
    return Mined(
        *torch.ops.transcoder_cpp.survey_pairs(products, joints, apart, inverse, fired, least, least_union, most, edges)
    )


def sketch_add(rows: Tensor, ones: Tensor, entries: Entries, weights: Tensor | None, tokens: int, *keys: int) -> None:
    """`rows[latent] += weighted * signs[token]` over the entries, `ones += sum of weights * signs` over the tokens, in place.

    Args:
        rows: [d_sae, m] fp32.   ones: [m] fp32.   weights: [tokens] float64, None for 1.
        keys: of `counter.signs`, which is not built.

    `rows` are backend `torch`'s to the bit; so are `ones` without weights, with them their sum is in another order.
    """
    weights = None if weights is None else weights.contiguous()
    torch.ops.transcoder_cpp.sketch_add(
        entries.latent, entries.row, entries.weighted.contiguous(), weights, tokens, key_state(*keys), rows, ones
    )


def similar_rows(left: Tensor, right: Tensor, above: float, apart: int) -> tuple[Tensor, Tensor, Tensor]:
    """(i, j, left_i . right_j), each [P], of the pairs whose product exceeds `above` and j > i + apart. fp32; products are
    computed in tiles and filtered in the cache. The same bits for any number of threads."""
    left, right = left.contiguous(), right.contiguous()
    found: tuple[Tensor, Tensor, Tensor] = torch.ops.transcoder_cpp.similar_rows(left, right, above, apart)
    return found
