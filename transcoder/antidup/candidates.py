"""Which of the pairs above the threshold are handled: all of them, or of very many the most telling ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from transcoder.antidup.flags import Pair
from transcoder.antidup.merge_cost import MergeResult
from transcoder.antidup.pair_errors import places_of
from transcoder.antidup.window import SequenceCounts
from transcoder.config import MonitorSection
from transcoder.kernels import CorrelatedPairs, FeatureCorrelation
from transcoder.kernels.correlation.statistics import PairStatistics, Survey, kept, sorted_pairs

MOST_MINED = 1 << 16
"""Most pairs that a search gives, the strongest: 4 MiB."""
LEAST_LIMIT = 8192


def most_candidates(d_sae: int) -> int:
    """Most pairs that are handled one by one: listed, judged, followed, flagged in a block. A dictionary with more has failed
    as a whole; its groups of latents are known even so, see `most_telling`."""
    return max(LEAST_LIMIT, d_sae)


def most_telling(pairs: CorrelatedPairs, d_sae: int) -> CorrelatedPairs:
    """Of more than `most_candidates`: pairs that join all latents of each group (the strongest ones that do, one fewer than
    latents), then the strongest others. In the order of `pairs`."""
    most = most_candidates(d_sae)
    if len(pairs) <= most:
        return pairs
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import minimum_spanning_tree

    i, j = pairs.i.cpu().numpy(), pairs.j.cpu().numpy()
    # The weight of an edge is its place in the order, so that there is one forest of least weight.
    places = torch.arange(1, len(pairs) + 1, dtype=torch.float64, device="cpu")
    forest = minimum_spanning_tree(coo_array((places.numpy(), (i, j)), shape=(d_sae, d_sae)).tocsr())
    joins = torch.from_numpy(forest.data).long() - 1
    chosen = torch.zeros(len(pairs), dtype=torch.bool, device="cpu")
    chosen[joins] = True
    room = most - joins.numel()
    chosen[(~chosen).nonzero().flatten()[:room]] = True
    return at(pairs, chosen.nonzero().flatten().to(pairs.i.device))


def listed_pairs(
    found: CorrelatedPairs,
    always: set[Pair],
    seen: SequenceCounts,
    view: FeatureCorrelation,
    past: list[FeatureCorrelation],
    section: MonitorSection,
) -> tuple[CorrelatedPairs, list[int | None]]:
    """Those of `found` that are candidates (of very many the most telling) and the pairs `always`, sorted, and each one's
    distinct sequences, None where they are not known; all of the tokens in `view` and `past`."""
    keep = found.correlation > section.correlation_threshold
    distinct = seen.distinct(found.i, found.j)
    if distinct is not None:
        keep &= distinct >= section.min_sequences
    listed = most_telling(at(found, keep), view.d_sae)
    parts = [PairStatistics(*(getattr(listed, f.name) for f in fields(PairStatistics)))]
    extra = sorted(always - set(zip(listed.i.tolist(), listed.j.tolist(), strict=True)))
    if extra:
        i, j = (torch.tensor(side, device=view.device) for side in zip(*extra, strict=True))
        parts.append(view.statistics(i, j, beside=past))
    pairs = sorted_pairs(parts, view.d_sae, view.device)
    distinct = seen.distinct(pairs.i, pairs.j)
    return pairs, [None] * len(pairs) if distinct is None else distinct.tolist()


def at(pairs: CorrelatedPairs, index: Tensor) -> CorrelatedPairs:
    return CorrelatedPairs(*(getattr(pairs, f.name)[index] for f in fields(CorrelatedPairs)))


def flagged_first(pairs: CorrelatedPairs, flagged: set[Pair]) -> Tensor:
    """[P] int64: the order of flagged pairs, then the others, each in the order of `pairs`."""
    late = [pair not in flagged for pair in zip(pairs.i.tolist(), pairs.j.tolist(), strict=True)]
    return torch.tensor(late, dtype=torch.bool, device=pairs.i.device).sort(stable=True).indices


def above(pairs: CorrelatedPairs, among: set[Pair], threshold: float) -> set[Pair]:
    """Those of `among` that are in `pairs` with a correlation above the threshold."""
    keep = pairs.correlation > threshold
    return among.intersection(zip(pairs.i[keep].tolist(), pairs.j[keep].tolist(), strict=True))


def first_of_each(i: Tensor, j: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """Each distinct pair at its first place."""
    key, inverse = torch.unique(i * d_sae + j, return_inverse=True)
    first = torch.full_like(key, key.numel() + i.numel())
    first.scatter_reduce_(0, inverse, torch.arange(i.numel(), device=i.device), "amin")
    order = first.sort().values
    return i[order], j[order]


@dataclass(frozen=True, eq=False)
class KnownPairs:
    """What the last search found, for the reports that search for nothing."""

    i: Tensor
    j: Tensor
    """[P] int64: the listed pairs."""
    unlisted: int
    """Pairs above the threshold beyond those."""
    histogram: Tensor | None
    effective_size: float | None

    @classmethod
    def of(cls, survey: Survey, listed: CorrelatedPairs, d_sae: int, size: float | None = None) -> KnownPairs:
        # Beyond the limits the sequences of the pairs that are left out are not looked at.
        unlisted = 0
        if survey.total > min(MOST_MINED, most_candidates(d_sae)):
            unlisted = max(0, survey.total - len(listed))
        return cls(listed.i, listed.j, unlisted, survey.histogram, size)

    def now(self, view: FeatureCorrelation, past: list[FeatureCorrelation], section: MonitorSection) -> CorrelatedPairs:
        """Those of the pairs that are still candidates."""
        found = view.statistics(self.i, self.j, beside=past)
        enough = kept(found, section.correlation_threshold, section.min_support)
        return sorted_pairs([enough], view.d_sae, view.device)

    def state_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(KnownPairs)}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], device: torch.device) -> KnownPairs:
        """Raises: KeyError or ValueError where it is no such state."""
        i, j, counts = (None if state[n] is None else state[n].to(device, copy=True) for n in ("i", "j", "histogram"))
        if i is None or j is None or i.shape != j.shape or i.dim() != 1:
            raise ValueError("KnownPairs: expected i and j, each [P]")
        return cls(i, j, int(state["unlisted"]), counts, state["effective_size"])


class Verdicts:
    """The latest verdict of the merge test on each candidate, kept for the reports that test nothing."""

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self._d_sae, self._device = d_sae, device
        nothing = torch.empty(0, dtype=torch.int64, device=device)
        self._found = MergeResult.untested(nothing, nothing)

    def remember(self, found: MergeResult) -> None:
        """Those with a verdict; all others are dropped."""
        self._found = found.at(found.known)

    def of(self, i: Tensor, j: Tensor) -> MergeResult:
        """One entry a pair i < j, untested where none is remembered."""
        found, mine = MergeResult.untested(i, j), self._found
        low, high = torch.minimum(mine.kept, mine.dropped), torch.maximum(mine.kept, mine.dropped)
        place = places_of(i, j, (low, high), self._d_sae)
        there = place >= 0
        for f in fields(MergeResult):
            getattr(found, f.name)[there] = getattr(mine, f.name)[place[there]]
        return found

    def forget(self, latents: Tensor) -> None:
        gone = torch.isin(self._found.kept, latents) | torch.isin(self._found.dropped, latents)
        self._found = self._found.at(~gone)

    def state_dict(self) -> dict[str, Tensor]:
        return {f.name: getattr(self._found, f.name).clone() for f in fields(MergeResult)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All of it or, with a ValueError or KeyError, nothing."""
        columns = [state[f.name] for f in fields(MergeResult)]
        if len({column.shape for column in columns}) != 1 or columns[0].dim() != 1:
            shapes = [list(column.shape) for column in columns]
            raise ValueError(f"Verdicts.load_state_dict: expected columns of one length [P], got {shapes}")
        self._found = MergeResult(*(column.to(self._device, copy=True) for column in columns))
