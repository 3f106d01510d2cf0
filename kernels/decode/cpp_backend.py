"""Backend `cpp` of decode and the nested loss (csrc/decode.cpp).

The forward walks the prefixes of a row up while the row is in registers. The backward walks down group by group, because
the gradient of a decoder row needs the residuals of all tokens at its prefix; reading a decoder row once serves both the
gradient of the value and the step down.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.kernels import segments_cpp as segments
from transcoder.kernels.extension import usable
from transcoder.kernels.segments_cpp import prepared
from transcoder.kernels.sparse_codes import SparseCodes

__all__ = ["decode", "decode_gradients", "prefix_errors", "prefix_gradients", "usable"]


def decode(values: Tensor, codes: SparseCodes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """[B, d_out] = codes @ W_dec + b_dec, in the dtype of `values`."""
    return segments.weighted_row_sum(W_dec, codes.indices, codes.row_ptr, values, b_dec)


def decode_gradients(
    grad: Tensor, values: Tensor, codes: SparseCodes, W_dec: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (values [nnz], W_dec, b_dec) from grad [B, d_out]; None where not needed."""
    grad_values = segments.row_dots(grad, W_dec, codes.indices, codes.row_ptr) if needs[0] else None
    grad_W = segments.sums_by_latent(grad, codes, values)[0] if needs[1] else None
    return grad_values, grad_W, grad.sum(0) if needs[2] else None


def prefix_errors(
    values: Tensor,
    codes: SparseCodes,
    widths: tuple[int, ...],
    W_dec: Tensor,
    b_dec: Tensor,
    y: Tensor,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """(squared errors summed over tokens and d_out, one a prefix [P], fp32 or wider; final residual [B, d_out])."""
    dtype = values.dtype
    errors, residual = torch.ops.transcoder_cpp.prefix_errors(
        prepared(values, dtype),
        codes.indices.contiguous(),
        codes.row_ptr.contiguous(),
        widths,
        prepared(W_dec, dtype),
        prepared(b_dec, dtype),
        prepared(y, dtype),
        None if token_weights is None else prepared(token_weights, dtype),
    )
    return errors, residual.to(dtype)


def prefix_gradients(
    values: Tensor,
    codes: SparseCodes,
    widths: tuple[int, ...],
    W_dec: Tensor,
    residual: Tensor,
    scales: Tensor,
    token_weights: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of sum_p scales[p] * errors[p] for (values [nnz], W_dec [d_sae, d_out], reconstruction [B, d_out])."""
    dtype = values.dtype
    found = torch.ops.transcoder_cpp.prefix_gradients(
        prepared(values, dtype),
        codes.indices.contiguous(),
        codes.row_ptr.contiguous(),
        *codes.by_latent(),
        widths,
        prepared(W_dec, dtype),
        prepared(residual, dtype),
        prepared(scales, dtype),
        None if token_weights is None else prepared(token_weights, dtype),
    )
    grad_values, grad_W, grad_reconstruction = (t.to(dtype) for t in found)
    return grad_values, grad_W, grad_reconstruction
