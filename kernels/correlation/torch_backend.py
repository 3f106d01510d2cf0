"""Backend `torch` of the correlation statistics: pairs of entries of one row, and deterministic sums at
indices."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.kernels.sparse_codes import SparseCodes

PAGE_PAIRS = 1 << 17
"""Pairs enumerated at a time on a CPU: a page's temporaries (about 4 MiB) stay in a core's second-level cache;
measured at 508k pairs, 2^17 is as fast as any, 2^20 and above are a quarter slower."""
GPU_PAGE_PAIRS = 1 << 22
"""The same on a GPU, where a page costs a dozen launches and its temporaries (about 128 MiB) fit with the
rest. Chosen by that reasoning, not measured: a step of 4096 tokens of 48 latents is then 2 pages instead of
36."""


def page_pairs(device: torch.device) -> int:
    """Pairs enumerated at a time on `device`."""
    return PAGE_PAIRS if device.type == "cpu" else GPU_PAGE_PAIRS


def add_at(target: Tensor, index: Tensor, source: Tensor) -> None:
    """`target[index] += source` with repeated indices, summed in one fixed order (bitwise reproducible), in
    place.

    On the CPU index_add_ and the one-dimensional scatter_add_ run in order. On a GPU both use atomics, which
    commute for integers only; index_put_(accumulate=True) sorts instead.
    """
    if target.device.type == "cpu":
        if target.dim() == 1:
            target.scatter_add_(0, index, source)
        else:
            target.index_add_(0, index, source)
    elif target.dtype.is_floating_point:
        target.index_put_((index,), source, accumulate=True)
    else:
        target.index_add_(0, index, source)


class Entries(NamedTuple):
    """The entries of some codes, ready to be summed. Row-major; `local` counts the row's earlier entries."""

    latent: Tensor
    """[n] int64."""
    row: Tensor
    """[n] int64."""
    value: Tensor
    """[n] float64, 0 where the entry does not fire."""
    weighted: Tensor
    """[n] float64: value times the token's weight."""
    tally: Tensor
    """[n]: what the entry's firing adds to a count (dtype of the counts)."""
    local: Tensor
    """[n] int64: how many earlier entries its row has, hence how many pairs it closes."""
    fires: Tensor | None
    """[n] bool; None where every entry fires."""


def entries_of(
    codes: SparseCodes, weight: Tensor | None, tally: Tensor | None, count_dtype: torch.dtype, compact: bool
) -> Entries:
    """Entries of `codes` under per-token weight [B] float64 and per-token count increment [B] (None: 1).

    `compact` drops entries that do not fire, which reads their number: right where the host need not wait for
    it. Otherwise they stay, with value 0.
    """
    rows, latent, row_ptr = codes.rows(), codes.indices, codes.row_ptr
    value = codes.values.detach().double()
    fires: Tensor | None = value > 0
    assert fires is not None
    if weight is not None:
        fires = fires & (weight > 0)[rows]
    if compact:
        if not bool(fires.all()):
            before = torch.zeros(codes.nnz + 1, dtype=torch.int64, device=codes.device)
            torch.cumsum(fires, 0, out=before[1:])
            row_ptr = before[row_ptr]
            rows, latent, value = rows[fires], latent[fires], value[fires]
        fires = None
    else:
        value = torch.where(fires, value, 0.0)
    weighted = value if weight is None else value * weight[rows]
    if tally is not None:
        increment = tally[rows].to(count_dtype)
    else:
        increment = torch.ones(1, dtype=count_dtype, device=codes.device).expand(latent.numel())
    if fires is not None:
        increment = increment * fires
    local = torch.arange(latent.numel(), device=codes.device) - row_ptr[rows]
    return Entries(latent, rows, value, weighted, increment, local, fires)


def pair_total(codes: SparseCodes) -> Tensor:
    """0-dim int64 on the device: pairs of stored entries that share a row."""
    lengths = codes.row_ptr.diff()
    return (lengths * (lengths - 1)).sum() // 2


def pair_pages(local: Tensor, total: int | None = None) -> Iterator[tuple[Tensor, Tensor]]:
    """Every pair (earlier entry, later entry) of one row, as pages of entry numbers (earlier [m], later [m]).

    Args:
        local: [n] int64, the number of earlier entries in each entry's row.
        total: the number of pairs, `local.sum()`, if the host knows it: then nothing is read from the device.
            None reads it, and the pages' bounds, which buys a cheaper enumeration.
    """
    closed = local.cumsum(0)
    if closed.numel() == 0:
        return
    if total is None:
        yield from _pages_by_repeat(local, closed)
        return
    size = page_pairs(local.device)
    for first in range(0, total, size):
        pair = torch.arange(first, min(first + size, total), device=local.device)
        later = torch.searchsorted(closed, pair, right=True)
        yield later - (closed[later] - pair), later


def _pages_by_repeat(local: Tensor, closed: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    # Cut at entries: repeat_interleave is far cheaper than a binary search for each pair.
    total = int(closed[-1])
    marks = torch.arange(0, total, page_pairs(closed.device), device=closed.device)
    cuts = torch.searchsorted(closed, marks, right=True) if total else marks
    bounds = sorted({0, *cuts.tolist(), closed.numel()})
    # 32-bit entry numbers halve what the gathers read.
    numbers = torch.arange(closed.numel(), dtype=torch.int32, device=closed.device)
    for a, b in itertools.pairwise(bounds):
        counts = local[a:b]
        before = int(closed[a] - local[a])
        size = int(closed[b - 1]) - before
        later = torch.repeat_interleave(numbers[a:b], counts, output_size=size)
        start = (numbers[a:b] - closed[a:b] + before).int()
        earlier = torch.arange(size, dtype=torch.int32, device=closed.device)
        earlier += torch.repeat_interleave(start, counts, output_size=size)
        yield earlier, later


def pair_products(entries: Entries, earlier: Tensor, later: Tensor) -> tuple[Tensor, Tensor]:
    """(weighted product [m] float64, count increment [m]) of a page of pairs."""
    product = entries.weighted.index_select(0, later)
    product *= entries.value.index_select(0, earlier)
    tally = entries.tally
    if tally.stride(0) == 0 and entries.fires is None:
        return product, tally[:1].expand(product.numel())
    tally = tally.index_select(0, later)
    if entries.fires is not None:
        tally = tally * entries.fires.index_select(0, earlier)
    return product, tally
