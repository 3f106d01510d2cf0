"""Selection on our kernels from a library's own parameters, whichever way round it keeps them."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transcoder.kernels import (
    SparseCodes,
    active_backend,
    batch_topk_encode,
    threshold_encode,
    topk_encode,
    use_backend,
)
from transcoder.kernels.backend import backend_module

How = Literal["topk", "batch_topk", "threshold"]


class _Select(torch.autograd.Function):
    """Values of the selected entries; gradients by the kernels, handed back in the parameter's own layout."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W: Tensor,
        b: Tensor,
        scale: Tensor | None,
        rows: bool,
        how: How,
        argument: Any,
        derived: dict[str, object],
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.backend = active_backend(x.device, "encode", torch.promote_types(x.dtype, W.dtype))
        biases = b.detach() if scale is None else b.detach() * scale
        latents = _scaled(W.detach(), scale) if rows else _transposed(W.detach(), scale, ctx.backend)
        if how == "topk":
            codes = topk_encode(x, latents, biases, argument)
        elif how == "batch_topk":
            codes = _largest(x, latents, biases, argument)
        else:
            codes = threshold_encode(x, latents, biases, argument)
        values, indices, row_ptr = codes.values.detach(), codes.indices, codes.row_ptr
        if scale is not None:
            values = values / _divisors(scale)[indices]
        derived.update(codes._derived)
        ctx.mark_non_differentiable(indices, row_ptr)
        ctx.save_for_backward(x, W if rows and scale is None else latents, scale, values, indices, row_ptr)
        ctx.rows, ctx.derived, ctx.dtypes = rows, derived, (x.dtype, W.dtype, b.dtype)
        return values, indices, row_ptr

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
        x, latents, scale, values, indices, row_ptr = ctx.saved_tensors
        needs_x, needs_W, needs_b = ctx.needs_input_grad[:3]
        if scale is not None:
            # `latents` are scaled: so, for x, these; for W and b the scale comes back below.
            grad = grad / _divisors(scale)[indices]
        codes = SparseCodes.trusted(values, indices, row_ptr, (x.shape[0], latents.shape[0]), ctx.derived)
        with use_backend(ctx.backend):
            order = list(codes.by_latent()) if needs_W or needs_b else []
            found = iter(
                torch.ops.transcoder.encode_gradients(
                    *(grad, values, indices, row_ptr, order, x, latents if needs_x else None, latents.shape[0]),
                    [needs_x, needs_W, needs_b],
                    torch.promote_types(x.dtype, latents.dtype),
                    ctx.backend,
                )
            )
        grad_x, grad_W, grad_b = (next(found) if need else None for need in (needs_x, needs_W, needs_b))
        x_dtype, W_dtype, b_dtype = ctx.dtypes
        if grad_W is not None:
            grad_W = _scaled(grad_W, scale) if ctx.rows else _transposed(grad_W, scale, ctx.backend, back=True)
            grad_W = grad_W.to(W_dtype)
        if grad_b is not None:
            grad_b = (grad_b if scale is None else grad_b * scale).to(b_dtype)
        return (None if grad_x is None else grad_x.to(x_dtype)), grad_W, grad_b, None, None, None, None, None


def _divisors(scale: Tensor) -> Tensor:
    """What undoes the scale: of a latent whose scale is 0, all values are 0."""
    return scale.masked_fill(scale == 0, torch.inf)


def _scaled(latents: Tensor, factors: Tensor | None) -> Tensor:
    """[d_sae, d_in], each latent times its factor."""
    return latents.contiguous() if factors is None else latents * factors[:, None]


def _transposed(W: Tensor, factors: Tensor | None, backend: str, back: bool = False) -> Tensor:
    """[d_in, d_sae] as [d_sae, d_in], each latent times its factor; `back` the other way."""
    same = factors is None or factors.dtype == W.dtype
    if W.dtype in (torch.float32, torch.float64) and same and backend == "cpp":
        found: Tensor = backend_module("encode", "cpp").transposed(W, factors, back=back)
        return found
    if factors is None:
        return W.T.contiguous()
    # Scaled and transposed in one pass over the matrix.
    return torch.mul(W.T, factors if back else factors[:, None], out=W.T.new_empty(W.T.shape))


def _largest(x: Tensor, latents: Tensor, biases: Tensor, count: int) -> SparseCodes:
    """The `count` largest activations of the batch: whole multiples of the batch by the kernel, then cut to size."""
    codes = batch_topk_encode(x, latents, biases, -(-count // x.shape[0]))
    if codes.nnz == count:
        return codes
    kept = codes.values.topk(count, sorted=False).indices.sort().values
    chosen = torch.zeros(codes.nnz + 1, dtype=torch.int64, device=x.device)
    chosen[kept + 1] = 1
    row_ptr = chosen.cumsum(0)[codes.row_ptr]
    return SparseCodes.trusted(codes.values[kept], codes.indices[kept], row_ptr, codes.shape)


def product_dtype(x: Tensor, W: Tensor) -> torch.dtype:
    """Of x @ W in a library's code: autocast's, or what the two promote to."""
    wide = torch.promote_types(x.dtype, W.dtype)
    if wide != torch.float64 and torch.is_autocast_enabled(x.device.type):
        return torch.get_autocast_dtype(x.device.type)
    return wide


def select(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    how: How,
    argument: Any,
    *,
    scale: Tensor | None = None,
    rows: bool = False,
) -> SparseCodes:
    """Codes of x [B, d_in] from a library's encoder, in its graph.

    Args:
        W: [d_in, d_sae], or [d_sae, d_in] with `rows`.   b: [d_sae].
        how, argument: `topk` and k; `batch_topk` and the number of entries of the batch; `threshold` and a number at or above
            0 or [d_sae].
        scale: [d_sae] positive factors that decide what is selected (decoder norms), or None. No gradient.

    Equivalent to: the selection among `relu((x @ W + b) * scale)`, with the values of `relu(x @ W + b)`.
    """
    derived: dict[str, object] = {}
    values, indices, row_ptr = _Select.apply(
        x, W, b, None if scale is None else scale.detach(), rows, how, argument, derived
    )
    return SparseCodes.trusted(values, indices, row_ptr, (x.shape[0], b.shape[0]), derived)
