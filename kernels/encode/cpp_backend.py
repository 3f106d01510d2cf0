"""Backend `cpp` of the encode ops: tiles of pre-activations through torch's BLAS, selection on the warm tile (csrc/).

Screening: with TRANSCODER_SCREEN=bf16 in the environment the ops multiply fp32 inputs in bf16 where the CPU has units for that
(AVX512-BF16, AMX), keep every entry that a rigorous error bound leaves in question, and decide by exact fp32 dot products
(csrc/screened.cpp). The selection is exact for those dot products on any input; inputs on which the bound does not help are
slow, not wrong (`batch_topk_encode` and `threshold_encode` then run unscreened). Values are fp32 sums in another
order than those of the unscreened product: they differ from them in the last bits, and so may the choice between entries that
differ by as little. Results are bitwise reproducible, for any number of threads too.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from transcoder.kernels import segments_cpp as segments
from transcoder.kernels.encode.torch_backend import Selection
from transcoder.kernels.extension import usable
from transcoder.kernels.sparse_codes import SparseCodes

__all__ = ["gradients", "select_batch_topk", "select_threshold", "select_topk", "transposed", "usable"]


def screens(x: Tensor, W: Tensor) -> bool:
    """Whether the ops screen these inputs: screening is requested, inputs are fp32, and bf16 products are fast and summed in
    fp32."""
    asked = os.environ.get("TRANSCODER_SCREEN", "")
    if asked not in ("", "bf16"):
        raise ValueError(f"environment variable TRANSCODER_SCREEN: expected 'bf16' or nothing, got {asked!r}")
    return bool(asked) and x.dtype == W.dtype == torch.float32 and multiplies_bf16()


def multiplies_bf16() -> bool:
    """Whether products in bf16 are fast here, and summed in fp32."""
    units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return bool(torch.backends.mkldnn.enabled) and any(bool(getattr(torch.cpu, unit, bool)()) for unit in units)


def select_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> Selection:
    select = torch.ops.transcoder_cpp.topk_screened if screens(x, W) else torch.ops.transcoder_cpp.topk
    values, indices = select(*_wide(x, W, b), k)
    return Selection(values.view(-1), indices.view(-1), torch.arange(0, x.shape[0] * k + 1, k, device=x.device))


def select_batch_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> Selection:
    ops = torch.ops.transcoder_cpp
    return Selection(*(ops.batch_topk_screened if screens(x, W) else ops.batch_topk)(*_wide(x, W, b), k))


def select_threshold(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> Selection:
    ops, limits = torch.ops.transcoder_cpp, threshold.expand(W.shape[0]).contiguous()
    return Selection(*(ops.above_screened if screens(x, W) else ops.above)(*_wide(x, W, b), limits))


def gradients(
    grad: Tensor, x: Tensor, W: Tensor | None, codes: SparseCodes, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, W_enc, b_enc) from per-entry gradients [nnz], inactive entries already 0; None where not needed.

    `W` may be None where x needs none.
    """
    grad_x = grad_W = grad_b = None
    if needs[0] and W is not None:
        grad_x = segments.weighted_row_sum(W, codes.indices, codes.row_ptr, grad)
    if needs[1] or needs[2]:
        grad_W, grad_b = segments.sums_by_latent(x, codes, grad, rows=needs[1], totals=needs[2])
    return grad_x, grad_W, grad_b


def transposed(W: Tensor, factors: Tensor | None = None, *, back: bool = False) -> Tensor:
    """An encoder W [d_in, d_sae], whose latents are columns, in the layout of the ops: [d_sae, d_in], each latent times its
    factor.

    Args:
        W: float32 or float64; with `back` [d_sae, d_in], and the result is [d_in, d_sae].   factors: [d_sae] of W's dtype.

    Equivalent to: `W.T.contiguous()`, or `W.T * factors[:, None]` (with `back` `W.T * factors`), to the bit.
    """
    matrix = W.detach().contiguous()
    found: Tensor = torch.ops.transcoder_cpp.transposed(
        matrix, None if factors is None else factors.detach().contiguous(), back
    )
    return found


def _wide(*tensors: Tensor) -> tuple[Tensor, ...]:
    """16-bit inputs widened: their products are then exact, and sums are fp32."""
    dtype = tensors[-1].dtype
    return tuple(t.detach().to(dtype).contiguous() for t in tensors)
