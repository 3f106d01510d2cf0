"""Backend `cpp` of what is counted beside the correlation (csrc/count_ops.h): one pass over a batch's entries, on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend
from transcoder.kernels.codes import SparseCodes


def runs(codes: SparseCodes) -> bool:
    return codes.values.is_cpu and active_backend("cpu", "correlation") == "cpp"


def readable(codes: SparseCodes) -> Tensor:
    """The values as the loops take them; a wrong pattern is refused before they walk it."""
    codes.validate()
    values = codes.values.detach()
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).contiguous()


def mark_places(codes: SparseCodes, place: Tensor, weights: Tensor | None, bits: int, marks: Tensor) -> None:
    """`marks[latent * bits + place[row]] = 1` where an entry fires on a token of weight above 0, in place.

    Args:
        place: [B] int64 in [0, bits).   weights: [B] or None.   marks: [d_sae * bits] uint8.
    """
    weights = None if weights is None else weights.double().contiguous()
    torch.ops.transcoder_cpp.mark_places(
        readable(codes), codes.indices.contiguous(), codes.row_ptr.contiguous(), place, weights, bits, marks
    )


def add_by_group(codes: SparseCodes, i: Tensor, j: Tensor, group: Tensor, weights: Tensor | None, sums: Tensor) -> None:
    """For pairs of latents and groups of tokens add up, in place, over the tokens of each group: the weight; weight times
    value, and times its square, of i; the same of j; weight times the product.

    Args:
        i, j: [P] int64.   group: [B] int64 in [0, groups).   weights: [B] or None.   sums: [6, P, groups] float64.
    """
    weights = None if weights is None else weights.detach().double().contiguous()
    order = codes.by_latent()
    torch.ops.transcoder_cpp.add_by_group(
        readable(codes), order.permutation, order.rows, order.latent_ptr, i, j, group, weights, sums
    )
