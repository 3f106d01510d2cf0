"""Triton kernels of the correlation statistics. Sums have one owner, or are exact and so independent of their order."""

# Triton types a kernel's arguments at the launch.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def owned_latent(ids, permutation, latent_ptr, entries, BY_ENTRY: tl.constexpr):
    """(latent, first entry, end) that this program owns by latent; an empty range where there is none."""
    program = tl.program_id(0).to(tl.int64)
    if BY_ENTRY:
        latent = tl.load(ids + tl.load(permutation + program))
        start = tl.load(latent_ptr + latent)
        end = tl.where(start == program, tl.load(latent_ptr + latent + 1), start)
    else:
        latent = program
        start = tl.load(latent_ptr + latent)
        end = tl.load(latent_ptr + latent + 1)
    return latent, start, end


@triton.jit
def latent_values(values, permutation, order_rows, token_weights, place, live, WEIGHTED: tl.constexpr):
    """(value, value times weight, row) of feature-major places, float64; 0 where the entry does not fire."""
    entry = tl.load(permutation + place, mask=live, other=0)
    value = tl.load(values + entry, mask=live, other=0).to(tl.float64)
    row = tl.load(order_rows + place, mask=live, other=0)
    weight = tl.full(value.shape, 1, tl.float64)
    if WEIGHTED:
        weight = tl.load(token_weights + row, mask=live, other=0)
    value = tl.where((value > 0) & (weight > 0), value, 0.0)
    return value, tl.where(value > 0, value * weight, 0.0), row


@triton.jit
def moment_sums(
    values, ids, permutation, order_rows, latent_ptr, token_weights, total, square, count, unit, entries,
    WEIGHTED: tl.constexpr, UNIT: tl.constexpr, BY_ENTRY: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Adds sum w z, sum w z^2 and firing tokens of each latent; settles the unit of a latent that fires for the first time."""
    latent, start, end = owned_latent(ids, permutation, latent_ptr, entries, BY_ENTRY)
    if end > start:
        lane = tl.arange(0, ENTRIES)
        first = tl.zeros((ENTRIES,), tl.float64)
        second = tl.zeros((ENTRIES,), tl.float64)
        fired = tl.zeros((ENTRIES,), tl.int64)
        largest = tl.zeros((ENTRIES,), tl.float32)
        for j in range(start, end, ENTRIES):
            value, weighted, _ = latent_values(
                values, permutation, order_rows, token_weights, j + lane, j + lane < end, WEIGHTED
            )
            first += weighted
            second += weighted * value
            fired += (value > 0).to(tl.int64)
            largest = tl.maximum(largest, value.to(tl.float32))
        tl.store(total + latent, tl.load(total + latent) + tl.sum(first, axis=0))
        tl.store(square + latent, tl.load(square + latent) + tl.sum(second, axis=0))
        tokens = tl.sum(fired, axis=0)
        tl.store(count + latent, tl.load(count + latent) + tokens)
        if UNIT:
            top = tl.max(largest, axis=0)
            # The next power of two: the exponent of the largest value, plus one (at least 2^-126, at most 2^127).
            exponent = tl.minimum((top.to(tl.int32, bitcast=True) >> 23) + 1, 254)
            power = (exponent << 23).to(tl.float32, bitcast=True).to(tl.float64)
            known = tl.load(unit + latent)
            tl.store(unit + latent, tl.where((known == 0) & (tokens > 0), power, known))


@triton.jit
def pair_sums(
    values, ids, row_ptr, token_weights, unit, product, joint,
    WEIGHTED: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (rows, slices): every pair of a row's firing entries, added to the packed triangle at j (j - 1) / 2 + i.

    The products are multiples of a unit (config.UNIT_BITS) and the counts are integers: the additions commute.
    """
    b = tl.program_id(0).to(tl.int64)
    start, end = tl.load(row_ptr + b), tl.load(row_ptr + b + 1)
    weight = tl.full((), 1, tl.float64)
    if WEIGHTED:
        weight = tl.load(token_weights + b)
    lane = tl.arange(0, BLOCK)
    one = tl.full((BLOCK, BLOCK), 1, joint.dtype.element_ty)
    scale: tl.constexpr = 2.0**BITS
    if weight > 0:
        for later in range(start + tl.program_id(1) * BLOCK, end, tl.num_programs(1) * BLOCK):
            j = later + lane
            latent_j = tl.load(ids + j, mask=j < end, other=0)
            value_j = tl.load(values + j, mask=j < end, other=0).to(tl.float64)
            unit_j = tl.load(unit + latent_j)
            scaled_j = tl.where(value_j > 0, value_j * weight / unit_j * scale, 0.0)
            base_j = latent_j * (latent_j - 1) // 2
            for earlier in range(start, later + BLOCK, BLOCK):
                i = earlier + lane
                latent_i = tl.load(ids + i, mask=i < end, other=0)
                value_i = tl.load(values + i, mask=i < end, other=0).to(tl.float64)
                unit_i = tl.load(unit + latent_i)
                scaled_i = tl.where(value_i > 0, value_i / unit_i, 0.0)
                both = (value_j > 0)[:, None] & (value_i > 0)[None, :] & (i[None, :] < j[:, None])
                key = base_j[:, None] + latent_i[None, :]
                whole = tl.floor(scaled_j[:, None] * scaled_i[None, :] + 0.5)
                amount = whole * ((unit_j / scale)[:, None] * unit_i[None, :])
                tl.atomic_add(product + key, amount, mask=both, sem="relaxed")
                tl.atomic_add(joint + key, one, mask=both, sem="relaxed")


@triton.jit(do_not_specialize=["state"])
def sign_words(
    words, state, count, GOLDEN: tl.constexpr, FIRST: tl.constexpr, SECOND: tl.constexpr, WORDS: tl.constexpr
):
    """words[n] = the low 32 bits of SplitMix64's finaliser of counter n: the bits that `counter.signs` turns into signs."""
    place = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    x = place * GOLDEN + state
    x = (x ^ ((x >> 30) & 0x3FFFFFFFF)) * FIRST
    x = (x ^ ((x >> 27) & 0x1FFFFFFFFF)) * SECOND
    x = x ^ ((x >> 31) & 0x1FFFFFFFF)
    tl.store(words + place, x.to(tl.int32), mask=place < count)


@triton.jit
def sketch_sums(
    values, ids, permutation, order_rows, latent_ptr, token_weights, words, sketch, entries, columns, words_a_token,
    WEIGHTED: tl.constexpr, BY_ENTRY: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Grid (owners, column tiles): sketch[i] += sum of w z r_t over the tokens t on which latent i fires."""
    latent, start, end = owned_latent(ids, permutation, latent_ptr, entries, BY_ENTRY)
    if end > start:
        column = tl.program_id(1) * TILE + tl.arange(0, TILE)
        inside = column < columns
        lane = tl.arange(0, ROWS)
        total = tl.zeros((TILE,), tl.float32)
        for j in range(start, end, ROWS):
            _, weighted, row = latent_values(
                values, permutation, order_rows, token_weights, j + lane, j + lane < end, WEIGHTED
            )
            amount = weighted.to(tl.float32)
            word = tl.load(
                words + row[:, None] * words_a_token + (column // 32)[None, :], mask=inside[None, :], other=0
            )
            positive = ((word >> (column % 32)[None, :]) & 1) == 1
            total += tl.sum(tl.where(positive, amount[:, None], -amount[:, None]), axis=0)
        place = sketch + latent * columns + column
        tl.store(place, tl.load(place, mask=inside, other=0) + total, mask=inside)


@triton.jit
def constant_sketch(
    token_weights, words, ones, rows, columns, words_a_token, WEIGHTED: tl.constexpr, TOKENS: tl.constexpr
):
    """Grid (words a token): ones += sum of w r_t over all tokens t, the sketch of the constant 1."""
    column = tl.program_id(0) * 32 + tl.arange(0, 32)
    inside = column < columns
    lane = tl.arange(0, TOKENS)
    total = tl.zeros((32,), tl.float32)
    for first in range(0, rows, TOKENS):
        token = first + lane
        live = token < rows
        word = tl.load(words + token.to(tl.int64) * words_a_token + tl.program_id(0), mask=live, other=0)
        amount = live.to(tl.float32)
        if WEIGHTED:
            amount = tl.load(token_weights + token, mask=live, other=0).to(tl.float32)
        positive = ((word[:, None] >> tl.arange(0, 32)[None, :]) & 1) == 1
        total += tl.sum(tl.where(positive, amount[:, None], -amount[:, None]), axis=0)
    place = ones + column
    tl.store(place, tl.load(place, mask=inside, other=0) + total, mask=inside)


@triton.jit
def similar_pairs(
    unit, found_i, found_j, found_estimate, found, latents, depth, above, tiles, capacity,
    TILE: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Grid (tiles * tiles): the pairs i < j with <unit[i], unit[j]> above the threshold are appended; one atomic a tile
    reserves their places, and `found` counts all of them, also those beyond the capacity."""
    program = tl.program_id(0)
    # GROUP rows of tiles run together and share what they read.
    span = GROUP * tiles
    top = program // span * GROUP
    height = tl.minimum(tiles - top, GROUP)
    tile_i = top + program % span % height
    tile_j = program % span // height
    if tile_j >= tile_i:
        i = tile_i * TILE + tl.arange(0, TILE)
        j = tile_j * TILE + tl.arange(0, TILE)
        estimate = tl.zeros((TILE, TILE), tl.float32)
        for first in range(0, depth, DEPTH):
            d = first + tl.arange(0, DEPTH)
            left = tl.load(
                unit + i.to(tl.int64)[:, None] * depth + d[None, :],
                mask=(i < latents)[:, None] & (d < depth)[None, :], other=0,
            )  # fmt: skip
            right = tl.load(
                unit + j.to(tl.int64)[None, :] * depth + d[:, None],
                mask=(j < latents)[None, :] & (d < depth)[:, None], other=0,
            )  # fmt: skip
            estimate = tl.dot(left, right, estimate, input_precision="tf32")
        hit = (estimate > above) & (i[:, None] < j[None, :]) & (j < latents)[None, :]
        one = hit.to(tl.int32)
        in_row = tl.sum(one, axis=1)
        # Not the sum of in_row: triton 3.6 dies of that on Blackwell.
        count = tl.sum(one)
        if count > 0:
            base = tl.atomic_add(found, count.to(tl.int64), sem="relaxed")
            # 32-bit ranks within the tile: 64-bit places would not fit into the registers with the sums.
            rank = (tl.cumsum(in_row, axis=0) - in_row)[:, None] + (tl.cumsum(one, axis=1) - one)
            room = hit & (rank < tl.minimum(capacity - base, TILE * TILE).to(tl.int32))
            tl.store(found_i + base + rank, tl.broadcast_to(i[:, None], (TILE, TILE)), mask=room)
            tl.store(found_j + base + rank, tl.broadcast_to(j[None, :], (TILE, TILE)), mask=room)
            tl.store(found_estimate + base + rank, estimate, mask=room)
