"""Sizes at which a library's own dense code is the faster one, and runs."""

from __future__ import annotations

from torch import Tensor, nn

OWN_CODE_BELOW = 2**18
"""Rows of a batch times latents. Dense code costs by that product, ours a fixed sum of small operations (about half a
millisecond a step more on a CPU) and what is selected. Full steps with `always`, batches of 32 to 1024, 128 to 8192 latents,
d 64 and 512, against the library's own: 0.6 to 1 of its speed at 2**12 to 2**14, 0.84 to 1.2 at 2**17; from 2**18 on 1.06 and
more. A rule, not a measurement at run time: the same batch always takes the same path, so runs repeat."""

FEWEST_ROWS = 256
"""sparsify and dictionary_learning: fewer rows than this run on their own code too, however many latents. What reads and
writes whole weights (Adam, the gradients) is the step then, and theirs does so no more often than ours: full steps with
`always` at 8192 latents, 0.7 to 0.98 of the library's speed with 32 rows, 0.9 to 1.2 with 64, 0.90 to 1.21 with 128; from
512 rows on 1.3 and more."""


def own_code(module: nn.Module, x: Tensor, latents: int, fewest_rows: int = 0) -> bool:
    """Whether the library's own code encodes x [..., d_in]."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows > 0 and module.__dict__.get("_transcoder_always", False):
        return False
    return rows < fewest_rows or rows * latents < OWN_CODE_BELOW
