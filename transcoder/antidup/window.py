"""What the monitor knows of one stretch of tokens: correlations, distinct sequences, and how sure some pairs are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.pair_errors import PairJackknife
from transcoder.antidup.sequence_counts import SequenceCounts
from transcoder.kernels import FeatureCorrelation, SparseCodes

PARTS = {"": "statistics", "_sequences": "sequences", "_errors": "errors"}
"""Suffix in a saved state -> field."""


class Stretch:
    """Three statistics of the same tokens. They add up over disjoint tokens."""

    def __init__(self, statistics: FeatureCorrelation) -> None:
        self.statistics = statistics
        self.sequences = SequenceCounts(statistics.d_sae, statistics.device)
        self.errors = PairJackknife(statistics.d_sae, statistics.device)

    def update(self, codes: SparseCodes, sequences: Tensor | None, weights: Tensor | None) -> None:
        self.statistics.update(codes, weights)
        self.sequences.update(codes, sequences, weights)
        self.errors.update(codes, sequences, weights)

    def merge(self, other: Stretch) -> None:
        self.statistics.merge(other.statistics)
        self.sequences.merge(other.sequences)
        self.errors.merge(other.errors)

    def forget(self, latents: Tensor) -> None:
        self.statistics.forget(latents)
        self.sequences.forget(latents)
        self.errors.forget(latents)

    def begin(self, before: Stretch) -> None:
        """Forget every token; go on behind `before`: a sketch's sign never serves two tokens of one stream."""
        self.statistics.reset()
        self.statistics.updates = before.statistics.updates
        self.sequences.reset()
        self.errors.reset()
        self.errors.watch(before.errors.i, before.errors.j)

    def state_dict(self, name: str) -> dict[str, Any]:
        """{name, name_sequences, name_errors}."""
        return {f"{name}{suffix}": getattr(self, part).state_dict() for suffix, part in PARTS.items()}

    def load_state_dict(self, name: str, state: Mapping[str, Any]) -> None:
        """What `state_dict(name)` gave. Raises: ValueError; some parts may have changed then."""
        for suffix, part in PARTS.items():
            getattr(self, part).load_state_dict(state[f"{name}{suffix}"])


def state_names(name: str) -> set[str]:
    return {f"{name}{suffix}" for suffix in PARTS}


def nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """No pairs: (i, j), each [0] int64."""
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return empty, empty
