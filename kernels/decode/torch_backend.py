"""Backend `torch` of the nested loss: prefixes are walked, never stored.

The forward walks up: one running reconstruction [B, d_out], each entry of the codes added once, the loss read at every
prefix boundary. The backward walks down from the saved final residual, subtracting one group of latents at a time, so the
prefix gradient G_p = sum_{q >= p} dL/d(reconstruction_q) that all of a group's gradients need is a running sum as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transcoder.kernels.segments import row_dots, weighted_row_sum
from transcoder.kernels.sparse_codes import SparseCodes


@dataclass(frozen=True)
class Group:
    """The entries whose latents lie in [first, last), as compressed rows.

    On the CPU they are compacted (`entries` lists them). On an accelerator that would need a size on the host, so all
    entries stay and `member` masks their weights.
    """

    first: int
    last: int
    rows: Tensor
    ids: Tensor
    ptr: Tensor
    entries: Tensor | None
    member: Tensor | None

    def take(self, values: Tensor) -> Tensor:
        """The group's part of per-entry values [nnz]."""
        if self.member is not None:
            return torch.where(self.member, values, torch.zeros_like(values))
        return values if self.entries is None else values[self.entries]

    def put(self, into: Tensor, values: Tensor) -> None:
        """Write the group's per-entry values back to their places in `into` [nnz]."""
        if self.member is not None:
            into.copy_(torch.where(self.member, values, into))
        elif self.entries is None:
            into.copy_(values)
        else:
            into[self.entries] = values


def groups_of(codes: SparseCodes, widths: Sequence[int]) -> list[Group]:
    """One Group a Matryoshka step: latents [0, w_1), [w_1, w_2), ... Kept with the codes for the backward."""
    known = codes.derived(f"groups {list(widths)}", lambda: _make_groups(codes, widths))
    assert isinstance(known, list)
    return known


def _make_groups(codes: SparseCodes, widths: Sequence[int]) -> list[Group]:
    rows, ids, ptr = codes.rows(), codes.indices, codes.row_ptr
    bounds = list(zip([0, *widths], widths, strict=False))
    if len(bounds) == 1 and widths[0] == codes.shape[1]:
        return [Group(0, widths[0], rows, ids, ptr, None, None)]
    every_row = torch.arange(codes.shape[0] + 1, device=codes.device)
    groups = []
    for first, last in bounds:
        member = (ids >= first) & (ids < last)
        if codes.device.type == "cpu":
            entries = member.nonzero().squeeze(1)
            own_rows = rows[entries]
            own_ptr = torch.searchsorted(own_rows, every_row)
            groups.append(Group(first, last, own_rows, ids[entries], own_ptr, entries, None))
        else:
            groups.append(Group(first, last, rows, ids, ptr, None, member))
    return groups


def decode(values: Tensor, codes: SparseCodes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """[B, d_out] = codes @ W_dec + b_dec, in the dtype of `values`."""
    return weighted_row_sum(W_dec, codes.indices, codes.row_ptr, values) + b_dec.to(values.dtype)


def decode_gradients(
    grad: Tensor, values: Tensor, codes: SparseCodes, W_dec: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (values [nnz], W_dec, b_dec) from grad [B, d_out]; None where not needed."""
    grad_values = grad_W = grad_b = None
    if needs[0]:
        grad_values = row_dots(grad, W_dec, codes.rows(), codes.indices, codes.row_ptr)
    if needs[1]:
        order = codes.by_latent()
        grad_W = weighted_row_sum(grad, order.rows, order.latent_ptr, values[order.permutation])
    if needs[2]:
        grad_b = grad.sum(0)
    return grad_values, grad_W, grad_b


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
    values, W_dec, residual = _wide(values, dtype), _wide(W_dec, dtype), _wide(b_dec, dtype) - _wide(y, dtype)
    errors = []
    for group in groups_of(codes, widths):
        residual += weighted_row_sum(W_dec, group.ids, group.ptr, group.take(values))
        per_token = torch.linalg.vector_norm(residual, dim=1).square()
        errors.append((per_token if token_weights is None else per_token * token_weights).sum())
    return torch.stack(errors), residual.to(dtype)


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
    groups, order, dtype = groups_of(codes, widths), codes.by_latent(), values.dtype
    values, W_dec, residual, doubled = (_wide(t, dtype) for t in (values, W_dec, residual, 2 * scales))
    rows_scale = None if token_weights is None else _wide(token_weights, dtype)[:, None]
    grad_values = torch.zeros_like(values)
    grad_W = W_dec.new_zeros(W_dec.shape)
    by_latent = values[order.permutation]
    bounds = order.latent_ptr[[g.first for g in groups] + [groups[-1].last]].tolist() if values.is_cpu else None
    running = torch.zeros_like(residual)
    for p in reversed(range(len(groups))):
        group = groups[p]
        step = residual * doubled[p]
        running += step if rows_scale is None else step * rows_scale
        group.put(grad_values, row_dots(running, W_dec, group.rows, group.ids, group.ptr))
        if bounds is not None:
            own = slice(bounds[p], bounds[p + 1])
            ptr = order.latent_ptr[group.first : group.last + 1] - bounds[p]
            grad_W[group.first : group.last] = weighted_row_sum(running, order.rows[own], ptr, by_latent[own])
        else:
            whole = weighted_row_sum(running, order.rows, order.latent_ptr, by_latent)
            grad_W[group.first : group.last] = whole[group.first : group.last]
        if p > 0:
            residual = residual - weighted_row_sum(W_dec, group.ids, group.ptr, group.take(values))
    return grad_values.to(dtype), grad_W.to(dtype), running.to(dtype)


def _wide(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """In fp64 where values are fp64, else in fp32: squares of fp16 numbers overflow fp16 within one token."""
    return tensor.to(torch.float64 if dtype == torch.float64 else torch.float32)
