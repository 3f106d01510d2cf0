"""Where in the sequence each latent is active, over recent batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transcoder.kernels import SparseCodes
from transcoder.kernels.correlation.torch_backend import add_at

POSITION_BINS = 10
DECAY = 0.99
"""Factor on everything remembered, each batch: a memory of about 100 batches."""


class PositionMass:
    """Decayed sums over batches, on the device: each latent's activation per position bin, the tokens that each
    bin offered, and each latent's firings.

    The positions 0 .. the largest ever seen are cut into 10 equal bins. Memory: 44 bytes a latent in fp32.
    """

    def __init__(self, d_sae: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.mass = zeros(d_sae, POSITION_BINS)
        self.offered = zeros(POSITION_BINS)
        self.firings = zeros(d_sae)
        self._length = zeros((), dtype=torch.int64)  # type: ignore[arg-type]

    @torch.no_grad()
    def add(self, codes: SparseCodes, positions: Tensor) -> Tensor:
        """Decay, then add the tokens of `codes` at `positions` [B] int64. Never waits for a device.

        Returns: [B] int64, the bin of each token.
        """
        for part in (self.mass, self.offered, self.firings):
            part *= DECAY
        if codes.shape[0] == 0:
            return positions
        self._length = torch.maximum(self._length, positions.max() + 1)
        bin_of = (positions * POSITION_BINS // self._length).clamp(0, POSITION_BINS - 1)
        values = codes.values.detach().to(self.mass.dtype)
        add_at(self.offered, bin_of, torch.ones_like(bin_of, dtype=self.offered.dtype))
        add_at(self.mass.view(-1), codes.indices * POSITION_BINS + bin_of[codes.rows()], values)
        add_at(self.firings, codes.indices, (values > 0).to(self.firings.dtype))
        return bin_of

    def state_dict(self) -> dict[str, Any]:
        return {name: part.clone() for name, part in self._tensors().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        for name, part in self._tensors().items():
            if state[name].shape != part.shape:
                raise ValueError(
                    f"PositionMass.load_state_dict: {name}: expected shape {list(part.shape)}, got {list(state[name].shape)}"
                )
        for name, part in self._tensors().items():
            part.copy_(state[name])

    def _tensors(self) -> dict[str, Tensor]:
        return {"mass": self.mass, "offered": self.offered, "firings": self.firings, "length": self._length}
