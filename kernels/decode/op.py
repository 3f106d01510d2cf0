"""The decode ops: checks -> launch -> autograd -> public function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transcoder.kernels import checks as check
from transcoder.kernels import registration
from transcoder.kernels.backend import active_backend, backend_module
from transcoder.kernels.registration import codes_of
from transcoder.kernels.sparse_codes import SparseCodes

Derived = dict[str, object] | None
"""Data kept with codes (SparseCodes.derived); None inside a traced op, which receives tensors only."""


class NestedLoss(NamedTuple):
    """What `nested_loss` returns."""

    value: Tensor
    """Scalar: sum over prefixes of weight * loss. Differentiable."""
    per_prefix: Tensor
    """[P]: the loss of each prefix, unweighted. Differentiable."""
    residual: Tensor
    """[B, d_out]: reconstruction by the widest prefix minus y. Detached."""


def _decode(
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    backend: str,
    derived: Derived = None,
) -> Tensor:
    codes = codes_of(values, indices, row_ptr, W_dec.shape[0], (), derived)
    out: Tensor = backend_module("decode", backend).decode(values, codes, W_dec, b_dec)
    return out


def _decode_sizes(values: Tensor, indices: Tensor, row_ptr: Tensor, W_dec: Tensor, *_: Any) -> Tensor:
    return values.new_empty(row_ptr.shape[0] - 1, W_dec.shape[1])


def _decode_gradients(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor,
    order: Sequence[Tensor],
    W_dec: Tensor,
    needs: list[bool],
    backend: str,
    derived: Derived = None,
) -> list[Tensor]:
    codes = codes_of(values, indices, row_ptr, W_dec.shape[0], order, derived)
    module = backend_module("decode", backend)
    return [g for g in module.decode_gradients(grad, values, codes, W_dec, tuple(needs)) if g is not None]


def _decode_gradient_sizes(grad: Tensor, values: Tensor, *rest: Any) -> list[Tensor]:
    *_, W_dec, needs, _ = rest
    shapes = (values.shape, W_dec.shape, W_dec.shape[1:])
    return [values.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


def _nested(
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor,
    W_dec: Tensor,
    b_dec: Tensor,
    y: Tensor,
    token_weights: Tensor | None,
    widths: list[int],
    backend: str,
    derived: Derived = None,
) -> tuple[Tensor, Tensor]:
    codes = codes_of(values, indices, row_ptr, W_dec.shape[0], (), derived)
    errors, residual = backend_module("decode", backend).prefix_errors(
        values, codes, tuple(widths), W_dec, b_dec, y.to(values.dtype), token_weights
    )
    return errors, residual.contiguous()


def _nested_sizes(values: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    *_, y, _, widths, _ = rest
    # Losses are sums of squares: fp32 at least, whatever the codes are.
    wide = torch.float64 if values.dtype == torch.float64 else torch.float32
    return values.new_empty(len(widths), dtype=wide), values.new_empty(y.shape)


def _nested_gradients(
    grad_errors: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor,
    order: Sequence[Tensor],
    W_dec: Tensor,
    residual: Tensor,
    token_weights: Tensor | None,
    widths: list[int],
    backend: str,
    derived: Derived = None,
) -> tuple[Tensor, Tensor, Tensor]:
    codes = codes_of(values, indices, row_ptr, W_dec.shape[0], order, derived)
    found = backend_module("decode", backend).prefix_gradients(
        values, codes, tuple(widths), W_dec, residual, grad_errors, token_weights
    )
    return tuple(found)


def _nested_gradient_sizes(grad_errors: Tensor, values: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    *_, W_dec, residual, _, _, _ = rest
    return values.new_empty(values.shape), values.new_empty(W_dec.shape), values.new_empty(residual.shape)


_CODES = "Tensor values, Tensor indices, Tensor row_ptr"
DECODE = registration.define(
    f"sparse_decode({_CODES}, Tensor W_dec, Tensor b_dec, str backend) -> Tensor", _decode, _decode_sizes
)
DECODE_GRADIENTS = registration.define(
    f"sparse_decode_gradients(Tensor grad, {_CODES}, Tensor[] order, Tensor W_dec, bool[] needs, str backend) -> Tensor[]",
    _decode_gradients,
    _decode_gradient_sizes,
)
"""Gradients of those of (values, W_dec, b_dec) that `needs` names, in the dtype of `values`. `order` is the feature-major
order, empty where W_dec needs none."""
NESTED = registration.define(
    f"nested_loss({_CODES}, Tensor W_dec, Tensor b_dec, Tensor y, Tensor? token_weights, SymInt[] widths, str backend) "
    "-> (Tensor errors, Tensor residual)",
    _nested,
    _nested_sizes,
)
"""Squared errors summed over tokens and d_out, one a prefix [P], and the widest prefix's residual [B, d_out]."""
NESTED_GRADIENTS = registration.define(
    f"nested_loss_gradients(Tensor grad_errors, {_CODES}, Tensor[] order, Tensor W_dec, Tensor residual, "
    "Tensor? token_weights, SymInt[] widths, str backend) -> (Tensor, Tensor, Tensor)",
    _nested_gradients,
    _nested_gradient_sizes,
)
"""Gradients of (values, W_dec, the reconstruction [B, d_out]), in the dtype of `values`."""


def _remember_decode(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    values, indices, row_ptr, W_dec, b_dec, backend = inputs
    ctx.save_for_backward(values, indices, row_ptr, W_dec)
    ctx.dtypes, ctx.backend, ctx.derived = (values.dtype, W_dec.dtype, b_dec.dtype), backend, None


def _decode_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, row_ptr, W_dec = ctx.saved_tensors
    needs = [ctx.needs_input_grad[n] for n in (0, 3, 4)]
    if ctx.derived is None:
        order = registration.by_latent(indices, row_ptr, W_dec.shape[0], ctx.backend) if needs[1] else ()
        grads = DECODE_GRADIENTS(grad, values, indices, row_ptr, order, W_dec, needs, ctx.backend)
    else:
        grads = _decode_gradients(grad, values, indices, row_ptr, (), W_dec, needs, ctx.backend, ctx.derived)
    found = iter(grads)
    of_values, of_W, of_b = (
        next(found).to(dtype) if needed else None for needed, dtype in zip(needs, ctx.dtypes, strict=True)
    )
    return of_values, None, None, of_W, of_b, None


def _remember_nested(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    values, indices, row_ptr, W_dec, b_dec, y, token_weights, widths, backend = inputs
    ctx.save_for_backward(values, indices, row_ptr, W_dec, output[1], token_weights)
    ctx.mark_non_differentiable(output[1])
    ctx.dtypes, ctx.widths = (W_dec.dtype, b_dec.dtype, y.dtype), widths
    ctx.backend, ctx.derived = backend, None


def _nested_backward(ctx: Any, grad_errors: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    values, indices, row_ptr, W_dec, residual, token_weights = ctx.saved_tensors
    rest = (W_dec, residual, token_weights, ctx.widths, ctx.backend)
    if ctx.derived is None:
        order = registration.by_latent(indices, row_ptr, W_dec.shape[0], ctx.backend)
        grads = NESTED_GRADIENTS(grad_errors, values, indices, row_ptr, order, *rest)
    else:
        grads = _nested_gradients(grad_errors, values, indices, row_ptr, (), *rest, ctx.derived)
    grad_values, grad_W, grad_reconstruction = grads
    W_dtype, b_dtype, y_dtype = ctx.dtypes
    return (
        grad_values,
        None,
        None,
        grad_W.to(W_dtype),
        grad_reconstruction.sum(0).to(b_dtype),
        -grad_reconstruction.to(y_dtype) if ctx.needs_input_grad[5] else None,
        None,
        None,
        None,
    )


registration.differentiate(DECODE, _remember_decode, _decode_backward)
registration.differentiate(NESTED, _remember_nested, _nested_backward)
registration.differentiable_once(DECODE_GRADIENTS)
registration.differentiable_once(NESTED_GRADIENTS)


_decode_directly = registration.run_directly(_decode, _remember_decode, _decode_backward)
_nested_directly = registration.run_directly(_nested, _remember_nested, _nested_backward)


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
    backend = active_backend(codes.device, "decode")
    arguments = (codes.values, codes.indices, codes.row_ptr, W_dec, b_dec, backend)
    with torch.autocast(codes.device.type, enabled=False):
        if registration.traced(codes.values, W_dec, b_dec):
            out: Tensor = DECODE(*arguments)
        else:
            out = _decode_directly(*arguments, codes._derived)
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
    _check_shape(op, "y", y, codes.shape[0], W_dec.shape[1])
    check.check_one_device(op, codes=codes.values, y=y)
    if weights is not None and len(weights) != len(widths):
        raise ValueError(f"{op}: weights: expected one a prefix, {len(widths)}, got {len(weights)}")
    if token_weights is not None:
        check.check_float_vector(op, "token_weights", token_weights, codes.shape[0])
        check.check_one_device(op, codes=codes.values, token_weights=token_weights)
        token_weights = token_weights.detach().to(codes.dtype)
    backend = active_backend(codes.device, "decode")
    arguments = (codes.values, codes.indices, codes.row_ptr, W_dec, b_dec, y, token_weights, tuple(widths), backend)
    with torch.autocast(codes.device.type, enabled=False):
        if registration.traced(codes.values, W_dec, b_dec, y):
            errors, residual = NESTED(*arguments)
        else:
            errors, residual = _nested_directly(*arguments, codes._derived)
        per_prefix = errors / max(1, y.numel())
        # Python numbers stay Python numbers: a tensor of them would cost a transfer each step.
        terms = (
            per_prefix if weights is None else torch.stack([w * e for w, e in zip(weights, per_prefix, strict=True)])
        )
        return NestedLoss(terms.sum(), per_prefix, residual)


def _check_inputs(op: str, codes: SparseCodes, W_dec: Tensor, b_dec: Tensor) -> None:
    check.check_codes(op, codes)
    _check_shape(op, "W_dec", W_dec, codes.shape[1])
    check.check_float_vector(op, "b_dec", b_dec, W_dec.shape[1])
    check.check_one_device(op, codes=codes.values, W_dec=W_dec, b_dec=b_dec)


def _check_shape(op: str, name: str, value: Tensor, rows: int, columns: int | None = None) -> None:
    check.check_float_matrix(op, name, value)
    # Formatted only on error: a size in a message becomes a constant of the compiled graph and forces recompilation.
    if value.shape[0] != rows or (columns is not None and value.shape[1] != columns):
        check.check_float_matrix(op, name, value, columns=columns, rows=rows)
