"""Which share of each latent's activation falls on sink tokens, over recent batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.position_mass import DECAY
from transcoder.kernels import SparseCodes
from transcoder.kernels.correlation.torch_backend import add_at


class SinkMass:
    """Decayed sums over batches, on the device: each latent's activation on sinks and on all tokens, and its firings."""

    def __init__(self, d_sae: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        self.sums = torch.zeros(3, d_sae, dtype=dtype, device=device)
        """Activation on sinks, on all tokens, firings."""

    @torch.no_grad()
    def add(self, codes: SparseCodes, sink: Tensor) -> None:
        """Decay, then add the tokens of `codes`, of which `sink` [B] bool says which are sinks. Never waits for a device."""
        values = codes.values.detach().to(self.sums.dtype)
        at_sink = torch.where(sink[codes.rows()], values, 0)
        self.sums *= DECAY
        for row, part in zip(self.sums, (at_sink, values, (values > 0).to(values.dtype)), strict=True):
            add_at(row, codes.indices, part)

    def state_dict(self) -> dict[str, Any]:
        return {"sums": self.sums.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        if state["sums"].shape != self.sums.shape:
            raise ValueError(
                f"SinkMass.load_state_dict: sums: expected shape {list(self.sums.shape)}, got {list(state['sums'].shape)}"
            )
        self.sums.copy_(state["sums"])
