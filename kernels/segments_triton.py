"""Backend `triton` of `segments`: weighted sums and dot products over compressed lists of rows.

Every sum has one owner and a fixed order of additions: no float atomics, bitwise reproducible. Columns go in tiles (no
power-of-two padding of a row), tiles are the slow grid axis, so that programs that run together gather from one column
slab of the table and the second-level cache serves the repeats.
"""

# Triton types a kernel's arguments at the launch.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from transcoder.kernels.gather_config import SPLIT, gather
from transcoder.kernels.triton_support import cdiv, on_its_device

ACCUMULATOR = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.float32,
    torch.float16: tl.float32,
}
"""Sums of 16-bit values are fp32 and rounded once."""
WIDE = {
    torch.float64: torch.float64,
    torch.float32: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float16: torch.float32,
}
SUM_ENTRIES = 256
"""Entries of a segment that `segment_sum` reads a turn: one warp, 8 a lane."""


@triton.jit
def segment_holding(ptr, segments, entry):
    """The segment that holds `entry`: the last m with ptr[m] <= entry."""
    low = tl.zeros((), tl.int64)
    high = low + segments
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(ptr + middle) <= entry
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def gathered_rows(table, ids, start, lane, live, column, inside, table_row, table_column, ACC: tl.constexpr):
    """[ROWS, TILE] rows `ids[start + lane]` of the table, 0 beyond the live lanes and columns."""
    row = tl.load(ids + start + lane, mask=live, other=0)
    places = table + row[:, None] * table_row + column[None, :].to(tl.int64) * table_column
    return tl.load(places, mask=live[:, None] & inside[None, :], other=0).to(ACC)


@triton.jit
def gather_sum(
    table, ids, weights, start, end, column, inside, table_row, table_column,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """[TILE]: sum over start <= j < end of weights[j] * table[ids[j], column]."""
    total = tl.zeros((TILE,), ACC)
    lane = tl.arange(0, ROWS)
    for j in range(start, end, ROWS):
        live = j + lane < end
        weight = tl.load(weights + j + lane, mask=live, other=0).to(ACC)
        block = gathered_rows(table, ids, j, lane, live, column, inside, table_row, table_column, ACC)
        # A lane holds whole columns of the block: this sum stays in its registers.
        total += tl.sum(weight[:, None] * block, axis=0)
    return total


@triton.jit
def weighted_rows(
    table, ids, ptr, weights, bias, out, pieces, segments, columns, entries, piece_programs,
    table_row, table_column, out_row, out_column,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (piece_programs + segments, column tiles). SPLIT = 0: no segment is split and piece_programs is 0.

    Block q of SPLIT entries has two pieces of split (longer than SPLIT) segments: slot 0 of one that began before the
    block, slot 1 of one that begins in it. There are never more: a segment that begins and ends inside a block is short.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    if program < piece_programs:
        slot = program % 2
        first = program // 2 * SPLIT
        last = tl.minimum(first + SPLIT, entries)
        m = segment_holding(ptr, segments, tl.where(slot == 0, first, last - 1))
        start, end = tl.load(ptr + m), tl.load(ptr + m + 1)
        begins_here = (start >= first).to(tl.int64)
        if (end - start > SPLIT) & (begins_here == slot):
            total = gather_sum(
                table, ids, weights, tl.maximum(start, first), tl.minimum(end, last), column, inside,
                table_row, table_column, ACC, ROWS, TILE,
            )  # fmt: skip
            tl.store(pieces + program * columns + column, total, mask=inside)
    else:
        m = program - piece_programs
        start, end = tl.load(ptr + m), tl.load(ptr + m + 1)
        if (SPLIT == 0) | (end - start <= SPLIT):
            total = gather_sum(
                table, ids, weights, start, end, column, inside, table_row, table_column, ACC, ROWS, TILE
            )
            if BIAS:
                total += tl.load(bias + column, mask=inside, other=0).to(ACC)
            tl.store(out + m * out_row + column.to(tl.int64) * out_column, total, mask=inside)


@triton.jit
def split_totals(
    ptr, bias, out, pieces, segments, columns, entries, out_row, out_column,
    BIAS: tl.constexpr, SPLIT: tl.constexpr, ACC: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks, column tiles): the pieces of the split segment that begins in this block, in their order."""
    block = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    m = segment_holding(ptr, segments, tl.minimum((block + 1) * SPLIT, entries) - 1)
    start, end = tl.load(ptr + m), tl.load(ptr + m + 1)
    if (end - start > SPLIT) & (start >= block * SPLIT):
        total = tl.load(pieces + (2 * block + 1) * columns + column, mask=inside, other=0)
        for later in range(block + 1, (end - 1) // SPLIT + 1):
            total += tl.load(pieces + 2 * later * columns + column, mask=inside, other=0)
        if BIAS:
            total += tl.load(bias + column, mask=inside, other=0).to(ACC)
        tl.store(out + m * out_row + column.to(tl.int64) * out_column, total, mask=inside)


@triton.jit
def row_products(
    left, table, ids, ptr, partial, columns, entries, left_row, left_column, table_row, table_column,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (segments, column tiles): partial[tile, j] = <left[m], table[ids[j]]> over the tile's columns."""
    m = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < columns
    vector = tl.load(left + m * left_row + column.to(tl.int64) * left_column, mask=inside, other=0).to(ACC)
    start, end = tl.load(ptr + m), tl.load(ptr + m + 1)
    lane = tl.arange(0, ROWS)
    partial += tl.program_id(1).to(tl.int64) * entries
    for j in range(start, end, ROWS):
        live = j + lane < end
        block = gathered_rows(table, ids, j, lane, live, column, inside, table_row, table_column, ACC)
        tl.store(partial + j + lane, tl.sum(block * vector[None, :], axis=1), mask=live)


@triton.jit
def segment_sums(values, ptr, out, ACC: tl.constexpr, ENTRIES: tl.constexpr):
    """Grid (segments)."""
    m = tl.program_id(0).to(tl.int64)
    start, end = tl.load(ptr + m), tl.load(ptr + m + 1)
    lane = tl.arange(0, ENTRIES)
    total = tl.zeros((ENTRIES,), ACC)
    for j in range(start, end, ENTRIES):
        total += tl.load(values + j + lane, mask=j + lane < end, other=0).to(ACC)
    tl.store(out + m, tl.sum(total, axis=0))


@on_its_device
def weighted_row_sum(
    table: Tensor,
    ids: Tensor,
    ptr: Tensor,
    weights: Tensor,
    *,
    bias: Tensor | None = None,
    out: Tensor | None = None,
    split: bool = True,
) -> Tensor:
    """out[m] = bias + sum over j in ptr[m] .. ptr[m + 1] of weights[j] * table[ids[j]].

    Args:
        table: [R, d] floating, any strides.
        ids: [n] int64 in [0, R).
        ptr: [M + 1] int64 ascending, within [0, n]; segments need not cover all entries.
        weights: [n]; its dtype is that of the result (16-bit ones sum in fp32).
        bias: [d] or None.
        out: [M, d], any strides, written whole; None makes one.
        split: cut long segments over programs (two launches instead of one). False where segments are known to be of
            about one length, as the rows of codes are.

    Returns: [M, d].
    """
    segments, columns, entries = ptr.numel() - 1, table.shape[1], ids.numel()
    if out is None:
        out = torch.empty(segments, columns, dtype=weights.dtype, device=weights.device)
    if segments == 0 or columns == 0:
        return out
    ids, ptr, weights = ids.contiguous(), ptr.contiguous(), weights.contiguous()
    choice, accumulator = gather(table), ACCUMULATOR[weights.dtype]
    blocks = cdiv(entries, SPLIT) if split and entries > SPLIT else 0
    pieces = torch.empty(2 * blocks, columns, dtype=WIDE[weights.dtype], device=weights.device) if blocks else out
    added = out if bias is None else bias.contiguous()
    tiles = cdiv(columns, choice.columns)
    common = {"BIAS": bias is not None, "ACC": accumulator, "TILE": choice.columns, "num_warps": choice.warps}
    weighted_rows[(2 * blocks + segments, tiles)](
        table, ids, ptr, weights, added, out, pieces, segments, columns, entries, 2 * blocks,
        *table.stride(), *out.stride(), SPLIT=SPLIT if blocks else 0, ROWS=choice.rows, **common,
    )  # fmt: skip
    if blocks:
        split_totals[(blocks, tiles)](
            ptr, added, out, pieces, segments, columns, entries, *out.stride(), SPLIT=SPLIT, **common
        )
    return out


@on_its_device
def row_dots(left: Tensor, table: Tensor, ids: Tensor, ptr: Tensor) -> Tensor:
    """out[j] = <left[m], table[ids[j]]> for j in ptr[m] .. ptr[m + 1], without storing [n, d].

    Args:
        left: [M, d], any strides; its dtype is that of the result.
        table: [R, d] floating, any strides.
        ids: [n] int64 in [0, R).
        ptr: [M + 1] int64, ptr[0] == 0 and ptr[M] == n.

    Returns: [n].
    """
    segments, columns, entries = ptr.numel() - 1, table.shape[1], ids.numel()
    if entries == 0 or columns == 0:
        return left.new_zeros(entries)
    choice = gather(table)
    tiles = cdiv(columns, choice.columns)
    partial = torch.empty(tiles, entries, dtype=WIDE[left.dtype], device=left.device)
    row_products[(segments, tiles)](
        left, table, ids.contiguous(), ptr.contiguous(), partial, columns, entries, *left.stride(), *table.stride(),
        ACC=ACCUMULATOR[left.dtype], ROWS=choice.rows, TILE=choice.columns, num_warps=choice.warps,
    )  # fmt: skip
    return (partial[0] if tiles == 1 else partial.sum(0)).to(left.dtype)


@on_its_device
def segment_sum(values: Tensor, ptr: Tensor) -> Tensor:
    """out[m] = sum of values[ptr[m] .. ptr[m + 1]] for values [n], ptr [M + 1]. Returns: [M]."""
    out = values.new_empty(ptr.numel() - 1)
    if out.numel():
        segment_sums[(out.numel(),)](
            values.contiguous(), ptr.contiguous(), out, ACC=ACCUMULATOR[values.dtype], ENTRIES=SUM_ENTRIES, num_warps=1
        )
    return out
