"""Launch choices of the correlation kernels. Frozen data; the numbers are counts, not timings."""

from __future__ import annotations

UNIT_BITS = 26
"""Products z_i z_j are rounded to multiples of U_i U_j 2^-26, where U_i is a power of two above the largest value of latent i
in the first update in which it fired. All sums of such multiples below 2^53 of them are exact in float64, so atomic additions
commute and the sums are bitwise reproducible; that holds for 2^27 tokens on which both latents stand at U, or for 2^23 at 4
times U (a block has 2^22 tokens). Beyond, only the last bits depend on the order. The rounding of one product is at most 2^-27
U_i U_j: 4e-7 of a product that is 2 % of U_i U_j, less by sqrt(n) in a sum where products differ by more than a step. Products
below half a step are lost, so a latent whose first firing is an outlier (8000 times its usual value, with both of a pair) loses
the usual ones; its variance is then at least (U / 2)^2, so n joint firings move a correlation by n 2^-25 at most: 0.001 at
40 000 of them.

Why not 64-bit integers, which have ten bits more: they overflow where float64 merely rounds, and the triangle would change
its type for merging, saving and mining."""

PAIR_BLOCK = 16
"""Entries of a row met with 16 others at a time: 48 entries are 6 tiles of 256 pairs, 27 % of them idle."""
PAIR_SLICES = 4
"""Programs a row, so that one long row is shared; at k = 48 three of the four have work."""
PAIR_WARPS = 4

LATENT_ENTRIES = 128
"""Entries of a latent summed a turn by its one warp, 4 a lane: 11 on average, 32 turns for one that fires on 4096 tokens."""
ENTRY_OWNERS_ABOVE = 2
"""With this many latents an entry and more, programs are counted by entries (those that are not their latent's first have
nothing to do) and not by latents, most of which did not fire."""

SKETCH_ROWS = 16
SKETCH_COLUMNS = 128
"""Tile of signs turned into signed values at a time: 2048, 32 a lane of two warps, made of one 32-bit word of random bits a
token and 32 columns, which the first-level cache repeats."""
SKETCH_WARPS = 2
WORDS = 256
"""Sign words a program of the hash, two a lane."""
ONES_TOKENS = 256
ONES_WARPS = 8
"""Tokens a turn of the constant's sketch: 16 turns at 4096 tokens."""

TILE = 64
DEPTH = 32
TILE_WARPS = 4
TILE_GROUP = 32
"""Mining: a [64, 64] tile of S @ S.T in tf32 (wgmma on sm_90), 174 registers, no spills. A [128, 128] tile would halve what
is read from the second-level cache, but with the ranks of its hits it takes 255 registers and spills 264 bytes. 32 rows of
tiles run together, so a row of S comes from memory once for 32 tiles: at 2^20 latents of 128 numbers 0.14 TB, not 4.4 TB."""
MAX_PROGRAMS = (1 << 31) - 1
"""Programs in a launch: 2.9 million latents; the slow path takes more."""
CAPACITY = 1 << 22
"""Candidates that fit: 64 MiB. There are more only if the threshold is far too low; the slow path then takes the best of
them."""
SLACK = 2.0**-10
"""Products of unit vectors by tf32 (10 mantissa bits kept of each factor) are off by at most this much."""
