"""Backend `torch` of the encode ops: pre-activations by chunks of rows, exact selection on the warm chunk.

No [B, d_sae] tensor exists at any time. On the CPU the slow exact paths (ties, flat rows) run only for the rows that need
them, which reads a count; on an accelerator every size is static, so nothing waits for the host.

The order is `reference.largest_first`: NaN before +inf before every other value, ties to the lowest id. `topk` and `sort` rank
NaN like this; comparisons do not, so code with comparisons handles NaN explicitly.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.kernels.encode.reference import largest_first
from transcoder.kernels.segments import segment_sum, weighted_row_sum
from transcoder.kernels.sparse_codes import SparseCodes

CHUNK_ELEMENTS = {"cpu": 1 << 20, "cuda": 1 << 26}
"""Pre-activations alive at a time. CPU: 4 MiB stays in a core's outer cache between the product and the selection.
CUDA: 256 MiB keeps the product at full rate and is still a fraction of [B, d_sae]."""
MIN_CHUNK_ROWS = 64
"""Below this a matrix product is bound by reading W_enc again for every chunk."""

SAMPLE = 1 << 14
"""Entries sampled to guess the gate of BatchTopK: the error of its rank is then below 1 % of all entries."""
GUESS_SLACK = 1.5
"""Share of entries passed beyond those wanted; at 1.5 a chunk must be 1.5 times sparser than the first to fail."""


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
    wanted = rows * k
    if x.device.type == "cpu":
        found = _collect_dynamic(_activation_chunks(x, W, b), wanted, d_sae, b, share=k / d_sae)
        # The guessed gate was too high for this batch: collect again without a gate.
        values, flat = found or _pad(*_collect_above(_activation_chunks(x, W, b), wanted, d_sae, b, 0.0), wanted)
    else:
        values, flat = _collect_static(_activation_chunks(x, W, b), wanted, d_sae)
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


def gradients(
    grad: Tensor, x: Tensor, W: Tensor | None, codes: SparseCodes, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (x, W_enc, b_enc) from per-entry gradients [nnz], inactive entries already 0; None where not needed.

    `W` may be None where x needs none.
    """
    grad_x = grad_W = grad_b = None
    if needs[0] and W is not None:
        grad_x = weighted_row_sum(W, codes.indices, codes.row_ptr, grad)
    if needs[1] or needs[2]:
        order = codes.by_latent()
        by_latent = grad[order.permutation]
        if needs[1]:
            grad_W = weighted_row_sum(x, order.rows, order.latent_ptr, by_latent)
        if needs[2]:
            grad_b = segment_sum(by_latent, order.latent_ptr)
    return grad_x, grad_W, grad_b


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
    # All but k entries are below the k-th value unless it is tied (or NaN: nothing is below): then topk's choice is open.
    tied = (activations < smallest).sum(1) != activations.shape[1] - k
    ids = top.indices
    if bool(tied.any()):
        again = activations[tied]
        ids = ids.index_put((tied,), largest_first(again)[:, :k])
    return ids.sort(dim=1).values


def _topk_ids_static(activations: Tensor, k: int) -> Tensor:
    """`_topk_ids` without a host read."""
    keep = first_reaching(activations, activations.topk(k, dim=1).values[:, -1:], k)
    return torch.nonzero_static(keep, size=keep.shape[0] * k)[:, 1].view(-1, k)


def first_reaching(values: Tensor, smallest: Tensor, k: int) -> Tensor:
    """Which k of the last dimension are chosen, `smallest` being the k-th: those above it, then the first that equal it."""
    nan, last_is_nan = values.isnan(), smallest.isnan()
    above = (values > smallest) | (nan & ~last_is_nan)
    equal = (values == smallest) | (nan & last_is_nan)
    return above | (equal & (equal.cumsum(-1) <= k - above.sum(-1, keepdim=True)))


def _collect_dynamic(
    chunks: Iterator[tuple[int, int, Tensor]], wanted: int, d_sae: int, like: Tensor, share: float
) -> tuple[Tensor, Tensor] | None:
    """The `wanted` largest of all chunks by guess and verify; None where the guess proves too high.

    A gate is guessed from a sample of the first chunk, low enough to pass about GUESS_SLACK times too many. If at least
    `wanted` entries pass it, the largest of those are the largest of all; the guess only decides how fast.
    """
    first = next(chunks)
    sample = first[2].view(-1)
    sample = sample[:: max(1, sample.numel() // SAMPLE) | 1]
    rank = min(sample.numel(), max(1, math.ceil(GUESS_SLACK * share * sample.numel())))
    gate = float(sample.kthvalue(sample.numel() - rank + 1).values)
    if not 0 < gate < math.inf:
        return None
    values, flat = _collect_above(itertools.chain([first], chunks), wanted, d_sae, like, gate)
    return (values, flat) if values.numel() == wanted else None


def _collect_above(
    chunks: Iterable[tuple[int, int, Tensor]], wanted: int, d_sae: int, like: Tensor, gate: float
) -> tuple[Tensor, Tensor]:
    """The `wanted` largest of the entries that reach `gate` (or, where it is 0, are positive), in ascending flat order.

    The gate rises to the smallest value of a full pool: a lower bound of the final one, so nothing that belongs is lost.
    """
    pool_values, pool_flat = like.new_empty(0), torch.empty(0, dtype=torch.int64, device=like.device)
    for start, _, activations in chunks:
        flat_chunk = activations.view(-1)
        passing = (flat_chunk >= gate) if gate > 0 else (flat_chunk > 0)
        # NaN fails every comparison and needs an explicit test: a NaN must reach the result.
        if bool(flat_chunk.max().isnan()):
            passing |= flat_chunk.isnan()
        position = passing.nonzero().squeeze(1)
        pool_values = torch.cat([pool_values, flat_chunk[position]])
        pool_flat = torch.cat([pool_flat, position + start * d_sae])
        if pool_values.numel() > wanted:
            pool_values, pool_flat = _largest(pool_values, pool_flat, wanted)
            gate = max(gate, float(pool_values.nan_to_num(nan=torch.inf, posinf=torch.inf).min()))
    return pool_values, pool_flat


def _pad(values: Tensor, flat: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """Fewer positives than asked for: the rest are zeros at the lowest places, all of them among the first `wanted`."""
    missing = wanted - values.numel()
    if missing == 0:
        return values, flat
    free = torch.ones(wanted, dtype=torch.bool, device=flat.device)
    free[flat[flat < wanted]] = False
    flat, order = torch.cat([flat, free.nonzero().squeeze(1)[:missing]]).sort()
    return torch.cat([values, values.new_zeros(missing)])[order], flat


def _largest(values: Tensor, flat: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """The `wanted` largest of a pool in ascending flat order; ties to the lowest place."""
    top = values.topk(wanted, sorted=False).values
    # `min` would return a NaN that was chosen for being largest: it is the smallest only where all are NaN.
    smallest = torch.where(top.isnan().all(), torch.nan, top.nan_to_num(nan=torch.inf, posinf=torch.inf).min())
    keep = first_reaching(values, smallest, wanted)
    return values[keep], flat[keep]


def _collect_static(chunks: Iterator[tuple[int, int, Tensor]], wanted: int, d_sae: int) -> tuple[Tensor, Tensor]:
    """The `wanted` largest of all chunks with static sizes only: a pool of `wanted` merged with each chunk by a stable sort."""
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
