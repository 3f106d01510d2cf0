"""Backend `cpp` of the sums in `segments.py`: csrc/decode.cpp. Sums are fp32 or fp64; 16-bit tables are widened first."""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.kernels.sparse_codes import SparseCodes


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def prepared(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(wide(dtype)).contiguous()


def weighted_row_sum(table: Tensor, ids: Tensor, ptr: Tensor, weights: Tensor, start: Tensor | None = None) -> Tensor:
    """`segments.weighted_row_sum`, and `start` [d] added to every row."""
    dtype = weights.dtype
    first = None if start is None else prepared(start, dtype)
    sums, _ = torch.ops.transcoder_cpp.row_sums(
        prepared(table, dtype), ids.contiguous(), ptr.contiguous(), prepared(weights, dtype), None, first, True, False
    )
    return sums.to(dtype)


def row_dots(left: Tensor, table: Tensor, ids: Tensor, ptr: Tensor) -> Tensor:
    """`segments.row_dots`."""
    dtype = left.dtype
    dots = torch.ops.transcoder_cpp.row_dots(
        prepared(left, dtype), prepared(table, dtype), ids.contiguous(), ptr.contiguous()
    )
    return dots.to(dtype)


def sums_by_latent(
    left: Tensor, codes: SparseCodes, weights: Tensor, *, rows: bool = True, totals: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Over the tokens of each latent: sum of weight * left[token] [d_sae, d], and sum of weight [d_sae].

    Equivalent to: `w = codes.with_values(weights).to_dense(); w.T @ left, w.sum(0)`.
    """
    dtype, order = weights.dtype, codes.by_latent()
    sums, total = torch.ops.transcoder_cpp.row_sums(
        prepared(left, dtype),
        order.rows,
        order.latent_ptr,
        prepared(weights, dtype),
        order.permutation,
        None,
        rows,
        totals,
    )
    return sums.to(dtype) if rows else None, total.to(dtype) if totals else None
