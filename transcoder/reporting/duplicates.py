"""The duplicate pairs of a run, as its newest correlation report lists them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.format import number, percent
from transcoder.reporting.tables import SHOWN, ShownAsTable, html_table

if TYPE_CHECKING:
    import pandas as pd

    from transcoder.reporting.latents import Latent, Latents

HEAD = (
    "i",
    "j",
    "correlation",
    "95 % interval",
    "cosine",
    "support",
    "blocks",
    "flagged",
    "merge test",
    "cost of folding",
)


class Histogram(NamedTuple):
    """Pairs by correlation: `counts` [bins] between `edges` [bins + 1]."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """Two latents that rise and fall together.

    Fields:
        i, j: latent ids, i < j.
        correlation: Pearson's, over the tokens of the live view; `lower` and `upper` bound it at 95 %.
        cosine, jaccard: of the two activation columns, and of the sets of tokens on which they fire.
        support: tokens on which either fires. `sequences`: how many sequences they stand in; None where not counted.
        blocks_above: of the disjoint blocks remembered, in how many the lower bound was above the threshold (persistence).
        flagged: held in enough blocks to be called a duplicate.
        mergeable: the merge test's verdict on held-out tokens; None where it was not put to the test or says nothing.
        merge_share: what folding costs, as a share of what leaving the latent out costs.
        merge_fvu_change: the change of the held-out FVU by folding.
    """

    i: int
    j: int
    correlation: float
    lower: float
    upper: float
    cosine: float
    jaccard: float
    support: int
    sequences: int | None
    blocks_above: int
    flagged: bool
    mergeable: bool | None
    merge_share: float | None
    merge_fvu_change: float | None
    _latents: Latents | None = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def verdict(self) -> str:
        """ "mergeable", "not mergeable" or "not tested"."""
        return {True: "mergeable", False: "not mergeable", None: "not tested"}[self.mergeable]

    @property
    def latents(self) -> tuple[Latent, Latent]:
        """Both latents, with their contexts."""
        assert self._latents is not None
        return self._latents.by_id(self.i), self._latents.by_id(self.j)

    def other(self, latent: int) -> int:
        """The pair's latent that `latent` is not."""
        return self.j if latent == self.i else self.i

    def cells(self) -> tuple[str, ...]:
        """The pair's row in a table under `HEAD`."""
        return (
            str(self.i),
            str(self.j),
            f"{self.correlation:.3f}",
            f"{self.lower:.3f} to {self.upper:.3f}",
            number(self.cosine),
            number(self.support),
            str(self.blocks_above),
            "flagged" if self.flagged else "",
            self.verdict,
            percent(self.merge_share),
        )

    def _repr_html_(self) -> str:
        sides = "".join(f'<td style="vertical-align:top">{latent._repr_html_()}</td>' for latent in self.latents)
        return f"{html_table(HEAD, [self.cells()])}<table><tbody><tr>{sides}</tr></tbody></table>"


_FIELDS = {f.name for f in dataclasses.fields(Pair)} - {"_latents"}


class Duplicates(ShownAsTable, Sequence[Pair]):
    """Pairs above the threshold, strongest first; indexed, sliced and iterated like a list.

    The report holds at most `antidup.monitor.max_reported_pairs` of them; `total` counts all.

    Args:
        report: a correlation report as JSON has it.
        latents: the run's, for the contexts of a pair.
        pairs: those that are left of the report's; None takes all that can be read.
    """

    HEAD = HEAD

    def __init__(self, report: Mapping[str, Any], latents: Latents, pairs: Iterable[Pair] | None = None) -> None:
        self.report, self._latents = report, latents
        if pairs is None:
            listed = report.get("pairs")
            rows = (
                [p for p in listed if isinstance(p, dict) and p.keys() >= _FIELDS] if isinstance(listed, list) else []
            )
            read = (Pair(**{name: p[name] for name in _FIELDS}, _latents=latents) for p in rows)
            pairs = sorted(read, key=lambda p: (-p.correlation, p.i, p.j))
        self._pairs = list(pairs)

    def frame(self) -> pd.DataFrame:
        """A row a pair, the fields of `Pair` as columns."""
        import pandas as pd

        names = [f.name for f in dataclasses.fields(Pair) if f.name in _FIELDS]
        return pd.DataFrame([[getattr(p, name) for name in names] for p in self], columns=names)

    @property
    def step(self) -> int:
        """The step of the report."""
        return int(self.report.get("step", 0))

    @property
    def total(self) -> int:
        """Pairs above the threshold, listed or not."""
        return int(self.report.get("pairs_total", len(self._pairs)))

    @property
    def thresholds(self) -> dict[str, float]:
        """What makes a candidate: least correlation, support and sequences."""
        return dict(self.report.get("thresholds") or {})

    @property
    def groups(self) -> list[list[int]]:
        """Latents joined by candidate or flagged pairs, the largest group first."""
        return [list(group) for group in self.report.get("candidate_components") or []]

    @property
    def flagged_groups(self) -> list[list[int]]:
        """Latents joined by flagged pairs only."""
        return [list(group) for group in self.report.get("components") or []]

    @property
    def histogram(self) -> Histogram:
        """All pairs that fired together, by correlation."""
        found = self.report.get("histogram") or {}
        edges = np.asarray(found.get("edges") or [-1.0, 1.0], dtype=np.float64)
        return Histogram(edges, np.asarray(found.get("counts") or [0], dtype=np.int64))

    @property
    def flagged(self) -> Duplicates:
        return self._some(p for p in self if p.flagged)

    @property
    def mergeable(self) -> Duplicates:
        return self._some(p for p in self if p.mergeable)

    def of(self, latent: int) -> Duplicates:
        """The pairs that `latent` is in."""
        return self._some(p for p in self if latent in (p.i, p.j))

    @overload
    def __getitem__(self, index: int) -> Pair: ...
    @overload
    def __getitem__(self, index: slice) -> Duplicates: ...
    def __getitem__(self, index: int | slice) -> Pair | Duplicates:
        return self._some(self._pairs[index]) if isinstance(index, slice) else self._pairs[index]

    def __len__(self) -> int:
        return len(self._pairs)

    def _cells(self) -> list[tuple[str, ...]]:
        return [p.cells() for p in self._pairs[:SHOWN]]

    def _headline(self) -> str:
        least = self.thresholds.get("correlation")
        what = "" if least is None else f" above a correlation of {number(least)}"
        count = f"{len(self)} of {self.total:,}" if len(self) != self.total else f"{self.total:,}"
        return f"{count} duplicate pairs{what}, at step {self.step:,}"

    def _some(self, pairs: Iterable[Pair]) -> Duplicates:
        return Duplicates(self.report, self._latents, pairs)
