"""Launch choices of the optimizer step. Frozen data; the reasons are byte and register counts (test_compile_adam.py reads the
registers from the compiled code), none is a measured time yet."""

from __future__ import annotations

BLOCK, BLOCK_WARPS = 4096, 8
"""Elements of a program where no row matters. 16 a lane are four independent 16-byte reads of each of the four tensors: 64 KiB
in flight a program, two programs a multiprocessor saturate an H100's memory."""

WIDEST_ROW = 4096
"""Columns up to which a program holds a whole row of the decoder in registers, so that it is read and written once. 2304
columns fill 56 % of the lanes: the rest load nothing."""
LONG_ROW_TILE = 2048
"""A longer row is processed in tiles: written, then read back from the cache and scaled. 8 elements a lane: with 16 the loop
took 155 registers a lane, and one program filled a multiprocessor."""

ROW_WARPS = 8


def row_tile(columns: int) -> tuple[int, int]:
    """(columns of a tile, warps) for rows of `columns` elements: at least a warp, at most 16 elements a lane."""
    whole = max(32, 1 << max(0, columns - 1).bit_length())
    tile = whole if columns <= WIDEST_ROW else LONG_ROW_TILE
    return tile, max(1, min(ROW_WARPS, tile // 128))
