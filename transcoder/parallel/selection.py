"""Exact TopK and BatchTopK of pre-activations whose latents, and tokens, lie on several ranks.

Each rank offers candidates that hold its part of the result; ranks agree on the smallest chosen one. No size depends on data.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from transcoder.kernels.encode.torch_backend import first_reaching

DIGIT = 11
"""Bits that one all-reduce decides: 2048 counts."""


def top_of_row(values: Tensor, ids: Tensor, k: int, group: dist.ProcessGroup) -> Tensor:
    """Which of this rank's candidates are among the k largest of their row over the group; ties to the lowest id, NaN largest.

    Args:
        values: [B, c], none negative but those of candidates that are not to be chosen (-1).   ids: [B, c] int64, global.
        k: at least one entry a row, at most as many as the group has that may be chosen. c is equal on all ranks.

    Returns: [B, c] bool. One all-gather of 2 * c numbers a row and rank.
    """
    rows, count = values.shape
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    numbers = torch.int64 if values.dtype == torch.float64 else torch.int32
    mine = torch.stack([values.contiguous().view(numbers), ids.to(numbers)])
    parts = [torch.empty_like(mine) for _ in range(ranks)]
    dist.all_gather(parts, mine, group=group)
    every = torch.stack(parts).permute(1, 2, 0, 3).reshape(2, rows, ranks * count)
    # By ascending id, so that the first of equal values is the one with the lowest id.
    order = every[1].argsort(dim=1)
    ordered = every[0].view(values.dtype).gather(1, order)
    chosen = first_reaching(ordered, ordered.topk(k, dim=1).values[:, -1:], k)
    return torch.empty_like(chosen).scatter_(1, order, chosen)[:, rank * count : (rank + 1) * count]


def top_of_batch(values: Tensor, place: Tensor, wanted: int, most: int, groups: list[dist.ProcessGroup]) -> Tensor:
    """Which of this rank's candidates are among the `wanted` largest of all ranks; ties to the lowest place, NaN largest.

    Args:
        values: [n] fp32 or fp64, none negative; n may differ between ranks, and all together are at least `wanted`.
        place: [n] int64 in [0, most), different for every candidate: token * d_sae + latent.
        groups: whose sums, one after another, are sums over all ranks.

    Returns: [n] bool. One all-reduce of 2048 counts for every 11 bits of a value, and of a place.
    """
    values = torch.where(values.isnan(), torch.full_like(values, torch.nan), values) + 0.0
    bits = 64 if values.dtype == torch.float64 else 32
    keys = values.view(torch.int64 if bits == 64 else torch.int32).long()
    left = torch.full((), wanted, dtype=torch.int64, device=values.device)
    smallest, left = _kth_largest(keys, torch.ones_like(keys, dtype=torch.bool), left, bits - 1, groups)
    # The lowest places are the largest of the reversed ones.
    reverse, equal = most - 1 - place, keys == smallest
    last, _ = _kth_largest(reverse, equal, left, max(1, (most - 1).bit_length()), groups)
    return (keys > smallest) | (equal & (reverse >= last))


def _kth_largest(
    keys: Tensor, member: Tensor, k: Tensor, bits: int, groups: list[dist.ProcessGroup]
) -> tuple[Tensor, Tensor]:
    """(the k-th largest of the member keys of all ranks, how many of its equals are among the k), by digits from the top.

    keys: [n] int64 in [0, 2^bits).   k: 0-dim int64, from 1 to the number of members.
    """
    found = torch.zeros_like(k)
    for shift in range((bits - 1) // DIGIT * DIGIT, -1, -DIGIT):
        digit = (keys >> shift) & ((1 << DIGIT) - 1)
        counts = torch.zeros(1 << DIGIT, dtype=torch.int64, device=keys.device).index_add_(0, digit, member.long())
        for group in groups:
            dist.all_reduce(counts, group=group)
        # at_least[d]: members whose digit is d or more. The k-th has the largest d with at_least[d] >= k.
        at_least = counts.flip(0).cumsum(0).flip(0)
        chosen = (at_least >= k).sum() - 1
        k = k - (at_least[chosen] - counts[chosen])
        found = found | (chosen << shift)
        member = member & (digit == chosen)
    return found, k
