"""The decode ops: checks -> launch -> autograd -> public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transcoder.kernels import checks as check
from transcoder.kernels.backend import implementation
from transcoder.kernels.codes import SparseCodes


class NestedLoss(NamedTuple):
    """What `nested_loss` returns."""

    value: Tensor
    """Scalar: sum over prefixes of weight * loss. Differentiable."""
    per_prefix: Tensor
    """[P]: the loss of each prefix, unweighted. Differentiable."""
    residual: Tensor
    """[B, d_out]: reconstruction by the widest prefix minus y. Detached."""


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, b_dec: Tensor, codes: SparseCodes) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.codes, ctx.dtypes = codes, (W_dec.dtype, b_dec.dtype)
        out: Tensor = implementation("decode", values.device).decode(values, codes, W_dec, b_dec)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        found = implementation("decode", grad.device).decode_gradients(
            grad, values, ctx.codes, W_dec, ctx.needs_input_grad[:3]
        )
        dtypes = (values.dtype, *ctx.dtypes)
        grads = (g if g is None else g.to(dtype) for g, dtype in zip(found, dtypes, strict=True))
        return *grads, None


class _PrefixErrors(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        values: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        y: Tensor,
        token_weights: Tensor | None,
        codes: SparseCodes,
        widths: tuple[int, ...],
    ) -> tuple[Tensor, Tensor]:
        errors, residual = implementation("decode", values.device).prefix_errors(
            values, codes, widths, W_dec, b_dec, y.to(values.dtype), token_weights
        )
        ctx.save_for_backward(values, W_dec, residual, token_weights)
        ctx.codes, ctx.widths, ctx.dtypes = codes, widths, (W_dec.dtype, b_dec.dtype, y.dtype)
        ctx.mark_non_differentiable(residual)
        return errors, residual

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_errors: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec, residual, token_weights = ctx.saved_tensors
        grad_values, grad_W, grad_reconstruction = implementation("decode", values.device).prefix_gradients(
            values, ctx.codes, ctx.widths, W_dec, residual, grad_errors, token_weights
        )
        W_dtype, b_dtype, y_dtype = ctx.dtypes
        return (
            grad_values,
            grad_W.to(W_dtype),
            grad_reconstruction.sum(0).to(b_dtype),
            -grad_reconstruction.to(y_dtype) if ctx.needs_input_grad[3] else None,
            None,
            None,
            None,
        )


def sparse_decode(codes: SparseCodes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """Reconstruction from compressed codes; gradients to values, W_dec and b_dec without any [B, d_sae] or [B, k, d_out].

    Args:
        codes: SparseCodes of shape (B, d_sae).
        W_dec: [d_sae, d_out] floating, a latent is a row.
        b_dec: [d_out].

    Returns: [B, d_out] in the dtype of `codes.values` (sums in that dtype, also under autocast).

    Raises: TypeError or ValueError naming the argument, for a wrong dtype, shape or device.

    Equivalent to: `codes.to_dense() @ W_dec + b_dec`.
    """
    _check_inputs("sparse_decode", codes, W_dec, b_dec)
    with torch.autocast(codes.device.type, enabled=False):
        out: Tensor = _Decode.apply(codes.values, W_dec, b_dec, codes.detach())
    return out


def nested_loss(
    codes: SparseCodes,
    W_dec: Tensor,
    b_dec: Tensor,
    y: Tensor,
    widths: Sequence[int],
    weights: Sequence[float] | Tensor | None = None,
    *,
    token_weights: Tensor | None = None,
) -> NestedLoss:
    """Matryoshka reconstruction loss (Bussmann et al. 2025): every prefix of the dictionary must reconstruct y by itself.

    Args:
        codes: SparseCodes of shape (B, d_sae), indices ascending within a row.
        W_dec: [d_sae, d_out].   b_dec: [d_out].   y: [B, d_out] the targets.
        widths: cumulative prefix widths, strictly increasing, the last at most d_sae; latents beyond it take no part.
        weights: one a prefix (numbers, or [P]); None weighs each 1.
        token_weights: [B] factors on each token's squared error (importance weights of mean 1); None is 1. No gradient.

    Returns:
        NestedLoss(value, per_prefix [P], residual [B, d_out]). The mean runs over tokens and d_out; multiply by d_out for
        the convention that sums over d_out. B = 0 gives zeros.

    Raises: TypeError or ValueError naming the argument.

    Equivalent to: for each w in widths, `F.mse_loss(codes.to_dense()[:, :w] @ W_dec[:w] + b_dec, y)`; one pass over the
    codes forward and one backward, no prefix stored.
    """
    op = "nested_loss"
    _check_inputs(op, codes, W_dec, b_dec)
    check.check_widths(op, widths, codes.shape[1])
    check.check_float_matrix(op, "y", y, columns=W_dec.shape[1], rows=codes.shape[0])
    check.check_one_device(op, codes=codes.values, y=y)
    if weights is not None and len(weights) != len(widths):
        raise ValueError(f"{op}: weights: expected one a prefix, {len(widths)}, got {len(weights)}")
    if token_weights is not None:
        check.check_float_vector(op, "token_weights", token_weights, codes.shape[0])
        check.check_one_device(op, codes=codes.values, token_weights=token_weights)
        token_weights = token_weights.detach().to(codes.dtype)
    with torch.autocast(codes.device.type, enabled=False):
        errors, residual = _PrefixErrors.apply(
            codes.values, W_dec, b_dec, y, token_weights, codes.detach(), tuple(widths)
        )
        per_prefix = errors / max(1, y.numel())
        # Numbers multiply as numbers: a tensor of them would cost a transfer each step.
        terms = (
            per_prefix if weights is None else torch.stack([w * e for w, e in zip(weights, per_prefix, strict=True)])
        )
        return NestedLoss(terms.sum(), per_prefix, residual)


def _check_inputs(op: str, codes: SparseCodes, W_dec: Tensor, b_dec: Tensor) -> None:
    check.check_codes(op, codes)
    check.check_float_matrix(op, "W_dec", W_dec, rows=codes.shape[1])
    check.check_float_vector(op, "b_dec", b_dec, W_dec.shape[1])
    check.check_one_device(op, codes=codes.values, W_dec=W_dec, b_dec=b_dec)
