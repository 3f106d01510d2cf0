"""Triton kernels of BatchTopK: the k * B best of what the tiles kept, exactly. Device code only.

A radix selection finds the cut: histograms of one digit at a time over the entries that agree with the digits found so far,
first of the value's key from the top, then, only where the last value is tied, of the position row * d_sae + latent from the
bottom. Counts are integers, so their order does not matter. Cells (a token and a tile) whose last kept entry reached the cut
are computed again in full and the selection is made once more over everything; the cut only rises, so that one is final.

state [levels + 1, 4] int64: (key, position, wanted, settled) before each level. Selected entries have a larger key, or the same
key and a position that is not larger. Each program works out the digit of the level before for itself; the first stores it.
Atomic additions count or reserve places that only a later launch reads: relaxed, they need no fence.
"""

# Triton types a kernel's arguments at the launch.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

from transcoder.kernels.encode.kernel import row_tile_keys

BINS = tl.constexpr(2048)
EVERY_POSITION = tl.constexpr(0x7FFFFFFFFFFFFFFF)


@triton.jit
def next_digit(histogram, state, LEVEL: tl.constexpr, SHIFT: tl.constexpr, BY_POSITION: tl.constexpr):
    """The state after level LEVEL, from its histogram and the state before it."""
    key = tl.load(state + 4 * LEVEL)
    position = tl.load(state + 4 * LEVEL + 1)
    wanted = tl.load(state + 4 * LEVEL + 2)
    settled = tl.load(state + 4 * LEVEL + 3)
    if settled == 0:
        bins = tl.arange(0, BINS)
        number = tl.load(histogram + LEVEL * BINS + bins).to(tl.int64)
        upto = tl.cumsum(number, axis=0)
        total = tl.sum(number, axis=0)
        if BY_POSITION:
            digit = tl.sum((upto < wanted).to(tl.int32), axis=0)
            before = tl.sum(tl.where(bins < digit, number, 0), axis=0)
            position = position | (digit.to(tl.int64) << SHIFT)
        else:
            # Negative only if there are too few entries: then the lowest digit is taken, and all of its entries are wanted.
            digit = tl.maximum(tl.sum((total - upto + number >= wanted).to(tl.int32), axis=0) - 1, 0)
            before = tl.sum(tl.where(bins > digit, number, 0), axis=0)
            key = key | (digit.to(tl.int64) << SHIFT)
        here = tl.sum(tl.where(bins == digit, number, 0), axis=0)
        wanted = wanted - before
        if here <= wanted:
            settled = settled + 1
            position = position | (((1 << SHIFT) - 1) if BY_POSITION else EVERY_POSITION)
    if tl.program_id(0) == 0:
        tl.store(state + 4 * (LEVEL + 1), key)
        tl.store(state + 4 * (LEVEL + 1) + 1, position)
        tl.store(state + 4 * (LEVEL + 1) + 2, wanted)
        tl.store(state + 4 * (LEVEL + 1) + 3, settled)
    return key, position, settled


@triton.jit
def kept_entries(kept_key, kept_place, entry, entries, tiles, kept, d_sae, POSITION: tl.constexpr):
    """(key, position) of kept entries by flat number; key -1 where there is none."""
    inside = entry < entries
    key = tl.load(kept_key + entry, mask=inside, other=-1)
    position = entry.to(tl.int64)
    if POSITION:
        cell = position // kept
        place = tl.load(kept_place + entry, mask=inside, other=0).to(tl.int64)
        position = (cell // tiles) * d_sae + cell % tiles + place * tiles
    return key, position


@triton.jit
def fresh_entries(fresh, open_cell, entry, entries, tiles, d_sae, BN: tl.constexpr, POSITION: tl.constexpr):
    """(key, position) of entries of the cells that were computed again, by flat number."""
    inside = entry < entries
    key = tl.load(fresh + entry, mask=inside, other=-1)
    position = entry.to(tl.int64)
    if POSITION:
        cell = tl.load(open_cell + entry // BN, mask=inside, other=0)
        position = (cell // tiles) * d_sae + cell % tiles + (entry % BN).to(tl.int64) * tiles
    return key, position


@triton.jit
def digit_counts(
    key, position, cut_key, cut_position, SHIFT: tl.constexpr, PARENT: tl.constexpr, BY_POSITION: tl.constexpr
):
    """Histogram of one digit of the entries that agree with the digits above it; PARENT is the shift of those."""
    if BY_POSITION:
        agrees = (key == cut_key) & ((position >> PARENT) == (cut_position >> PARENT))
        digit = ((position >> SHIFT) & ((1 << (PARENT - SHIFT)) - 1)).to(tl.int32)
    else:
        agrees = (key > 0) & ((key >> PARENT) == (cut_key >> PARENT).to(tl.int32))
        digit = (key >> SHIFT) & ((1 << (PARENT - SHIFT)) - 1)
    return tl.histogram(tl.where(agrees, digit, 0), BINS, mask=agrees)


@triton.jit
def radix_level(
    kept_key, kept_place, fresh, open_cell, open_count, histogram, state, entries, tiles, kept, d_sae,
    LEVEL: tl.constexpr, SHIFT: tl.constexpr, PARENT: tl.constexpr, BY_POSITION: tl.constexpr,
    SHIFT_BEFORE: tl.constexpr, BY_POSITION_BEFORE: tl.constexpr,
    AGAIN: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """One level of the radix selection. AGAIN: over the cells computed again too, and nothing to do where there are none."""
    opened = 0
    if AGAIN:
        opened = tl.load(open_count)
    if (not AGAIN) | (opened > 0):
        if LEVEL == 0:
            cut_key = tl.load(state)
            cut_position = tl.load(state + 1)
            settled = tl.load(state + 3)
        else:
            cut_key, cut_position, settled = next_digit(histogram, state, LEVEL - 1, SHIFT_BEFORE, BY_POSITION_BEFORE)
        if settled == 0:
            lane = tl.arange(0, BLOCK)
            number = tl.zeros((BINS,), dtype=tl.int32)
            for start in range(tl.program_id(0) * BLOCK, entries, tl.num_programs(0) * BLOCK):
                key, position = kept_entries(
                    kept_key, kept_place, start + lane, entries, tiles, kept, d_sae, BY_POSITION
                )
                number += digit_counts(key, position, cut_key, cut_position, SHIFT, PARENT, BY_POSITION)
            if AGAIN:
                for start in range(tl.program_id(0) * BLOCK, opened * BN, tl.num_programs(0) * BLOCK):
                    key, position = fresh_entries(
                        fresh, open_cell, start + lane, opened * BN, tiles, d_sae, BN, BY_POSITION
                    )
                    number += digit_counts(key, position, cut_key, cut_position, SHIFT, PARENT, BY_POSITION)
            bins = tl.arange(0, BINS)
            tl.atomic_add(histogram + LEVEL * BINS + bins, number, mask=number > 0, sem="relaxed")


@triton.jit
def list_open_cells(
    kept_key, kept_place, histogram, state, open_cell, open_count, totals, cells, tiles, kept, d_sae,
    LAST: tl.constexpr, SHIFT: tl.constexpr, BY_POSITION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Cells whose last kept entry is chosen although the tile has more latents: it may have dropped a winner."""
    cut_key, cut_position, _ = next_digit(histogram, state, LAST, SHIFT, BY_POSITION)
    cell = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = cell < cells
    key = tl.load(kept_key + cell * kept + kept - 1, mask=inside, other=-1)
    place = tl.load(kept_place + cell * kept + kept - 1, mask=inside, other=0).to(tl.int64)
    tile = cell % tiles
    position = (cell // tiles) * d_sae + tile + place * tiles
    reached = (key > cut_key) | ((key == cut_key) & (position <= cut_position))
    is_open = reached & (key > 0) & (tile + kept * tiles < d_sae)
    number = tl.sum(is_open.to(tl.int32), axis=0)
    if number > 0:
        first = tl.atomic_add(open_count, number, sem="relaxed")
        tl.store(open_cell + first + tl.cumsum(is_open.to(tl.int32), axis=0) - 1, cell, mask=is_open)
    tl.atomic_add(totals, tl.sum((inside & (is_open == 0)).to(tl.int64), axis=0), sem="relaxed")
    tl.atomic_add(totals + 1, number.to(tl.int64), sem="relaxed")


@triton.jit
def rescan_cells(
    x, W, b, kept_key, fresh, open_cell, open_count, d_in, d_sae, tiles, kept, x_row, x_col, W_row, W_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """fresh [., BN]: every key of the listed cells, without those that the first pass kept."""
    places = tl.arange(0, BN)
    for item in range(tl.program_id(0), tl.load(open_count), tl.num_programs(0)):
        cell = tl.load(open_cell + item)
        key = row_tile_keys(
            x, W, b, (cell // tiles).to(tl.int32), (cell % tiles).to(tl.int32), tiles, d_in, d_sae,
            x_row, x_col, W_row, W_col, BM, BN, BK, EVEN, PRECISION, DESCRIBED,
        )  # fmt: skip
        tl.store(fresh + (tl.zeros((), dtype=tl.int64) + item) * BN + places, key)
        tl.store(kept_key + cell * kept + places, tl.full((BN,), -1, dtype=tl.int32), mask=places < kept)


@triton.jit
def take(key, position, cut_key, cut_position, found_position, found_key, found_count, wanted):
    ours = (key > cut_key) | ((key == cut_key) & (position <= cut_position))
    ours = ours & (key > 0)
    number = ours.to(tl.int64)
    total = tl.sum(number, axis=0)
    if total > 0:
        at = tl.atomic_add(found_count, total, sem="relaxed") + tl.cumsum(number, axis=0) - 1
        tl.store(found_position + at, position, mask=ours & (at < wanted))
        tl.store(found_key + at, key, mask=ours & (at < wanted))


@triton.jit
def collect(
    kept_key, kept_place, fresh, open_cell, open_count, histogram, state, state_again,
    found_position, found_key, found_count, entries, tiles, kept, d_sae, wanted,
    LAST: tl.constexpr, SHIFT: tl.constexpr, BY_POSITION: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """The selected entries, unordered; a later sort by position, which is unique, orders them."""
    opened = tl.load(open_count)
    if opened > 0:
        cut_key, cut_position, _ = next_digit(histogram, state_again, LAST, SHIFT, BY_POSITION)
    else:
        cut_key = tl.load(state + 4 * (LAST + 1))
        cut_position = tl.load(state + 4 * (LAST + 1) + 1)
    lane = tl.arange(0, BLOCK)
    for start in range(tl.program_id(0) * BLOCK, entries, tl.num_programs(0) * BLOCK):
        key, position = kept_entries(kept_key, kept_place, start + lane, entries, tiles, kept, d_sae, True)
        take(key, position, cut_key, cut_position, found_position, found_key, found_count, wanted)
    for start in range(tl.program_id(0) * BLOCK, opened * BN, tl.num_programs(0) * BLOCK):
        key, position = fresh_entries(fresh, open_cell, start + lane, opened * BN, tiles, d_sae, BN, True)
        take(key, position, cut_key, cut_position, found_position, found_key, found_count, wanted)
