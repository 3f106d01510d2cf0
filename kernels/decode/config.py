"""Launch choices of the nested loss. Frozen data; the numbers are counts, not timings (gather_config holds the tile's).

One set serves every architecture: a program is one warp that streams rows, so nothing in it depends on tensor cores, on
asynchronous copies or on more than a few hundred bytes of shared memory. What differs between chips is the size of the
second-level cache, and both numbers below are chosen to fit the smallest that matters (A100: 40 MB; H100: 50 MB).
"""

from __future__ import annotations

from transcoder.kernels.triton_support import cdiv

SLAB_BYTES = 24 << 20
"""The prefix gradients of one slab of columns, [P, B, slab] in the accumulator's type, live between the row-wise pass that
makes them and the feature-major pass that reads each row about k times. 24 MiB stay in the second-level cache with the
slab of W_dec being read, so neither pass pays memory traffic for them. At B = 4096 and 4 prefixes a slab has 256 columns (9
slabs of a 2304-wide output); at B = 1024 it has 1536 (2 slabs), which keeps 6144 programs in a launch."""

TOTAL_TOKENS = 4096
TOTAL_WARPS = 8
"""Per-token errors that the second stage of the loss adds a turn, 16 a lane: 9 turns at the reference shape, where the whole
[P, tiles, B] is 0.6 MB and a program a prefix is enough."""

SEARCHES = 128
"""Binary searches (row x prefix) a program: one a lane of 4 warps."""
COPIES = 1024
"""Entries that one program brings into feature-major order."""


def slab_columns(rows: int, prefixes: int, element_size: int, tile: int) -> int:
    """Columns of a slab: whole tiles, at least one."""
    return max(1, SLAB_BYTES // max(1, rows * prefixes * element_size) // tile) * tile


def slabs(columns: int, width: int) -> list[tuple[int, int]]:
    """(first column, last + 1) of each slab."""
    return [(n * width, min((n + 1) * width, columns)) for n in range(cdiv(columns, width))]
