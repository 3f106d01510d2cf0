"""On how many distinct sequences a pair of latents fired, by linear counting."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transcoder.kernels import SparseCodes, counts_cpp
from transcoder.kernels.correlation.counter_rng import hash_bits


class SequenceCounts:
    """One bitmap a latent: bit hash(sequence) mod bits is set when the latent fires in that sequence.

    The union of two bitmaps estimates the distinct sequences on which either fires (linear counting, Whang et
    al. 1990): -m ln(1 - x / m) for x of m bits set; about +-1.4 at 30 sequences and m = 256. A full bitmap
    says "m ln m or more".

    Memory: `bits` bytes a latent (4.5 MiB at 18432 latents and 256 bits).
    """

    def __init__(self, d_sae: int, device: torch.device, bits: int = 256) -> None:
        self.bits = bits
        self._map = torch.zeros(d_sae * bits, dtype=torch.uint8, device=device)
        self.known = False
        """Whether any update said which sequences its tokens come from."""

    def update(self, codes: SparseCodes, sequences: Tensor | None, weights: Tensor | None = None) -> None:
        """`sequences` [B] ids, whole numbers. Tokens of unknown sequences, or of weight 0 in `weights` [B], leave the
        counts as they are."""
        if sequences is None:
            return
        self.known = True
        place = hash_bits(sequences.long()) & (self.bits - 1)
        if counts_cpp.runs(codes):
            counts_cpp.mark_places(codes, place, weights, self.bits, self._map)
            return
        place = place[codes.rows()]
        # A maximum: repeated places and entries that do not fire change nothing, whatever the order.
        fires = codes.values.detach() > 0
        if weights is not None:
            fires = fires & (weights > 0)[codes.rows()]
        self._map.scatter_reduce_(0, codes.indices * self.bits + place, fires.to(torch.uint8), "amax")

    def distinct(self, i: Tensor, j: Tensor) -> Tensor | None:
        """[P] int64: estimated distinct sequences on which at least one of the pair fired; None if never
        told."""
        if not self.known:
            return None
        rows = self._map.view(-1, self.bits)
        empty = self.bits - (rows[i] | rows[j]).sum(1)
        return (-self.bits * (empty.clamp(min=1).double() / self.bits).log()).round().long()

    def merge(self, other: SequenceCounts) -> None:
        self._map |= other._map
        self.known = self.known or other.known

    def forget(self, latents: Tensor) -> None:
        """As if these latents had never fired."""
        self._map.view(-1, self.bits).index_fill_(0, latents, 0)

    def reset(self) -> None:
        self._map.zero_()
        self.known = False

    def state_bytes(self) -> int:
        """Bytes of the state's tensor."""
        return self._map.numel()

    def state_dict(self) -> dict[str, Any]:
        return {"map": self._map.clone(), "known": self.known}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        known = bool(state["known"])
        if state["map"].shape != self._map.shape:
            raise ValueError(
                f"SequenceCounts.load_state_dict: map: expected {self._map.numel()} bits (d_sae * {self.bits}), got "
                f"{state['map'].numel()}"
            )
        self._map.copy_(state["map"])
        self.known = known
