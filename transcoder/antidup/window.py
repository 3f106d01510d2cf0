"""The monitor's statistics over a window of tokens: correlations, distinct sequences, and errors of some pairs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.flags import Evidence, Pair
from transcoder.antidup.pair_errors import PairJackknife, correlation_bounds, scaled
from transcoder.kernels import FeatureCorrelation, SparseCodes, counts_cpp
from transcoder.kernels.correlation.counter_rng import hash_bits
from transcoder.kernels.correlation.tracked_pairs import MAX_WATCHED

PAIRS_AT_A_TIME = 4096
"""Pairs whose bitmaps are joined at a time: 1 MiB."""
PARTS = {"": "statistics", "_sequences": "sequences", "_errors": "errors"}
"""Suffix in a saved state -> field."""


BLOCK_TOKENS = 4_000_000
"""Default of `antidup.monitor.block_tokens`, which shorter runs lower."""


class Window:
    """Three statistics of the same tokens: correlations, distinct sequences of each latent, and the errors of some pairs."""

    def __init__(self, statistics: FeatureCorrelation) -> None:
        self.statistics = statistics
        self.sequences = SequenceCounts(statistics.d_sae, statistics.device)
        self.errors = PairJackknife(statistics.d_sae, statistics.device)

    def update(self, codes: SparseCodes, sequences: Tensor | None, weights: Tensor | None) -> int | None:
        """Returns what `pairs_in` does, where it was counted on the way."""
        self.statistics.update(codes, weights)
        pairs = self.sequences.update(codes, sequences, weights)
        self.errors.update(codes, sequences, weights)
        return pairs

    def forget(self, latents: Tensor) -> None:
        self.statistics.forget(latents)
        self.sequences.forget(latents)
        self.errors.forget(latents)

    def begin(self, before: Window) -> None:
        """Forget every token and continue the stream after `before`, so that a sketch does not use a random sign twice."""
        self.statistics.reset()
        self.statistics.updates = before.statistics.updates
        self.sequences.reset()
        self.errors.reset()
        self.errors.watch(before.errors.i, before.errors.j)

    def own_errors(self, i: Tensor, j: Tensor, weight: Tensor, earlier: Window | None) -> list[float | None]:
        """Standard errors of atanh(r) over these tokens and those of `earlier`, of total weight `weight` [P]; None where a pair
        was not followed on enough of them."""
        found = self.errors.errors(i, j, earlier=None if earlier is None else earlier.errors)
        return [None if math.isnan(e) else e for e in scaled(found, found.fisher, weight).tolist()]

    def evidence(self) -> dict[Pair, Evidence]:
        """Evidence of every pair that was followed on enough of the window, at any correlation."""
        i, j = self.errors.i, self.errors.j
        stats, found = self.statistics.statistics(i, j), self.errors.errors(i, j)
        error = scaled(found, found.plain, stats.weight)
        kept = ~error.isnan() & (stats.support > 3)
        columns = (i, j, stats.correlation, error, stats.support.double())
        rows = zip(*(column[kept].tolist() for column in columns), strict=True)
        return {(a, b): (r, e, support) for a, b, r, e, support in rows}

    def released(self, flagged: list[Pair], threshold: float) -> list[Pair]:
        """Those whose upper bound is below the threshold, or one of whose latents did not fire."""
        if not flagged:
            return []
        i, j = torch.tensor(flagged, dtype=torch.int64, device=self.statistics.device).T
        stats, counts = self.statistics.statistics(i, j), self.statistics.counts()
        errors = self.own_errors(i, j, stats.weight, None)
        dead = ((counts[i] == 0) | (counts[j] == 0)).tolist()
        columns = (stats.correlation.tolist(), stats.support.tolist(), errors, dead)
        rows = zip(flagged, *columns, strict=True)
        return [pair for pair, r, n, e, gone in rows if gone or correlation_bounds(r, n, e)[1] < threshold]

    def state_dict(self, name: str) -> dict[str, Any]:
        """{name, name_sequences, name_errors}."""
        return {f"{name}{suffix}": getattr(self, part).state_dict() for suffix, part in PARTS.items()}

    def load_state_dict(self, name: str, state: Mapping[str, Any]) -> None:
        """Restore a state of `state_dict(name)`. Raises: ValueError; some parts may have changed then."""
        for suffix, part in PARTS.items():
            getattr(self, part).load_state_dict(state[f"{name}{suffix}"])


def state_names(name: str) -> set[str]:
    return {f"{name}{suffix}" for suffix in PARTS}


def nothing(device: torch.device) -> tuple[Tensor, Tensor]:
    """No pairs: (i, j), each [0] int64."""
    empty = torch.empty(0, dtype=torch.int64, device=device)
    return empty, empty


class SequenceCounts:
    """One bitmap a latent: bit hash(sequence) mod bits is set when the latent fires in that sequence.

    The union of two bitmaps estimates the distinct sequences on which either fires (linear counting, Whang et
    al. 1990): -m ln(1 - x / m) for x of m bits set; about +-1.4 at 30 sequences and m = 256. A full bitmap
    means "m ln m or more".

    Memory: `bits` bytes a latent (4.5 MiB at 18432 latents and 256 bits).
    """

    def __init__(self, d_sae: int, device: torch.device, bits: int = 256) -> None:
        self.bits = bits
        self._map = torch.zeros(d_sae * bits, dtype=torch.uint8, device=device)
        self.known = False
        """Whether any update was given the sequences of its tokens."""

    def update(self, codes: SparseCodes, sequences: Tensor | None, weights: Tensor | None = None) -> int | None:
        """`sequences` [B] ids, whole numbers. Tokens of unknown sequences, or of weight 0 in `weights` [B], leave the
        counts as they are. Returns what `pairs_in` does, where it was counted on the way."""
        if sequences is None:
            return None
        self.known = True
        if counts_cpp.runs(codes):
            return counts_cpp.mark_sequences(codes, sequences.long(), weights, self.bits, self._map)
        place = (hash_bits(sequences.long()) & (self.bits - 1))[codes.rows()]
        # A maximum does not depend on the order, and entries that do not fire change nothing.
        fires = codes.values.detach() > 0
        if weights is not None:
            fires = fires & (weights > 0)[codes.rows()]
        self._map.scatter_reduce_(0, codes.indices * self.bits + place, fires.to(torch.uint8), "amax")
        return None

    def distinct(self, i: Tensor, j: Tensor) -> Tensor | None:
        """[P] int64: estimated distinct sequences on which at least one of the pair fired; None if sequences were never
        given."""
        if not self.known:
            return None
        rows = self._map.view(-1, self.bits)
        parts = [
            (rows[a] | rows[b]).sum(1) for a, b in zip(i.split(PAIRS_AT_A_TIME), j.split(PAIRS_AT_A_TIME), strict=True)
        ]
        empty = self.bits - torch.cat(parts)
        return (-self.bits * (empty.clamp(min=1).double() / self.bits).log()).round().long()

    def merge(self, other: SequenceCounts) -> None:
        self._map |= other._map
        self.known = self.known or other.known

    def forget(self, latents: Tensor) -> None:
        """Remove all firings of these latents."""
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


_NUMBERS_BYTES = 1024
"""Bytes reserved for the numbers of a state that are no tensors, as text."""
_WATCHED_BYTES = 88
"""A watched pair: two latents, the weight, three sums of each latent, the product and the joint count, 8 bytes each."""


def correlation_state_bytes(part: FeatureCorrelation, batch_tokens: int, entries_per_token: int) -> int:
    """Upper bound of the bytes in `part.state_dict()`, for any length of the stream.

    Args:
        batch_tokens, entries_per_token: of the largest update; the ring of a sketch keeps codes, up to a batch
            more than `ring_tokens`.
    """
    moments = 8 * (2 + 3 * part.d_sae)
    if part.sketch_dim is None:
        # float64 products; counts in int32, int64 once they could overflow, float64 where they decay. A state
        # that lists pairs is written only where it is smaller.
        return moments + 16 * max(1, part.d_sae * (part.d_sae - 1) // 2) + _NUMBERS_BYTES
    tokens = part.ring_tokens + batch_tokens
    # A token's row_ptr and weight take 8 bytes each, and every update's row_ptr has one place more than tokens;
    # an entry takes 4 bytes of latent and at most 8 of value.
    ring = tokens * (24 + 12 * entries_per_token)
    # Statistics with a half-life have no watched pairs.
    watched = min(MAX_WATCHED, part.d_sae * (part.d_sae - 1) // 2) if part.halflife is None else 0
    return moments + 4 * part.sketch_dim * (part.d_sae + 1) + ring + _WATCHED_BYTES * watched + _NUMBERS_BYTES


def pairs_in(codes: SparseCodes) -> Tensor:
    """0-dim: pairs of latents that fire on the same token, summed over tokens."""
    fires = codes.values.detach() > 0
    if codes.device.type == "cpu" and bool(fires.all()):
        active = codes.row_ptr.diff()
    else:
        fired = torch.zeros(codes.nnz + 1, dtype=torch.int64, device=codes.device)
        torch.cumsum(fires, 0, out=fired[1:])
        active = fired[codes.row_ptr].diff()
    return (active * (active - 1)).sum() // 2
