"""Backend `triton` of the decode ops: launches, in the order of one step.

The nested loss reads each row of W_dec named by the codes once forward (walk_up) and once backward (walk_down). The gradient
of W_dec needs, for a latent of group g, the prefix gradients G_g of the rows that fired it. Counted at B = 4096, d_out =
2304, 4 prefixes, fp32 (one [B, d_out] is 37.7 MB):

- all G stored: 151 MB written, then read by the gathers from memory; and [P, B, d_out] must not exist;
- group by group with a running [B, d_out], as backend `torch`: residual and gradient read and written 4 times, 604 MB;
- G stored for one slab of columns at a time (config.SLAB_BYTES), the buffer used again for the next: the row-wise pass and the
  feature-major pass alternate, and the slab stays in the second-level cache between them. No memory traffic beyond the
  result, always 24 MiB of extra memory. Chosen.

Every size is static: no host reads, capturable in a CUDA graph.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from transcoder.kernels.decode import config
from transcoder.kernels.gather_config import gather
from transcoder.kernels.sparse_codes import SparseCodes
from transcoder.kernels.triton_support import cdiv, check_device, on_its_device, usable

if usable():
    from transcoder.kernels.decode import kernel
    from transcoder.kernels.segments_triton import ACCUMULATOR, WIDE, row_dots, weighted_row_sum

__all__ = ["decode", "decode_gradients", "prefix_errors", "prefix_gradients", "usable"]


@on_its_device
def decode(values: Tensor, codes: SparseCodes, W_dec: Tensor, b_dec: Tensor) -> Tensor:
    """[B, d_out] = codes @ W_dec + b_dec, in the dtype of `values`."""
    check_device("sparse_decode", values.device)
    # A row has about k entries: splitting one over programs would cost a second launch for every batch.
    return weighted_row_sum(W_dec, codes.indices, codes.row_ptr, values, bias=b_dec, split=False)


@on_its_device
def decode_gradients(
    grad: Tensor, values: Tensor, codes: SparseCodes, W_dec: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (values [nnz], W_dec, b_dec) from grad [B, d_out]; None where not needed."""
    check_device("sparse_decode", values.device)
    grad_values = grad_W = grad_b = None
    if needs[0]:
        grad_values = row_dots(grad, W_dec, codes.indices, codes.row_ptr)
    if needs[1]:
        order = codes.by_latent()
        grad_W = weighted_row_sum(grad, order.rows, order.latent_ptr, values[order.permutation])
    if needs[2]:
        grad_b = grad.sum(0)
    return grad_values, grad_W, grad_b


@on_its_device
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
    check_device("nested_loss", values.device)
    rows, columns = y.shape
    residual = torch.empty(rows, columns, dtype=values.dtype, device=values.device)
    totals = torch.zeros(len(widths), dtype=WIDE[values.dtype], device=values.device)
    if residual.numel() == 0:
        return totals, residual
    choice, accumulator = gather(W_dec), ACCUMULATOR[values.dtype]
    tiles = cdiv(columns, choice.columns)
    partial = torch.empty(len(widths), tiles, rows, dtype=WIDE[values.dtype], device=values.device)
    kernel.walk_up[(rows, tiles)](
        values.contiguous(), codes.indices.contiguous(), codes.row_ptr.contiguous(), _cuts(codes, widths),
        W_dec, b_dec.contiguous(), y, partial, residual, rows, columns, len(widths), *W_dec.stride(), *y.stride(),
        ACC=accumulator, ROWS=choice.rows, TILE=choice.columns, num_warps=choice.warps,
    )  # fmt: skip
    kernel.prefix_totals[(len(widths),)](
        partial, _or_unused(token_weights, partial), totals, rows, tiles,
        WEIGHTED=token_weights is not None, ACC=accumulator, TOKENS=config.TOTAL_TOKENS, num_warps=config.TOTAL_WARPS,
    )  # fmt: skip
    return totals, residual


@on_its_device
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
    check_device("nested_loss", values.device)
    rows, columns = residual.shape
    entries, prefixes, widest = codes.nnz, len(widths), widths[-1]
    running = torch.empty_like(residual, memory_format=torch.contiguous_format)
    grad_W = torch.empty(W_dec.shape, dtype=values.dtype, device=values.device)
    if residual.numel() == 0:
        return torch.zeros_like(values), grad_W.zero_(), running
    values, ids, row_ptr = values.contiguous(), codes.indices.contiguous(), codes.row_ptr.contiguous()
    choice, accumulator, wide = gather(W_dec), ACCUMULATOR[values.dtype], WIDE[values.dtype]
    tiles = cdiv(columns, choice.columns)
    partial = torch.empty(tiles, entries, dtype=wide, device=values.device)
    latent_ptr, slab_rows, by_latent = _feature_major(values, codes, widths)

    # With one prefix its gradient is that of the reconstruction, which is written anyway.
    nested = prefixes > 1 or wide != values.dtype
    width = config.slab_columns(rows, prefixes, wide.itemsize, choice.columns) if nested else tiles * choice.columns
    slab = torch.empty(prefixes * rows, min(width, columns), dtype=wide, device=values.device) if nested else running
    grad_W[widest:].zero_()
    for first, last in config.slabs(columns, width):
        kernel.walk_down[(rows, cdiv(last - first, choice.columns))](
            values, ids, row_ptr, _cuts(codes, widths), W_dec, residual.contiguous(), scales.contiguous(),
            _or_unused(token_weights, residual), running, slab, partial,
            rows, columns, prefixes, entries, first, last, *W_dec.stride(), slab.stride(0),
            WEIGHTED=token_weights is not None, SLAB=nested,
            ACC=accumulator, ROWS=choice.rows, TILE=choice.columns, num_warps=choice.warps,
        )  # fmt: skip
        weighted_row_sum(
            slab[:, : last - first], slab_rows, latent_ptr[: widest + 1], by_latent, out=grad_W[:widest, first:last]
        )
    grad_values = (partial[0] if tiles == 1 else partial.sum(0)).to(values.dtype)
    return grad_values, grad_W, running


def _feature_major(values: Tensor, codes: SparseCodes, widths: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """(latent_ptr, row of the gradient slab of each entry, value of each entry), by latent."""
    order = codes.by_latent()
    slab_rows, by_latent = torch.empty_like(order.rows), torch.empty_like(values)
    if codes.nnz:
        kernel.feature_major[(cdiv(codes.nnz, config.COPIES),)](
            values, codes.indices.contiguous(), order.permutation, order.rows, _on_device(widths, values.device),
            by_latent, slab_rows, codes.shape[0], codes.nnz, len(widths), COPIES=config.COPIES,
        )  # fmt: skip
    return order.latent_ptr, slab_rows, by_latent


def _cuts(codes: SparseCodes, widths: tuple[int, ...]) -> Tensor:
    """[B, P] int64: where each row's prefixes end. Kept with the codes for the backward."""

    def make() -> Tensor:
        searches = codes.shape[0] * len(widths)
        cuts = torch.empty(codes.shape[0], len(widths), dtype=torch.int64, device=codes.device)
        kernel.prefix_cuts[(cdiv(searches, config.SEARCHES),)](
            codes.indices.contiguous(), codes.row_ptr.contiguous(), _on_device(widths, codes.device), cuts,
            searches, len(widths), SEARCHES=config.SEARCHES,
        )  # fmt: skip
        return cuts

    cuts = codes.derived(f"cuts {list(widths)}", make)
    assert isinstance(cuts, Tensor)
    return cuts


@functools.lru_cache(maxsize=64)
def _on_device(widths: tuple[int, ...], device: torch.device) -> Tensor:
    # Sent once: a transfer each step would make the host wait.
    return torch.tensor(widths, dtype=torch.int64, device=device)


def _or_unused(token_weights: Tensor | None, unused: Tensor) -> Tensor:
    """A launch needs a pointer even for an argument that the kernel does not read."""
    return unused if token_weights is None else token_weights.contiguous()
