"""Triton kernels of the encode ops: the product and its three epilogues, and the exact selection by rows. Device code only.

The pre-activations live in registers and are never stored. Tile t of the product owns the latents t, t + T, t + 2T, ... of
T tiles: winners spread evenly over the tiles whatever the order of the dictionary, and each row of W_enc is still read
contiguously. A tile keeps its best few entries of each token. Exactness is by certificate: where the last entry that a tile
kept is not among the selected, nothing that the tile dropped can be; where it is, that tile is computed again for that token.

Order of entries: larger value first, ties to the lowest latent, NaN above everything. Values are compared as integer keys:
for non-negative floats the bits have the order of the numbers, and one key stands for every NaN.
"""

# Triton types a kernel's arguments at the launch.
# mypy: disable-error-code="no-untyped-def"
from __future__ import annotations

import triton
import triton.language as tl

NAN_KEY = tl.constexpr(0x7FC00000)
"""Bits of the quiet NaN: above those of infinity."""
LOW_32 = tl.constexpr(0xFFFFFFFF)


@triton.jit
def pre_activations(
    x, W, b, rows, latents, d_in, x_row, x_col, W_row, W_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32: x[rows] @ W[latents].T + b[latents]; row and latent numbers must be in range.

    The sums begin at the bias: added afterwards it costs 15 more registers a thread on sm_90, and with them a second program.
    """
    depth = tl.arange(0, BK)
    x_at = x + rows[:, None].to(tl.int64) * x_row + depth[None, :] * x_col
    W_at = W + latents[None, :].to(tl.int64) * W_row + depth[:, None] * W_col
    pre = tl.zeros((BM, BN), dtype=tl.float32) + tl.load(b + latents)[None, :]
    for start in range(0, d_in, BK):
        if EVEN:
            left = tl.load(x_at)
            right = tl.load(W_at)
        else:
            inside = depth < d_in - start
            left = tl.load(x_at, mask=inside[None, :], other=0.0)
            right = tl.load(W_at, mask=inside[:, None], other=0.0)
        pre = tl.dot(left, right, pre, input_precision=PRECISION)
        x_at += BK * x_col
        W_at += BK * W_col
    return pre


@triton.jit
def described_pre_activations(
    x, W, b, first_row, tile, tiles, d_in, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PRECISION: tl.constexpr
):
    """pre_activations of the rows from first_row on with the latents of one tile, by descriptors (TMA on sm_90).

    x describes [rows, d_in], and W the matrix [BN, tiles * d_in] of the same memory as W_enc [BN * tiles, d_in]: its block at
    column tile * d_in holds the latents tile, tile + tiles, ... Rows beyond the last are zeros.
    """
    pre = tl.zeros((BM, BN), dtype=tl.float32) + tl.load(b + tile + tl.arange(0, BN) * tiles)[None, :]
    for start in range(0, d_in, BK):
        left = x.load([first_row, start])
        right = W.load([0, tile * d_in + start])
        pre = tl.dot(left, right.T, pre, input_precision=PRECISION)
    return pre


@triton.jit
def order_keys(pre):
    """int32 with the order of relu(pre): 0 for what the ReLU removes, the bits of positive numbers, one key for NaN."""
    key = tl.where(pre > 0, pre.to(tl.int32, bitcast=True), 0)
    return tl.where(pre != pre, NAN_KEY, key)


@triton.jit
def grouped_tile(row_blocks, tiles, GROUP: tl.constexpr):
    """(row block, tile) of this program: GROUP row blocks go through the tiles together, so both operands stay in cache."""
    program = tl.program_id(0)
    in_group = GROUP * tiles
    first = (program // in_group) * GROUP
    height = tl.minimum(row_blocks - first, GROUP)
    return first + (program % in_group) % height, (program % in_group) // height


@triton.jit
def keep_tile_best(
    x, W, b, kept_key, kept_place, rows_total, d_in, d_sae, tiles, kept, x_row, x_col, W_row, W_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """kept_key [B, T, kept] int32 and kept_place [B, T, kept] uint8: each tile's best entries of each token, in order.

    Place p of tile t is latent t + p * T. A tile with fewer latents than `kept` fills up with the key -1. DESCRIBED: x and W
    are descriptors. Entries collected in registers and stored at once save 24 barriers of 2,100 instructions, but take 153
    registers on sm_90: one program a multiprocessor instead of two.
    """
    block, tile = grouped_tile(tl.cdiv(rows_total, BM), tiles, GROUP)
    rows = block * BM + tl.arange(0, BM)
    places = tl.arange(0, BN)
    latents = tile + places * tiles
    if DESCRIBED:
        pre = described_pre_activations(x, W, b, block * BM, tile, tiles, d_in, BM, BN, BK, PRECISION)
    else:
        pre = pre_activations(
            x, W, b, tl.minimum(rows, rows_total - 1), tl.minimum(latents, d_sae - 1), d_in, x_row, x_col, W_row, W_col,
            BM, BN, BK, EVEN, PRECISION,
        )  # fmt: skip
    owned = tl.cdiv(d_sae - tile, tiles)
    key = tl.where(places[None, :] < owned, order_keys(pre), -1)
    at = (rows.to(tl.int64) * tiles + tile) * kept
    for i in range(kept):
        # Ties go to the lowest place.
        best, place = tl.max(key, axis=1, return_indices=True)
        tl.store(kept_key + at + i, best, mask=rows < rows_total)
        tl.store(kept_place + at + i, place.to(tl.uint8), mask=rows < rows_total)
        key = tl.where(places[None, :] == place[:, None], -1, key)


@triton.jit
def load_entries(keys, places, at, number, tiles, kept, PACKED: tl.constexpr):
    """(key, latent) of one row's entries `at`; key -1 beyond their number.

    PACKED: keys holds (key << 32 | latent). Else keys and places are what the row's tiles kept, in the order of the tiles.
    """
    inside = at < number
    if PACKED:
        entry = tl.load(keys + at, mask=inside, other=-1)
        key = (entry >> 32).to(tl.int32)
        latent = (entry & LOW_32).to(tl.int32)
    else:
        key = tl.load(keys + at, mask=inside, other=-1)
        latent = at // kept + tl.load(places + at, mask=inside, other=0).to(tl.int32) * tiles
    return key, latent


@triton.jit
def find_cut(
    keys, places, number, k, d_sae, tiles, kept, PACKED: tl.constexpr, CHUNK: tl.constexpr
):  # fmt: skip
    """(cut, last): with them, `chosen` selects the first k of a row's entries, or all positive ones if there are fewer.

    Bisection over the integer keys; it ends at the first gap that separates exactly k. Only where the k-th key is tied, a
    second one over the latents of that key. Each turn reads the entries again, from the first-level cache, so their number is
    not limited.
    """
    lane = tl.arange(0, CHUNK)
    found = 0
    above = 1
    for start in range(0, number, CHUNK):
        key, _ = load_entries(keys, places, start + lane, number, tiles, kept, PACKED)
        found += tl.sum((key > 0).to(tl.int32), axis=0)
        above = tl.maximum(above, tl.max(key, axis=0) + 1)
    cut = 1
    beyond = 0
    while (found > k) & (above - cut > 1):
        middle = cut + (above - cut) // 2
        reached = 0
        for start in range(0, number, CHUNK):
            key, _ = load_entries(keys, places, start + lane, number, tiles, kept, PACKED)
            reached += tl.sum((key >= middle).to(tl.int32), axis=0)
        enough = reached >= k
        cut = tl.where(enough, middle, cut)
        found = tl.where(enough, reached, found)
        above = tl.where(enough, above, middle)
        beyond = tl.where(enough, beyond, reached)
    before = -1
    last = d_sae - 1
    while (found > k) & (last - before > 1):
        middle = before + (last - before) // 2
        reached = beyond
        for start in range(0, number, CHUNK):
            key, latent = load_entries(keys, places, start + lane, number, tiles, kept, PACKED)
            reached += tl.sum(((key == cut) & (latent <= middle)).to(tl.int32), axis=0)
        before = tl.where(reached >= k, before, middle)
        last = tl.where(reached >= k, middle, last)
    return cut, last


@triton.jit
def chosen(key, latent, cut, last):
    return (key > cut) | ((key == cut) & (latent <= last))


@triton.jit
def select_rows(
    kept_key, kept_place, picked, picked_count, cuts, failed, failed_count, tiles, kept, d_sae, k, stride,
    CHUNK: tl.constexpr,
):  # fmt: skip
    """One token a program: the k best of what its tiles kept, as (key << 32 | latent) in picked [B, stride], unordered.

    picked_count [B]: how many (all positive). cuts [B, 2]: the row's cut. A row whose certificate fails is appended to
    `failed`: the order of that list is open, but every row in it is treated by itself.
    """
    row = tl.program_id(0).to(tl.int64)
    number = tiles * kept
    keys = kept_key + row * number
    places = kept_place + row * number
    cut, last = find_cut(keys, places, number, k, d_sae, tiles, kept, False, CHUNK)
    mine = picked + row * stride
    count = 0
    failing = 0
    for start in range(0, number, CHUNK):
        slot = start + tl.arange(0, CHUNK)
        key, latent = load_entries(keys, places, slot, number, tiles, kept, False)
        wanted = chosen(key, latent, cut, last)
        entry = (key.to(tl.int64) << 32) | latent.to(tl.int64)
        tl.store(mine + count + tl.cumsum(wanted.to(tl.int32), axis=0) - 1, entry, mask=wanted)
        count += tl.sum(wanted.to(tl.int32), axis=0)
        # The tile's last kept entry is selected and the tile has more latents than it kept: it may have dropped a winner.
        is_open = wanted & (slot % kept == kept - 1) & (slot // kept + kept * tiles < d_sae)
        failing += tl.sum(is_open.to(tl.int32), axis=0)
    tl.store(picked_count + row, count)
    tl.store(cuts + 2 * row, cut)
    tl.store(cuts + 2 * row + 1, last)
    if failing > 0:
        tl.store(failed + tl.atomic_add(failed_count, 1, sem="relaxed"), row.to(tl.int32))


@triton.jit
def row_tile_keys(
    x, W, b, row, tile, tiles, d_in, d_sae, x_row, x_col, W_row, W_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr,
):  # fmt: skip
    """[BN] keys of one token in one tile, -1 beyond d_sae: the same product as the first pass, so the same numbers."""
    latents = tile + tl.arange(0, BN) * tiles
    if DESCRIBED:
        # The rows after this one come along, and are left out.
        pre = described_pre_activations(x, W, b, row, tile, tiles, d_in, BM, BN, BK, PRECISION)
        key = tl.where((tl.arange(0, BM) == 0)[:, None], order_keys(pre), -1)
    else:
        rows = tl.zeros((BM,), dtype=tl.int32) + row
        pre = pre_activations(
            x, W, b, rows, tl.minimum(latents, d_sae - 1), d_in, x_row, x_col, W_row, W_col, BM, BN, BK, EVEN, PRECISION
        )
        key = order_keys(pre)
    return tl.where(latents < d_sae, tl.max(key, axis=0), -1)


@triton.jit
def next_open_tile(keys, places, after, cut, last, d_sae, tiles, kept, TILES: tl.constexpr):
    """The first tile beyond `after` that the certificate leaves open, `tiles` where there is none."""
    found = tiles
    start = after + 1
    while start < found:
        tile = start + tl.arange(0, TILES)
        inside = tile < tiles
        key = tl.load(keys + tile.to(tl.int64) * kept + kept - 1, mask=inside, other=-1)
        place = tl.load(places + tile.to(tl.int64) * kept + kept - 1, mask=inside, other=0).to(tl.int32)
        is_open = chosen(key, tile + place * tiles, cut, last) & (tile + kept * tiles < d_sae)
        found = tl.minimum(found, tl.min(tl.where(is_open, tile, tiles), axis=0))
        start += TILES
    return found


@triton.jit
def rescan_rows(
    x, W, b, kept_key, kept_place, picked, picked_count, cuts, failed, failed_count, totals, rows_total,
    d_in, d_sae, tiles, kept, k, stride, x_row, x_col, W_row, W_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, EVEN: tl.constexpr, PRECISION: tl.constexpr,
    DESCRIBED: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """Rows whose certificate failed: their open tiles are computed again and merged, one after the other.

    A program strides over the list, whose length it reads on the device. At most k / kept tiles of a row are open, because
    all that an open tile kept is selected. totals [2] counts certified and rescanned rows.
    """
    listed = tl.load(failed_count)
    if tl.program_id(0) == 0:
        tl.atomic_add(totals, (rows_total - listed).to(tl.int64), sem="relaxed")
        tl.atomic_add(totals + 1, listed.to(tl.int64), sem="relaxed")
    lane = tl.arange(0, CHUNK)
    places = tl.arange(0, BN)
    for item in range(tl.program_id(0), listed, tl.num_programs(0)):
        row = tl.load(failed + item).to(tl.int64)
        mine = picked + row * stride
        row_keys = kept_key + row * tiles * kept
        row_places = kept_place + row * tiles * kept
        cut = tl.load(cuts + 2 * row)
        last = tl.load(cuts + 2 * row + 1)
        tile = next_open_tile(row_keys, row_places, -1, cut, last, d_sae, tiles, kept, CHUNK)
        while tile < tiles:
            fresh = row_tile_keys(
                x, W, b, row.to(tl.int32), tile, tiles, d_in, d_sae, x_row, x_col, W_row, W_col,
                BM, BN, BK, EVEN, PRECISION, DESCRIBED,
            )  # fmt: skip
            count = tl.load(picked_count + row)
            # The entries that the tile had kept are among the recomputed ones: remove them, then append the recomputed ones.
            for start in range(0, count, CHUNK):
                inside = start + lane < count
                entry = tl.load(mine + start + lane, mask=inside, other=-1)
                ours = (entry & LOW_32).to(tl.int32) % tiles == tile
                tl.store(mine + start + lane, tl.full((CHUNK,), -1, dtype=tl.int64), mask=inside & ours)
            tl.store(mine + count + places, (fresh.to(tl.int64) << 32) | (tile + places * tiles).to(tl.int64))
            tl.debug_barrier()
            count += BN
            new_cut, new_last = find_cut(mine, row_places, count, k, d_sae, tiles, kept, True, CHUNK)
            stays_count = 0
            for start in range(0, count, CHUNK):
                entry = tl.load(mine + start + lane, mask=start + lane < count, other=-1)
                stays = chosen((entry >> 32).to(tl.int32), (entry & LOW_32).to(tl.int32), new_cut, new_last)
                # In place: an entry never moves up, and all of a chunk is read before any of it is written.
                tl.debug_barrier()
                tl.store(mine + stays_count + tl.cumsum(stays.to(tl.int32), axis=0) - 1, entry, mask=stays)
                stays_count += tl.sum(stays.to(tl.int32), axis=0)
            tl.store(picked_count + row, stays_count)
            tl.debug_barrier()
            tile = next_open_tile(row_keys, row_places, tile, cut, last, d_sae, tiles, kept, CHUNK)


@triton.jit
def order_rows(picked, picked_count, values, indices, k, stride, CHUNK: tl.constexpr):
    """One token a program: values and latents in ascending order of latent, zeros at the lowest free latents.

    A row with n < k positive entries becomes 0 .. c - 1 and its entries from c on, c the first number that makes them k.
    """
    row = tl.program_id(0).to(tl.int64)
    mine = picked + row * stride
    count = tl.load(picked_count + row)
    lane = tl.arange(0, CHUNK)
    first = 0
    beyond = tl.where(count < k, k, 0)
    while first < beyond:
        middle = first + (beyond - first) // 2
        reached = middle
        for start in range(0, count, CHUNK):
            latent = (tl.load(mine + start + lane, mask=start + lane < count, other=-1) & LOW_32).to(tl.int32)
            reached += tl.sum(((latent >= middle) & (start + lane < count)).to(tl.int32), axis=0)
        beyond = tl.where(reached >= k, middle, beyond)
        first = tl.where(reached >= k, first, middle + 1)
    for start in range(0, first, CHUNK):
        place = start + lane
        tl.store(indices + row * k + place, place.to(tl.int64), mask=place < first)
        tl.store(values + row * k + place, tl.zeros((CHUNK,), dtype=tl.float32), mask=place < first)
    tl.debug_barrier()
    for start in range(0, count, CHUNK):
        entry = tl.load(mine + start + lane, mask=start + lane < count, other=0)
        latent = (entry & LOW_32).to(tl.int32)
        rank = tl.zeros((CHUNK,), dtype=tl.int32)
        for other in range(0, count, CHUNK):
            inside = other + lane < count
            compared = (tl.load(mine + other + lane, mask=inside, other=0) & LOW_32).to(tl.int32)
            rank += tl.sum(((compared[None, :] < latent[:, None]) & inside[None, :]).to(tl.int32), axis=1)
        place = tl.where(latent < first, latent, k - count + rank)
        value = (entry >> 32).to(tl.int32).to(tl.float32, bitcast=True)
        tl.store(indices + row * k + place, latent.to(tl.int64), mask=start + lane < count)
        tl.store(values + row * k + place, value, mask=start + lane < count)


@triton.jit
def above_threshold(
    x, W, b, threshold, bounds, values, indices, rows_total, d_in, d_sae, tiles, threshold_step,
    x_row, x_col, W_row, W_col,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr, EVEN: tl.constexpr,
    PRECISION: tl.constexpr, WRITE: tl.constexpr,
):  # fmt: skip
    """Entries above the threshold, in two passes over the same product: WRITE = 0 counts them into bounds [B, T],
    WRITE = 1 writes them at the offsets in bounds [B * T + 1], which then holds running totals. Tile t owns a run of BN
    latents."""
    block, tile = grouped_tile(tl.cdiv(rows_total, BM), tiles, GROUP)
    rows = block * BM + tl.arange(0, BM)
    latents = tile * BN + tl.arange(0, BN)
    owned = tl.minimum(latents, d_sae - 1)
    pre = pre_activations(
        x, W, b, tl.minimum(rows, rows_total - 1), owned, d_in, x_row, x_col, W_row, W_col, BM, BN, BK, EVEN, PRECISION
    )
    limit = tl.load(threshold + owned.to(tl.int64) * threshold_step)
    passes = (pre > limit[None, :]) & (latents < d_sae)[None, :] & (rows < rows_total)[:, None]
    number = passes.to(tl.int32)
    at = rows.to(tl.int64) * tiles + tile
    if WRITE:
        start = tl.load(bounds + at, mask=rows < rows_total, other=0)
        place = start[:, None] + tl.cumsum(number, axis=1) - 1
        tl.store(values + place, pre, mask=passes)
        tl.store(indices + place, tl.zeros((BM, BN), dtype=tl.int64) + latents[None, :], mask=passes)
    else:
        tl.store(bounds + at, tl.sum(number, axis=1), mask=rows < rows_total)
