"""Launch choices of the Triton encode kernels: frozen data, each with its reason.

Registers, stack and shared memory are what ptxas reports for the compiled kernel (tests/kernels/test_compile_encode.py reads
them again on every run); times are not given where none was measured.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class ProductLaunch:
    """Tile of the product x @ W_enc.T and how a program runs it."""

    rows: int
    latents: int
    depth: int
    warps: int
    stages: int
    reason: str
    group: int = 8
    """Row blocks that go through the tiles of W_enc together: 8 blocks of x stay in the outer cache."""
    described: bool = False
    """Blocks of x and W_enc come by descriptors (TMA) where their shape, strides and addresses allow it."""


FLOAT_REASON = "exact fp32 products run on the FMA units: 32 sums a thread; shared memory is no limit"
PRODUCT: dict[str, dict[str, ProductLaunch]] = {
    "sm_80": {
        "half": ProductLaunch(128, 128, 64, 8, 3, "mma.sync; 162 registers, no stack, 64 KiB of sm_86's 99"),
        "tf32": ProductLaunch(128, 128, 32, 8, 3, "mma.sync; 166 registers, no stack, 64 KiB"),
        "float": ProductLaunch(64, 64, 32, 4, 3, FLOAT_REASON + "; 188 registers, 32 KiB"),
    },
    "sm_90": {
        "half": ProductLaunch(
            128, 128, 64, 8, 3,
            "wgmma; 128 registers and 96 KiB, no stack: two programs a multiprocessor, so that one keeps its best while the "
            "other multiplies. 128 x 256 takes 239 registers: one program, nothing hides behind its epilogue. By descriptors: "
            "122 registers, and 88 instead of 100 instructions a step of the product",
            described=True,
        ),
        "tf32": ProductLaunch(128, 128, 32, 8, 3, "wgmma; 128 registers and 96 KiB, no stack: two programs a multiprocessor"),
        "float": ProductLaunch(64, 64, 32, 4, 3, FLOAT_REASON + "; 128 registers, 32 KiB: four programs a multiprocessor"),
    },
    "sm_100": {
        "half": ProductLaunch(128, 128, 64, 8, 3, "tcgen05; 207 registers and 96 KiB, no stack; sums live in tensor memory"),
        "tf32": ProductLaunch(128, 128, 32, 8, 3, "tcgen05; 207 registers and 96 KiB, no stack"),
        "float": ProductLaunch(64, 64, 32, 4, 3, FLOAT_REASON + "; 152 registers, 32 KiB"),
    },
    "sm_120": {
        "half": ProductLaunch(128, 128, 32, 8, 3, "mma.sync; 130 registers, no stack, 32 KiB of the 99 there are"),
        "tf32": ProductLaunch(128, 128, 32, 8, 2, "mma.sync; 162 registers, no stack, 32 KiB"),
        "float": ProductLaunch(64, 64, 32, 4, 3, FLOAT_REASON + "; 128 registers, 32 KiB"),
    },
    "gfx942": {
        "half": ProductLaunch(128, 128, 64, 8, 2, "mfma; 134 vector registers, no spills, 32 of 64 KiB; 4 warps take 232"),
        "tf32": ProductLaunch(64, 64, 32, 4, 2, "as float"),
        "float": ProductLaunch(64, 64, 32, 4, 2, "mfma has exact fp32; 114 vector registers, no spills, 16 KiB"),
    },
    "interpreter": {
        name: ProductLaunch(16, 16, 16, 1, 1, "the smallest tile: an interpreted program costs much the same at any size")
        for name in ("half", "tf32", "float")
    },
}  # fmt: skip
"""architecture -> input class (half: bfloat16 and float16; float: exact float32; tf32) -> launch.

One set serves any number of tokens. Predicted for an H100 by bench.roofline's model, 18432 latents, bf16: up to 64 tokens the
product waits 30 us for W_enc from memory, and the half of its tile that has no token costs matrix units that were idle anyway
(18 us in all). At 4096 tokens these tiles read 5.4 GB through the second-level cache (0.77 ms if that gives 7.1 TB/s, against
0.59 ms of products); 128 x 256 would read 4.1 GB (0.58 ms) with one program a multiprocessor. Which of the two is faster has to
be measured first: `python -m bench.autotune --only product-half`."""
SIMILAR = {"sm_8": "sm_80", "sm_10": "sm_100", "sm_11": "sm_100", "sm_12": "sm_120", "gfx": "gfx942"}
"""Prefix of an architecture without an entry -> the entry of a similar one. All others take the one that requires least."""


def product_launch(architecture: str, inputs: str) -> ProductLaunch:
    if architecture not in PRODUCT:
        similar = [PRODUCT[name] for prefix, name in SIMILAR.items() if architecture.startswith(prefix)]
        return (similar[0] if similar else PRODUCT["sm_120"])[inputs]
    return PRODUCT[architecture][inputs]


def threshold_launch(product: ProductLaunch) -> ProductLaunch:
    """threshold_encode numbers its hits by a running sum over the tile: at full width that spills 416 bytes on sm_90, at
    half width it takes 184 registers and no stack."""
    return replace(product, latents=max(16, product.latents // 2))


SCRATCH_BYTES = 64 << 20
"""Bytes of kept entries at a time in topk_encode: more rows take several rounds. Keeps extra memory under 100 MB."""
KEPT_BYTES = 5
"""A kept entry: an int32 key and a uint8 place."""
SELECT_CHUNK = 1024
"""Kept entries of a token that its program reads at a time: all of them (6 of 144 tiles) at the reference shape."""
RESCAN_CHUNK = 256
"""The same for a row that is merged with a tile computed again: k and 128 entries, few enough for one turn."""
ORDER_CHUNK = 64
ORDER_WARPS = 4
"""Selected entries whose rank is counted at a time: one turn up to k = 64, 32 comparisons and 96 registers a thread (160
with 2 warps)."""
RESCAN_SHARE = 1e-3
"""Share of tokens that may be expected to fail the certificate. One more kept entry costs every tile a pass over its
registers; a rescanned tile costs one program one more tile: at 4096 tokens these are 4 tiles of some 4600."""
BATCH_SPREAD = 2
"""BatchTopK lets a token have more than k entries: tiles keep what a token of twice k needs."""

RADIX_BITS = 11
RADIX_BINS = 1 << RADIX_BITS
"""A digit of the radix selection: a 31-bit key in three digits; the counts of a digit are 8 KiB of shared memory."""
RADIX_BLOCK = 2048
COLLECT_BLOCK = 1024
"""The same where entries are gathered: 2048 spill 8 bytes on sm_120, 1024 take 100 registers."""
RADIX_WARPS = 8
"""Entries a program counts at a time, 8 a thread; the 2048 bins are then 8 a thread too."""


def kept_entries(k: int, d_sae: int, latents: int, spread: int = 1) -> int:
    """How many entries a tile keeps of a token: the fewest for which RESCAN_SHARE of the tokens at most are rescanned.

    A winner falls into each of the T tiles alike, so a tile's winners are about Poisson(k / T) distributed.
    """
    tiles = -(-d_sae // latents)
    most = min(latents, -(-d_sae // tiles))
    mean = min(spread * k, d_sae) / tiles
    reached = 1.0
    term = math.exp(-mean)
    for kept in range(1, most + 1):
        reached -= term
        term *= mean / kept
        if reached * tiles <= RESCAN_SHARE:
            return kept
    return most


def selection_warps(chunk: int) -> int:
    """Eight entries a thread: enough independent loads in flight, and few warps to wait for in a reduction."""
    return max(1, chunk // 256)
