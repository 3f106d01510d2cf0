"""Backend `torch` of the encode ops: pre-activations by chunks of rows, exact selection on the warm chunk.

No [B, d_sae] tensor exists at any time. On the CPU the slow exact paths (ties, flat rows) run only for the rows that need
them, which reads a count; on an accelerator every size is static, so nothing waits for the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Pre-activations alive at a time. CPU: 4 MiB stays in a core's outer cache between the product and the selection.
CUDA: 256 MiB keeps the product at full rate and is still a fraction of [B, d_sae]."""
MIN_CHUNK_ROWS = 64
"""Below this a matrix product is bound by reading W_enc again for every chunk."""


class Selection(NamedTuple):
    values: Tensor
    indices: Tensor
    row_ptr: Tensor


def select_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> Selection:
    rows, d_sae = x.shape[0], W.shape[0]
    values = torch.empty(rows, k, dtype=b.dtype, device=x.device)
    indices = torch.empty(rows, k, dtype=torch.int64, device=x.device)
    for start, stop, activations in _activation_chunks(x, W, b):
        chosen = _topk_ids(activations, k)
        indices[start:stop] = chosen
        values[start:stop] = activations.gather(1, chosen)
    row_ptr = torch.arange(0, rows * k + 1, k, device=x.device)
    return Selection(values.view(-1), indices.view(-1), row_ptr) if rows else _empty(x, b, d_sae)


def select_batch_topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> Selection:
    rows, d_sae = x.shape[0], W.shape[0]
    if rows == 0:
        return _empty(x, b, d_sae)
    collect = _collect_dynamic if x.device.type == "cpu" else _collect_static
    values, flat = collect(_activation_chunks(x, W, b), rows * k, d_sae, b)
    row_of = torch.div(flat, d_sae, rounding_mode="floor")
    row_ptr = torch.searchsorted(row_of, torch.arange(rows + 1, device=x.device))
    return Selection(values, flat - row_of * d_sae, row_ptr)


def select_threshold(x: Tensor, W: Tensor, b: Tensor, threshold: Tensor) -> Selection:
    if x.shape[0] == 0:
        return _empty(x, b, W.shape[0])
    values, indices, counts = [], [], []
    for _, _, pre in _activation_chunks(x, W, b, relu=False):
        above = pre > threshold
        row, latent = above.nonzero(as_tuple=True)
        values.append(pre[row, latent])
        indices.append(latent)
        counts.append(above.sum(1))
    row_ptr = torch.zeros(x.shape[0] + 1, dtype=torch.int64, device=x.device)
    torch.cumsum(torch.cat(counts), 0, out=row_ptr[1:])
    return Selection(torch.cat(values), torch.cat(indices), row_ptr)


def _empty(x: Tensor, b: Tensor, d_sae: int) -> Selection:
    ids = torch.empty(0, dtype=torch.int64, device=x.device)
    return Selection(b.new_empty(0), ids, torch.zeros(1, dtype=torch.int64, device=x.device))


def _activation_chunks(x: Tensor, W: Tensor, b: Tensor, relu: bool = True) -> Iterator[tuple[int, int, Tensor]]:
    """(start, stop, [stop - start, d_sae] pre-activations in the dtype of b): fp32 accumulators for 16-bit inputs."""
    rows, d_sae = x.shape[0], W.shape[0]
    budget = CHUNK_ELEMENTS.get(x.device.type, CHUNK_ELEMENTS["cuda"]) // d_sae
    size = max(1, min(max(MIN_CHUNK_ROWS, budget), (rows + 1) // 2))
    widen = x.dtype != b.dtype
    if widen and x.device.type == "cpu":
        # CPU products of 16-bit types round their result; products of the widened inputs are exact, sums are fp32.
        x, W, widen = x.to(b.dtype), W.to(b.dtype), False
    for start in range(0, rows, size):
        stop = min(start + size, rows)
        part = x[start:stop]
        pre = torch.mm(part, W.T, out_dtype=b.dtype).add_(b) if widen else torch.addmm(b, part, W.T)
        yield start, stop, pre.clamp_min_(0) if relu else pre


def _topk_ids(activations: Tensor, k: int) -> Tensor:
    """[rows, k] ascending latent ids of the k largest, ties to the lowest id; NaN counts as largest."""
    if activations.device.type != "cpu":
        return _topk_ids_static(activations, k)
    top = activations.topk(k, dim=1)
    smallest = top.values[:, -1:]
    # Exactly k entries reach the k-th value unless it is tied (or NaN, which compares false): then topk's choice is open.
    tied = (activations >= smallest).sum(1) != k
    ids = top.indices
    if bool(tied.any()):
        again = activations[tied]
        ids = ids.index_put((tied,), again.argsort(dim=1, descending=True, stable=True)[:, :k])
    return ids.sort(dim=1).values


def _topk_ids_static(activations: Tensor, k: int) -> Tensor:
    """The same without a host read: entries above the k-th value, then the first of those that equal it."""
    key = activations.nan_to_num(nan=torch.inf, posinf=torch.inf)
    smallest = key.topk(k, dim=1).values[:, -1:]
    above, equal = key > smallest, key == smallest
    room = k - above.sum(1, keepdim=True)
    keep = above | (equal & (equal.cumsum(1) <= room))
    return torch.nonzero_static(keep, size=keep.shape[0] * k)[:, 1].view(-1, k)


def _collect_dynamic(
    chunks: Iterator[tuple[int, int, Tensor]], wanted: int, d_sae: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The `wanted` largest of all chunks as (values, ascending flat positions). A gate that rises with what was seen keeps
    the pool small; it is a lower bound of the final smallest value, so nothing that belongs is dropped."""
    pool_values, pool_flat = like.new_empty(0), torch.empty(0, dtype=torch.int64)
    gate = 0.0
    for start, _, activations in chunks:
        flat_chunk = activations.view(-1)
        # NaN fails every comparison, so it is asked for by name: a selected NaN must be seen, not lost.
        passing = (flat_chunk >= gate) if gate > 0 else (flat_chunk > 0)
        if bool(flat_chunk.max().isnan()):
            passing |= flat_chunk.isnan()
        position = passing.nonzero().squeeze(1)
        pool_values = torch.cat([pool_values, flat_chunk[position]])
        pool_flat = torch.cat([pool_flat, position + start * d_sae])
        if pool_values.numel() > wanted:
            pool_values, pool_flat = _largest(pool_values, pool_flat, wanted)
            smallest = float(pool_values.nan_to_num(nan=torch.inf, posinf=torch.inf).min())
            gate = max(gate, smallest)
    missing = wanted - pool_values.numel()
    if missing > 0:
        # Fewer positives than asked for: the rest are zeros at the lowest places, all of them among the first `wanted`.
        free = torch.ones(wanted, dtype=torch.bool)
        free[pool_flat[pool_flat < wanted]] = False
        padding = free.nonzero().squeeze(1)[:missing]
        pool_values = torch.cat([pool_values, pool_values.new_zeros(missing)])
        pool_flat, order = torch.cat([pool_flat, padding]).sort()
        pool_values = pool_values[order]
    return pool_values, pool_flat


def _largest(values: Tensor, flat: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The `wanted` largest of a pool in ascending flat order; ties to the lowest place; NaN counts as largest."""
    key = values.nan_to_num(nan=torch.inf, posinf=torch.inf)
    smallest = key.topk(wanted, sorted=False).values.min()
    above, equal = key > smallest, key == smallest
    keep = above | (equal & (equal.cumsum(0) <= wanted - above.sum()))
    return values[keep], flat[keep]


def _collect_static(
    chunks: Iterator[tuple[int, int, Tensor]], wanted: int, d_sae: int, like: Tensor
) -> tuple[Tensor, Tensor]:
    """The same with static sizes only: a pool of `wanted` merged with each chunk by a stable sort."""
    values: Tensor | None = None
    flat: Tensor | None = None
    for start, _, activations in chunks:
        chunk_values = activations.view(-1)
        chunk_flat = torch.arange(chunk_values.numel(), device=chunk_values.device) + start * d_sae
        # Earlier entries first, so the stable sort gives ties to the lowest place.
        values = chunk_values if values is None else torch.cat([values, chunk_values])
        flat = chunk_flat if flat is None else torch.cat([flat, chunk_flat])
        if values.numel() > wanted:
            order = values.sort(descending=True, stable=True).indices[:wanted].sort().values
            values, flat = values[order], flat[order]
    assert values is not None
    assert flat is not None
    return values, flat
