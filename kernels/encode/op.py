"""The encode ops: checks -> selection -> autograd -> public function."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels import checks as check
from transcoder.kernels import registration
from transcoder.kernels.backend import active_backend, backend_module
from transcoder.kernels.registration import codes_of
from transcoder.kernels.sparse_codes import SparseCodes

Selected = tuple[Tensor, Tensor, Tensor]
"""(values, indices, row_ptr) of the codes."""


def _selecting(how: str) -> Callable[..., Selected]:
    """The computation of an op: the backend's function of this name."""

    def run(
        x: Tensor, W_enc: Tensor, b_enc: Tensor, argument: int | Tensor, dtype: torch.dtype, backend: str, *_: object
    ) -> Selected:
        select = getattr(backend_module("encode", backend), how)
        return tuple(select(x.to(dtype), W_enc.to(dtype), b_enc.to(_wide(dtype)), argument))

    return run


_topk, _batch_topk, _threshold = (_selecting(f"select_{how}") for how in ("topk", "batch_topk", "threshold"))


def _static_sizes(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, dtype: torch.dtype, _: str) -> Selected:
    return _sizes(x, x.shape[0] * k, dtype)


def _dynamic_sizes(x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor, dtype: torch.dtype, _: str) -> Selected:
    return _sizes(x, torch.library.get_ctx().new_dynamic_size(), dtype)


def _sizes(x: Tensor, nnz: int | torch.SymInt, dtype: torch.dtype) -> Selected:
    values = x.new_empty(nnz, dtype=_wide(dtype))
    return values, values.new_empty(nnz, dtype=torch.int64), values.new_empty(x.shape[0] + 1, dtype=torch.int64)


def _gradients(
    grad: Tensor,
    values: Tensor,
    indices: Tensor,
    row_ptr: Tensor,
    order: Sequence[Tensor],
    x: Tensor,
    W_enc: Tensor | None,
    d_sae: int,
    needs: list[bool],
    dtype: torch.dtype,
    backend: str,
    derived: dict[str, object] | None = None,
) -> list[Tensor]:
    # An inactive entry sits at the flat side of the ReLU. A NaN is not inactive: it must reach the gradients.
    grad = torch.where(values <= 0, torch.zeros_like(grad), grad)
    codes = codes_of(values, indices, row_ptr, d_sae, order, derived)
    W_rounded = None if W_enc is None else W_enc.to(dtype)
    found = backend_module("encode", backend).gradients(grad, x.to(dtype), W_rounded, codes, tuple(needs))
    return [g for g in found if g is not None]


def _gradient_sizes(grad: Tensor, *rest: Any) -> list[Tensor]:
    *_, x, _, d_sae, needs, _, _ = rest
    shapes = ((x.shape[0], x.shape[1]), (d_sae, x.shape[1]), (d_sae,))
    return [grad.new_empty(shape) for shape, needed in zip(shapes, needs, strict=True) if needed]


_INPUTS = "Tensor x, Tensor W_enc, Tensor b_enc, {}, ScalarType dtype, str backend"
_RESULTS = "(Tensor values, Tensor indices, Tensor row_ptr)"
TOPK = registration.define(f"topk_encode({_INPUTS.format('SymInt k')}) -> {_RESULTS}", _topk, _static_sizes)
BATCH_TOPK = registration.define(
    f"batch_topk_encode({_INPUTS.format('SymInt k')}) -> {_RESULTS}", _batch_topk, _static_sizes
)
THRESHOLD = registration.define(
    f"threshold_encode({_INPUTS.format('Tensor threshold')}) -> {_RESULTS}",
    _threshold,
    _dynamic_sizes,
    tags=(torch.Tag.dynamic_output_shape,),
)
GRADIENTS = registration.define(
    "encode_gradients(Tensor grad, Tensor values, Tensor indices, Tensor row_ptr, Tensor[] order, Tensor x, "
    "Tensor? W_enc, SymInt d_sae, bool[] needs, ScalarType dtype, str backend) -> Tensor[]",
    _gradients,
    _gradient_sizes,
)
"""Gradients of those of (x, W_enc, b_enc) that `needs` names, in the dtype of `values`. `order` is the feature-major order,
empty where neither W_enc nor b_enc needs one; W_enc may be None where x needs none."""


def _remember(ctx: Any, inputs: tuple[Any, ...], output: Selected) -> None:
    x, W_enc, b_enc, _, dtype, backend = inputs
    values, indices, row_ptr = output
    ctx.save_for_backward(x, W_enc if ctx.needs_input_grad[0] else None, values, indices, row_ptr)
    ctx.mark_non_differentiable(indices, row_ptr)
    ctx.d_sae, ctx.compute, ctx.backend, ctx.derived = W_enc.shape[0], dtype, backend, None
    ctx.dtypes = (x.dtype, W_enc.dtype, b_enc.dtype)


def _backward(ctx: Any, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    x, W_enc, values, indices, row_ptr = ctx.saved_tensors
    needs = list(ctx.needs_input_grad[:3])
    order: tuple[Tensor, ...] = ()
    if ctx.derived is None and (needs[1] or needs[2]):
        order = registration.by_latent(indices, row_ptr, ctx.d_sae, ctx.backend)
    gradients: Callable[..., list[Tensor]] = (
        GRADIENTS if ctx.derived is None else functools.partial(_gradients, derived=ctx.derived)
    )
    found = iter(
        gradients(grad_values, values, indices, row_ptr, order, x, W_enc, ctx.d_sae, needs, ctx.compute, ctx.backend)
    )
    grads = (next(found).to(dtype) if needed else None for needed, dtype in zip(needs, ctx.dtypes, strict=True))
    return *grads, None, None, None


for _op in (TOPK, BATCH_TOPK, THRESHOLD):
    registration.differentiate(_op, _remember, _backward)
registration.differentiable_once(GRADIENTS)


_DIRECTLY = {
    op: registration.run_directly(run, _remember, _backward)
    for op, run in ((TOPK, _topk), (BATCH_TOPK, _batch_topk), (THRESHOLD, _threshold))
}


def topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, checks: check.Checks = "fast") -> SparseCodes:
    """The k largest activations of each token, exactly (Gao et al. 2024, "Scaling and evaluating sparse autoencoders").

    Args:
        x: [B, d_in] float32, float64, bfloat16 or float16; any strides.
        W_enc: [d_sae, d_in], a latent is a row.
        b_enc: [d_sae].
        k: entries kept a token, 1 <= k <= d_sae.
        checks: `full` also refuses NaN or Inf in x by row (reads the device); `fast` lets a NaN through to the values.

    Returns:
        SparseCodes of nnz = B * k: ties go to the lowest latent id, rows with fewer than k positive pre-activations carry
        zeros. Values are fp32 (fp64 for fp64 inputs): the accumulators of the product, which is computed in the wider of
        the two input dtypes, or in autocast's dtype where that is on.

    Gradients: x, W_enc, b_enc receive them from selected entries with a positive pre-activation only.

    Raises: TypeError or ValueError naming the argument, for a wrong dtype, shape, device or k.

    Equivalent to: `torch.relu(x @ W_enc.T + b_enc).topk(k, dim=-1)`, never storing [B, d_sae].
    """
    _check_inputs("topk_encode", x, W_enc, b_enc, checks)
    check.check_k("topk_encode", k, W_enc.shape[0])
    return _encode(TOPK, x, W_enc, b_enc, k)


def batch_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, checks: check.Checks = "fast") -> SparseCodes:
    """The k * B largest activations of the whole batch, exactly (Bussmann et al. 2024, "BatchTopK sparse autoencoders").

    Arguments, dtypes, gradients and errors as `topk_encode`; rows have varying lengths, nnz = B * k.

    Equivalent to: `torch.relu(x @ W_enc.T + b_enc).flatten().topk(k * B)`; ties go to the lowest (row, latent).
    """
    _check_inputs("batch_topk_encode", x, W_enc, b_enc, checks)
    check.check_k("batch_topk_encode", k, W_enc.shape[0])
    return _encode(BATCH_TOPK, x, W_enc, b_enc, k)


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, *, checks: check.Checks = "fast"
) -> SparseCodes:
    """The activations above a threshold: BatchTopK at inference, JumpReLU (Rajamanoharan et al. 2024).

    Arguments, dtypes and errors as `topk_encode`, and:
        threshold: a number >= 0, or [d_sae] numbers (the sign of a tensor is not checked, since the host does not read it).

    Returns: SparseCodes whose nnz depends on the data, so its size is read on the host. No gradient to the threshold.

    Equivalent to: `pre = x @ W_enc.T + b_enc; torch.where(pre > threshold, pre, 0)`.
    """
    _check_inputs("threshold_encode", x, W_enc, b_enc, checks)
    wide = _wide(_compute_dtype(x, W_enc))
    if isinstance(threshold, Tensor):
        if threshold.dim() > 1 or (threshold.dim() == 1 and threshold.shape[0] != W_enc.shape[0]):
            raise ValueError(
                f"threshold_encode: threshold: expected a number or shape [{W_enc.shape[0]}], got {list(threshold.shape)}"
            )
        limit = threshold.detach().to(device=x.device, dtype=wide)
    else:
        if not threshold >= 0:
            raise ValueError(f"threshold_encode: threshold: expected at least 0, got {threshold}")
        limit = torch.tensor(float(threshold), device=x.device, dtype=wide)
    return _encode(THRESHOLD, x, W_enc, b_enc, limit.clamp_min(0))


def _check_inputs(op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, checks: str) -> None:
    check.check_mode(op, checks)
    check.check_float_matrix(op, "W_enc", W_enc)
    if W_enc.shape[0] == 0:
        raise ValueError(f"{op}: W_enc: expected at least one latent, got shape {list(W_enc.shape)}")
    check.check_float_matrix(op, "x", x, columns=W_enc.shape[1])
    check.check_float_vector(op, "b_enc", b_enc, W_enc.shape[0])
    check.check_one_device(op, x=x, W_enc=W_enc, b_enc=b_enc)
    if checks == "full":
        if torch.compiler.is_compiling():
            torch._dynamo.graph_break(
                msg=f"{op}: checks='full' reads x on the host; pass checks='fast' where it is compiled"
            )
        check.check_finite_rows(op, "x", x)


def _compute_dtype(x: Tensor, W_enc: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, W_enc.dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _encode(op: torch._ops.OpOverload, x: Tensor, W_enc: Tensor, b_enc: Tensor, argument: int | Tensor) -> SparseCodes:
    derived: dict[str, object] = {}
    dtype = _compute_dtype(x, W_enc)
    arguments = (x, W_enc, b_enc, argument, dtype, active_backend(x.device, "encode", dtype))
    with torch.autocast(x.device.type, enabled=False):
        if registration.traced(x, W_enc, b_enc):
            values, indices, row_ptr = op(*arguments)
        else:
            values, indices, row_ptr = _DIRECTLY[op](*arguments, derived)
    return SparseCodes.trusted(values, indices, row_ptr, (x.shape[0], W_enc.shape[0]), derived)
