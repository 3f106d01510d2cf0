"""Weighted sums and dot products over compressed lists of rows: the parts of decode and of every gradient.

Backend `torch`: PyTorch's embedding-bag kernels, which gather and reduce without storing [nnz, d], one owner a bag, so the
order of additions is fixed and the results are bitwise reproducible.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def weighted_row_sum(table: Tensor, ids: Tensor, ptr: Tensor, weights: Tensor) -> Tensor:
    """out[m] = sum over j in ptr[m] .. ptr[m + 1] of weights[j] * table[ids[j]].

    Args:
        table: [R, d]; cast to the dtype of `weights`, which is the dtype of the sum.
        ids: [n] int64 in [0, R).
        ptr: [M + 1] int64, ptr[0] == 0 and ptr[M] == n.
        weights: [n].

    Returns: [M, d].
    """
    if ptr.numel() == 1 or table.shape[1] == 0 or ids.numel() == 0:
        return weights.new_zeros(ptr.numel() - 1, table.shape[1])
    return F.embedding_bag(
        ids, table.to(weights.dtype), ptr, mode="sum", per_sample_weights=weights, include_last_offset=True
    )


def row_dots(left: Tensor, table: Tensor, rows: Tensor, ids: Tensor, ptr: Tensor) -> Tensor:
    """out[j] = <left[rows[j]], table[ids[j]]>, without storing [n, d].

    Args:
        left: [M, d].
        table: [R, d] of the same dtype.
        rows: [n] int64 ascending, the segment of each j.
        ids: [n] int64 in [0, R).
        ptr: [M + 1] int64, the bounds of the segments in `rows`.

    Returns: [n].
    """
    if ids.numel() == 0 or left.shape[1] == 0:
        return left.new_zeros(ids.numel())
    sum_mode, no_padding = 0, -1
    # Both contiguous: on some CPUs the sum over strided rows has another order, and other last bits.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left.contiguous(),
        table.to(left.dtype).contiguous(),
        *(t.contiguous() for t in (ids, ptr, rows)),
        sum_mode,
        no_padding,
    )


def segment_sum(values: Tensor, ptr: Tensor) -> Tensor:
    """out[m] = sum of values[ptr[m] .. ptr[m + 1]] for values [n], ptr [M + 1]. Returns: [M]."""
    if values.numel() == 0:
        return values.new_zeros(ptr.numel() - 1)
    return torch.segment_reduce(values, "sum", offsets=ptr, initial=0)
