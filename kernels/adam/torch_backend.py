"""Backend `torch` has no op for the step: torch.optim.Adam takes it (training/optimizer.py)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def takes(tensors: Sequence[Tensor]) -> bool:
    """Always False."""
    return False
