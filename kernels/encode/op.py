"""The encode ops: checks -> selection -> autograd -> public function."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from transcoder.kernels import checks as check
from transcoder.kernels.backend import implementation
from transcoder.kernels.codes import SparseCodes
from transcoder.kernels.encode.torch_backend import Selection

Select = Callable[[Tensor, Tensor, Tensor], Selection]


class _Encode(torch.autograd.Function):
    """values = relu(x @ W_enc.T + b_enc) at the selected places; the choice itself is constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        select: Select,
        dtype: torch.dtype,
        derived: dict[str, object],
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x_rounded, W_rounded = x.to(dtype), W_enc.to(dtype)
        values, indices, row_ptr = select(x_rounded, W_rounded, b_enc.to(wide))
        ctx.save_for_backward(x_rounded, W_rounded if ctx.needs_input_grad[0] else None, values, indices, row_ptr)
        ctx.shape, ctx.derived = (x.shape[0], W_enc.shape[0]), derived
        ctx.dtypes = (x.dtype, W_enc.dtype, b_enc.dtype)
        ctx.mark_non_differentiable(indices, row_ptr)
        return values, indices, row_ptr

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_values: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc, values, indices, row_ptr = ctx.saved_tensors
        # An inactive entry sits at the flat side of the ReLU. A NaN is not inactive: it must reach the gradients.
        grad = torch.where(values <= 0, torch.zeros_like(grad_values), grad_values)
        codes = SparseCodes(values, indices, row_ptr, ctx.shape, ctx.derived)
        found = implementation("encode", x.device).gradients(grad, x, W_enc, codes, ctx.needs_input_grad[:3])
        grads = (g if g is None else g.to(dtype) for g, dtype in zip(found, ctx.dtypes, strict=True))
        return *grads, None, None, None


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
    select = implementation("encode", x.device).select_topk
    return _encode(x, W_enc, b_enc, functools.partial(select, k=k))


def batch_topk_encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, *, checks: check.Checks = "fast") -> SparseCodes:
    """The k * B largest activations of the whole batch, exactly (Bussmann et al. 2024, "BatchTopK sparse autoencoders").

    Arguments, dtypes, gradients and errors as `topk_encode`; rows have varying lengths, nnz = B * k.

    Equivalent to: `torch.relu(x @ W_enc.T + b_enc).flatten().topk(k * B)`; ties go to the lowest (row, latent).
    """
    _check_inputs("batch_topk_encode", x, W_enc, b_enc, checks)
    check.check_k("batch_topk_encode", k, W_enc.shape[0])
    select = implementation("encode", x.device).select_batch_topk
    return _encode(x, W_enc, b_enc, functools.partial(select, k=k))


def threshold_encode(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, threshold: Tensor | float, *, checks: check.Checks = "fast"
) -> SparseCodes:
    """The activations above a threshold: BatchTopK at inference, JumpReLU (Rajamanoharan et al. 2024).

    Arguments, dtypes and errors as `topk_encode`, and:
        threshold: a number >= 0, or [d_sae] numbers (a tensor is not read on the host, so its sign is the caller's care).

    Returns: SparseCodes whose nnz depends on the data, so its size is read on the host. No gradient to the threshold.

    Equivalent to: `pre = x @ W_enc.T + b_enc; torch.where(pre > threshold, pre, 0)`.
    """
    _check_inputs("threshold_encode", x, W_enc, b_enc, checks)
    wide = torch.float64 if _compute_dtype(x, W_enc) == torch.float64 else torch.float32
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
    select = implementation("encode", x.device).select_threshold
    return _encode(x, W_enc, b_enc, functools.partial(select, threshold=limit.clamp_min(0)))


def _check_inputs(op: str, x: Tensor, W_enc: Tensor, b_enc: Tensor, checks: str) -> None:
    check.check_mode(op, checks)
    check.check_float_matrix(op, "W_enc", W_enc)
    if W_enc.shape[0] == 0:
        raise ValueError(f"{op}: W_enc: expected at least one latent, got shape {list(W_enc.shape)}")
    check.check_float_matrix(op, "x", x, columns=W_enc.shape[1])
    check.check_float_vector(op, "b_enc", b_enc, W_enc.shape[0])
    check.check_one_device(op, x=x, W_enc=W_enc, b_enc=b_enc)
    if checks == "full":
        check.check_finite_rows(op, "x", x)


def _compute_dtype(x: Tensor, W_enc: Tensor) -> torch.dtype:
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(x.device.type)
    return torch.promote_types(x.dtype, W_enc.dtype)


def _encode(x: Tensor, W_enc: Tensor, b_enc: Tensor, select: Select) -> SparseCodes:
    derived: dict[str, object] = {}
    dtype = _compute_dtype(x, W_enc)
    with torch.autocast(x.device.type, enabled=False):
        values, indices, row_ptr = _Encode.apply(x, W_enc, b_enc, select, dtype, derived)
    return SparseCodes(values, indices, row_ptr, (x.shape[0], W_enc.shape[0]), derived)
