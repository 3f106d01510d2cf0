"""Nearest other rows of a matrix, by cosine or inner product, on backend `cpp` (csrc/nearest_rows.cpp, csrc/screened.h).

Products in bf16, where the CPU has units for them, propose candidates, and fp32 dot products decide. The result is that of the
fp32 dot products, bitwise the same for any number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend
from transcoder.kernels.encode.cpp_backend import multiplies_bf16


def runs(W: Tensor) -> bool:
    """Whether backend `cpp` is active and takes W: contiguous fp32 on a CPU that has units for bf16."""
    plain = W.is_cpu and W.dtype == torch.float32 and W.dim() == 2 and W.is_contiguous()
    return plain and multiplies_bf16() and active_backend("cpu", "decode") == "cpp"


def nearest_above(W: Tensor, rows: Tensor, least: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """(cosine [R], partner [R], length [n]): for each of `rows` [R] the largest cosine with another row of W [n, d] that
    exceeds `least` >= 0, and the lowest such row; 0 and -1 where there is none. None if W is not finite: the errors have no
    bound then.

    Equivalent to: `u = F.normalize(W, dim=1); c = u[rows] @ u.T; c[arange(R), rows] = -1; c.max(1)` where that exceeds `least`.
    """
    cosine, partner, length = torch.ops.transcoder_cpp.nearest_above(W, rows.contiguous(), least)
    return (cosine, partner, length) if length.numel() == W.shape[0] else None


def nearest(unit: Tensor, rows: Tensor) -> Tensor | None:
    """[R]: the largest inner product of each of `rows` [R] of `unit` [n, d] with another row, n >= 2. None where backend `cpp`
    does not run, or where some row has none above 0.

    Equivalent to: `c = unit[rows] @ unit.T; c[arange(R), rows] = -inf; c.max(1).values`.
    """
    if not (unit.is_cpu and unit.dtype == torch.float32 and active_backend("cpu", "encode") == "cpp"):
        return None
    ops = torch.ops.transcoder_cpp
    select = ops.topk_screened if multiplies_bf16() else ops.topk
    # A row is usually its own nearest row: one of the best two is another row.
    values, ids = select(unit[rows].contiguous(), unit.contiguous(), unit.new_zeros(unit.shape[0]), 2)
    best: Tensor = torch.where(ids == rows[:, None], -torch.inf, values).amax(1)
    return None if bool((best <= 0).any()) else best


def rows_in_zeros(values: Tensor, rows: Tensor, total: int) -> Tensor:
    """[total, d]: zeros but for `values` [n, d] at `rows` [n], each once."""
    whole: Tensor = torch.ops.transcoder_cpp.rows_in_zeros(values.contiguous(), rows.contiguous(), total)
    return whole
