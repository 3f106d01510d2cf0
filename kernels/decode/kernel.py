"""Triton kernels of the nested loss. One program is one warp, owns one row and one tile of columns, and adds in a fixed
order."""

# Triton types a kernel's arguments at the launch.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from transcoder.kernels.segments_triton import gather_sum, gathered_rows


@triton.jit
def prefix_cuts(ids, row_ptr, widths, cuts, searches, prefixes, SEARCHES: tl.constexpr):
    """cuts[b, p] = the first entry of row b whose latent is at least widths[p]: one binary search a lane."""
    place = tl.program_id(0).to(tl.int64) * SEARCHES + tl.arange(0, SEARCHES)
    live = place < searches
    row = place // prefixes
    width = tl.load(widths + place % prefixes, mask=live, other=0)
    low = tl.load(row_ptr + row, mask=live, other=0)
    high = tl.load(row_ptr + row + 1, mask=live, other=0)
    while tl.max(high - low, axis=0) > 0:
        open_ = low < high
        middle = (low + high) // 2
        below = tl.load(ids + middle, mask=open_, other=0) < width
        low = tl.where(open_ & below, middle + 1, low)
        high = tl.where(open_ & ~below, middle, high)
    tl.store(cuts + place, low, mask=live)


@triton.jit
def walk_up(
    values, ids, row_ptr, cuts, W, bias, y, errors, residual, rows, columns, prefixes,
    W_row, W_column, y_row, y_column,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (rows, column tiles). The running residual stays in registers; at every prefix boundary its squares' sum over the
    tile goes to errors[p, tile, row]; the last residual is written."""
    b = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    column = tile * TILE + tl.arange(0, TILE)
    inside = column < columns
    running = tl.load(bias + column, mask=inside, other=0).to(ACC)
    running -= tl.load(y + b * y_row + column.to(tl.int64) * y_column, mask=inside, other=0).to(ACC)
    errors += tile.to(tl.int64) * rows + b
    start = tl.load(row_ptr + b)
    for p in range(prefixes):
        end = tl.load(cuts + b * prefixes + p)
        running += gather_sum(W, ids, values, start, end, column, inside, W_row, W_column, ACC, ROWS, TILE)
        tl.store(errors, tl.sum(running * running, axis=0))
        errors += tl.num_programs(1).to(tl.int64) * rows
        start = end
    tl.store(residual + b * columns + column, running, mask=inside)


@triton.jit
def prefix_totals(
    errors, token_weights, out, rows, tiles, WEIGHTED: tl.constexpr, ACC: tl.constexpr, TOKENS: tl.constexpr
):
    """Grid (prefixes): out[p] = sum over tiles and tokens of errors[p, tile, b] * token_weights[b]."""
    p = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, TOKENS)
    total = tl.zeros((TOKENS,), ACC)
    for tile in range(tiles):
        line = errors + (p * tiles + tile) * rows
        for first in range(0, rows, TOKENS):
            live = first + lane < rows
            part = tl.load(line + first + lane, mask=live, other=0)
            if WEIGHTED:
                part *= tl.load(token_weights + first + lane, mask=live, other=0).to(ACC)
            total += part
    tl.store(out + p, tl.sum(total, axis=0))


@triton.jit
def walk_down(
    values, ids, row_ptr, cuts, W, residual, scales, token_weights, running, slab, partial,
    rows, columns, prefixes, entries, first_column, last_column, W_row, W_column, slab_row,
    WEIGHTED: tl.constexpr, SLAB: tl.constexpr,
    ACC: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (rows, column tiles of [first_column, last_column)). From the last residual down: gradient += 2 scale_p residual,
    then every entry of group p is read once, for its dot product with the gradient (partial[tile, entry]) and to be taken
    out of the residual. The gradient of group p goes to slab[p, b], that of the whole reconstruction to running[b]."""
    b = tl.program_id(0).to(tl.int64)
    column = first_column + tl.program_id(1) * TILE + tl.arange(0, TILE)
    inside = column < last_column
    left = tl.load(residual + b * columns + column, mask=inside, other=0).to(ACC)
    gradient = tl.zeros((TILE,), ACC)
    partial += (first_column // TILE + tl.program_id(1)).to(tl.int64) * entries
    all_rows = tl.zeros((), tl.int64) + rows
    lane = tl.arange(0, ROWS)
    end = tl.load(row_ptr + b + 1)
    start = tl.load(cuts + b * prefixes + prefixes - 1)
    for j in range(start, end, ROWS):
        # Latents beyond the widest prefix take no part.
        tl.store(partial + j + lane, tl.zeros((ROWS,), ACC), mask=j + lane < end)
    for step in range(prefixes):
        p = prefixes - 1 - step
        end = start
        start = tl.load(cuts + b * prefixes + p - 1, mask=p > 0, other=0)
        start = tl.where(p > 0, start, tl.load(row_ptr + b))
        change = left * (2 * tl.load(scales + p).to(ACC))
        if WEIGHTED:
            change *= tl.load(token_weights + b).to(ACC)
        gradient += change
        if SLAB:
            tl.store(slab + (b + p * all_rows) * slab_row + column - first_column, gradient, mask=inside)
        taken = tl.zeros((TILE,), ACC)
        for j in range(start, end, ROWS):
            live = j + lane < end
            block = gathered_rows(W, ids, j, lane, live, column, inside, W_row, W_column, ACC)
            tl.store(partial + j + lane, tl.sum(block * gradient[None, :], axis=1), mask=live)
            value = tl.load(values + j + lane, mask=live, other=0).to(ACC)
            taken += tl.sum(value[:, None] * block, axis=0)
        left -= taken
    tl.store(running + b * columns + column, gradient, mask=inside)


@triton.jit
def feature_major(
    values, ids, permutation, order_rows, widths, out_values, out_rows, rows, entries, prefixes, COPIES: tl.constexpr
):
    """The entries by latent: their values, and the row of the gradient slab [P * rows, :] that their latent reads."""
    place = tl.program_id(0).to(tl.int64) * COPIES + tl.arange(0, COPIES)
    live = place < entries
    entry = tl.load(permutation + place, mask=live, other=0)
    latent = tl.load(ids + entry, mask=live, other=0)
    row = tl.load(order_rows + place, mask=live, other=0)
    for p in range(prefixes):
        row += tl.where(latent >= tl.load(widths + p), rows, 0)
    tl.store(out_rows + place, row, mask=live)
    tl.store(out_values + place, tl.load(values + entry, mask=live, other=0), mask=live)
