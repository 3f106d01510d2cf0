"""Running sums of each latent's activation over recent batches: by position in the sequence, and on sink tokens."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transcoder.kernels import SparseCodes
from transcoder.kernels.correlation.torch_backend import add_at

POSITION_BINS = 10
DECAY = 0.99
"""Factor on everything remembered, each batch: a memory of about 100 batches."""


MIN_FIRINGS = 30.0
"""Remembered firings from which a latent's entropy over positions is judged: of 30 even ones the estimate is
about 9 / (2 * 30) nats, 0.07 of log(10), too low."""


class PositionShares(NamedTuple):
    """q_ip = (M_ip / O_p) / sum_p (M_ip / O_p): M_ip the mass of latent i in bin p, O_p the tokens that the bin offered."""

    entropy: Tensor
    """[d_sae]: -sum_p q log q / log(bins offered), in [0, 1]: 1 is flat, 0 a single bin."""
    judged: Tensor
    """[d_sae] bool: has fired `MIN_FIRINGS` times, enough for an estimate of its entropy."""
    log_share: Tensor
    """[d_sae, bins]: log q, 0 where q is 0."""
    slope: Tensor
    """[d_sae, bins]: d entropy / d M_ip = -(log q + 1) * slope, the denominators held constant."""


class PositionMass:
    """Decayed sums over batches, on the device: each latent's activation per position bin, the tokens that each
    bin offered, and each latent's firings.

    The positions 0 .. the largest ever seen (at least `length` - 1) are cut into 10 equal bins. Memory: 44 bytes a latent in
    fp32. `decay` 1 forgets nothing.
    """

    def __init__(
        self,
        d_sae: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        decay: float = DECAY,
        length: int = 0,
    ) -> None:
        def zeros(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.zeros(*size, dtype=dtype, device=device)

        self.mass = zeros(d_sae, POSITION_BINS)
        self.offered = zeros(POSITION_BINS)
        self.firings = zeros(d_sae)
        self._length = zeros((), dtype=torch.int64) + length  # type: ignore[arg-type]
        self._decay = decay

    @torch.no_grad()
    def add(self, codes: SparseCodes, positions: Tensor) -> Tensor:
        """Decay, then add the tokens of `codes` at `positions` [B] int64. Never waits for a device.

        Returns: [B] int64, the bin of each token.
        """
        for part in (self.mass, self.offered, self.firings):
            part *= self._decay
        if codes.shape[0] == 0:
            return positions
        self._length = torch.maximum(self._length, positions.max() + 1)
        bin_of = (positions * POSITION_BINS // self._length).clamp(0, POSITION_BINS - 1)
        values = codes.values.detach().to(self.mass.dtype)
        add_at(self.offered, bin_of, torch.ones_like(bin_of, dtype=self.offered.dtype))
        add_at(self.mass.view(-1), codes.indices * POSITION_BINS + bin_of[codes.rows()], values)
        add_at(self.firings, codes.indices, (values > 0).to(self.firings.dtype))
        return bin_of

    def shares(self) -> PositionShares:
        """Each latent's mass per bin, divided by what the bin offered, as shares with their entropy."""
        rate = 1 / self.offered.clamp(min=1)
        mass = self.mass * rate
        whole = mass.sum(1, keepdim=True)
        judged = (self.firings >= MIN_FIRINGS) & (whole.squeeze(1) > 0)
        whole = torch.where(judged[:, None], whole, 1)
        q = mass / whole
        log_q = torch.where(q > 0, q, 1).log()
        scale = 1 / (self.offered > 0).sum().clamp(min=2).to(mass.dtype).log()
        return PositionShares(-(q * log_q).sum(1) * scale, judged, log_q, scale * rate / whole)

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


class SinkMass:
    """Decayed sums over batches, on the device: each latent's activation on sinks and on all tokens, and its firings."""

    def __init__(self, d_sae: int, device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
        self.sums = torch.zeros(3, d_sae, dtype=dtype, device=device)
        """Activation on sinks, on all tokens, firings."""

    @torch.no_grad()
    def add(self, codes: SparseCodes, sink: Tensor) -> None:
        """Decay, then add the tokens of `codes`; `sink` [B] bool marks the sinks. Never waits for a device."""
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
