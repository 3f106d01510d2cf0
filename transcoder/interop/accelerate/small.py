"""Sizes at which a library's own dense code is the faster one, and runs."""

from __future__ import annotations

from torch import Tensor, nn

OWN_CODE_BELOW = 2**17
"""Rows of a batch times latents. Dense code costs by that product, ours a fixed sum of small operations (about half a
millisecond a step more on a CPU) and what is selected. SAELens' full steps with `always`, batches of 32 to 1024, 128 to 8192
latents, d 64 and 512, one thread, against its own: 0.6 to 1 of its speed at 2**12 to 2**14, 1 to 1.5 at 2**16; from 2**17 on
1.1 and more, but 0.99 for Matryoshka at 1024 rows, d 512, 128 latents. A rule, not a measurement at run time: the same batch
always takes the same path, so runs repeat."""

FEWEST_ROWS = 128
"""sparsify and dictionary_learning: fewer rows than this run on their own code too, however many latents. What reads and writes
whole weights (Adam, the gradients) is the step then, and theirs does so no more often than ours: full steps with `always`, one
thread, at 8192 latents 0.7 to 0.98 of the library's speed with 32 rows, 0.9 to 1.2 with 64; from 128 rows on 1.02 and more."""


def own_code(module: nn.Module, x: Tensor, latents: int, fewest_rows: int = 0) -> bool:
    """Whether the library's own code encodes x [..., d_in]."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows > 0 and module.__dict__.get("_transcoder_always", False):
        return False
    return rows < fewest_rows or rows * latents < OWN_CODE_BELOW
