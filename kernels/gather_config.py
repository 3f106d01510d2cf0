"""Launch choices of every kernel that gathers rows of a matrix: decode, its gradients, the encoder's gradients.

Frozen data. The numbers behind the reasons are byte and register counts (tests/kernels/test_compile_decode.py reads the
registers from the compiled code); none is a measured time yet.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gather:
    """One program holds a [rows, columns] tile of gathered rows in registers and owns `columns` columns of one result."""

    columns: int
    rows: int
    warps: int


CHOICES = {
    # 8 gathered rows a turn are 8 independent 1 KiB reads in flight a program. A tile of 256 columns keeps one column slab of
    # an 18432-row fp32 dictionary at 18.9 MB: inside the 50 MB second-level cache of an H100, so that the whole dictionary is
    # read from memory once however often its rows are gathered (programs that share a slab run together: the slab is the
    # slow grid axis). 2304 = 9 x 256: no lane idles. One warp: sums over columns stay inside the warp (no barrier), sums over
    # rows inside a lane; 2048 fp32 values are 64 registers a lane, so a sum takes 80 registers on sm_90 and the walk down 128:
    # 16 programs and more a multiprocessor, 128 KiB in flight.
    4: Gather(columns=256, rows=8, warps=1),
    # 16-bit rows: the same columns, so the slab halves (9.4 MB) and each lane still reads 16 bytes at a time.
    2: Gather(columns=256, rows=8, warps=1),
    # float64 is for checking gradients, not for speed: half the columns, the same registers.
    8: Gather(columns=128, rows=8, warps=1),
}
"""By the size in bytes of a gathered element."""

NARROW_COLUMNS = 32
"""The least tile: rows narrower than a choice's tile use the next power of two from here on, so d_out = 33 costs 64."""

SPLIT = 128
"""Entries of a segment summed by one program. A longer segment (a latent that fires on nearly every token) is cut at
multiples of SPLIT, its pieces are summed by separate programs and added in a fixed order. At the reference shape a
segment has 11 entries on average; 128 bound the longest program to 16 turns, and the pieces of one latent that fires on
all 4096 tokens to 32."""


def gather(table: torch.Tensor) -> Gather:
    """The choice for a matrix [*, d]."""
    choice = CHOICES[table.element_size()]
    narrow = max(NARROW_COLUMNS, 1 << max(0, table.shape[1] - 1).bit_length())
    return Gather(min(choice.columns, narrow), choice.rows, choice.warps)
