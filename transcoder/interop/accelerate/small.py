"""Sizes at which a library's own dense code is the faster one, and runs."""

from __future__ import annotations

from torch import Tensor, nn

OWN_CODE_BELOW = 2**17
"""Rows of a batch times latents. Dense code costs by that product, ours a fixed sum of small operations (about half a
millisecond a step more on a CPU) and what is selected. Measured over batches of 32 to 1024 and 128 to 8192 latents
(`bench/interop_speed.py --sweep --always`): full steps took 0.6 to 0.8 of the library's speed at 2**12 to 2**14, 1 to 1.4 at
2**16, and from 2**17 on they were faster at every size. A rule, not a measurement at run time: the same batch always takes
the same path, so runs repeat."""


def own_code(module: nn.Module, x: Tensor, latents: int) -> bool:
    """Whether the library's own code encodes x [..., d_in]."""
    rows = x.numel() // max(x.shape[-1], 1)
    return rows * latents < OWN_CODE_BELOW and not module.__dict__.get("_transcoder_always", False)
