"""The pairs and groups of a correlation report: the one reader of them, which takes a report of any shape as far as it goes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.format import MISSING, number, percent, real, whole
from transcoder.reporting.tables import SHOWN, ShownAsTable, html_table

if TYPE_CHECKING:
    import pandas as pd

    from transcoder.reporting.latents import Latent
    from transcoder.reporting.run import Run

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
    """Two latents that rise and fall together. What the report does not say is None.

    Fields:
        i, j: latent ids, i < j.
        correlation: Pearson's, over the tokens of the live view; `lower` and `upper` bound it at 95 %.
        cosine, jaccard: of the two activation columns, and of the sets of tokens on which they fire.
        support: tokens on which either fires. `sequences`: how many sequences they stand in.
        blocks_above: of the disjoint blocks remembered, in how many the lower bound was above the threshold (persistence).
        flagged: held in enough blocks to be called a duplicate.
        mergeable: the merge test's verdict on held-out tokens; None where it was not put to the test or says nothing.
        merge_share: what folding costs, as a share of what leaving the latent out costs.
        merge_fvu_change: the change of the held-out FVU by folding.
    """

    i: int
    j: int
    correlation: float
    lower: float | None
    upper: float | None
    cosine: float | None
    jaccard: float | None
    support: int | None
    sequences: int | None
    blocks_above: int | None
    flagged: bool
    mergeable: bool | None
    merge_share: float | None
    merge_fvu_change: float | None
    _run: Run = dataclasses.field(repr=False, compare=False)

    @property
    def verdict(self) -> str:
        """ "mergeable", "not mergeable" or "not tested"."""
        return {True: "mergeable", False: "not mergeable", None: "not tested"}[self.mergeable]

    @property
    def latents(self) -> tuple[Latent, Latent]:
        """Both latents, with their contexts."""
        return self._run.latents.by_id(self.i), self._run.latents.by_id(self.j)

    def other(self, latent: int) -> int:
        """The pair's latent that `latent` is not."""
        return self.j if latent == self.i else self.i

    def cells(self) -> tuple[str, ...]:
        """The pair's row in a table under `HEAD`."""
        known = self.lower is not None and self.upper is not None
        return (
            str(self.i),
            str(self.j),
            f"{self.correlation:.3f}",
            f"{self.lower:.3f} to {self.upper:.3f}" if known else MISSING,
            number(self.cosine),
            number(self.support),
            number(self.blocks_above),
            "flagged" if self.flagged else "",
            self.verdict,
            percent(self.merge_share),
        )

    def _repr_html_(self) -> str:
        sides = "".join(f'<td style="vertical-align:top">{latent._repr_html_()}</td>' for latent in self.latents)
        return f"{html_table(HEAD, [self.cells()])}<table><tbody><tr>{sides}</tr></tbody></table>"


_FIELDS = [f.name for f in dataclasses.fields(Pair) if f.name != "_run"]
_WHOLE = ("i", "j", "support", "sequences", "blocks_above")


def _read_pair(run: Run, row: object) -> Pair | None:
    if not isinstance(row, dict):
        return None
    known = {name: (whole if name in _WHOLE else real)(row.get(name)) for name in _FIELDS}
    if known["i"] is None or known["j"] is None or known["correlation"] is None:
        return None
    flags = {"flagged": row.get("flagged") is True, "mergeable": None}
    if isinstance(row.get("mergeable"), bool):
        flags["mergeable"] = row["mergeable"]
    return Pair(**{**known, **flags}, _run=run)  # type: ignore[arg-type]


class Duplicates(ShownAsTable, Sequence[Pair]):
    """Pairs above the threshold, strongest first; indexed, sliced and iterated like a list.

    The report holds at most `antidup.monitor.max_reported_pairs` of them; `total` counts all.

    Args:
        run: whose newest correlation report is read; one without a report has no pairs.
        pairs: those that are left of the report's; None takes all that can be read.
    """

    HEAD = HEAD

    def __init__(self, run: Run, pairs: Iterable[Pair] | None = None) -> None:
        self._run, self.report = run, run.correlation
        if pairs is None:
            read = [p for row in _list(self.report.get("pairs")) if (p := _read_pair(run, row)) is not None]
            pairs = sorted(read, key=lambda p: (-p.correlation, p.i, p.j))
        self._pairs = list(pairs)

    def frame(self) -> pd.DataFrame:
        """A row a pair, the fields of `Pair` as columns."""
        import pandas as pd

        return pd.DataFrame([[getattr(p, name) for name in _FIELDS] for p in self], columns=_FIELDS)

    @property
    def step(self) -> int:
        """The step of the report."""
        return whole(self.report.get("step")) or 0

    @property
    def total(self) -> int:
        """Pairs above the threshold, listed or not."""
        stated = whole(self.report.get("pairs_total"))
        return len(self._pairs) if stated is None else stated

    @property
    def thresholds(self) -> dict[str, float]:
        """What makes a candidate: least correlation, support and sequences."""
        limits = self.report.get("thresholds")
        known = limits.items() if isinstance(limits, dict) else ()
        return {name: value for name, said in known if (value := real(said)) is not None}

    @property
    def groups(self) -> list[list[int]]:
        """Latents joined by candidate or flagged pairs, the largest group first."""
        return self.candidate_groups or self.flagged_groups

    @property
    def candidate_groups(self) -> list[list[int]]:
        """`groups` as a report of today lists them; an older one has only those of flagged pairs."""
        return self._groups("candidate_components")

    @property
    def flagged_groups(self) -> list[list[int]]:
        """Latents joined by flagged pairs only."""
        return self._groups("components")

    @property
    def histogram(self) -> Histogram:
        """All pairs that fired together, by correlation; one empty bin where the report has no histogram."""
        found = self.report.get("histogram")
        found = found if isinstance(found, dict) else {}
        edges, counts = ([v for e in _list(found.get(n)) if (v := real(e)) is not None] for n in ("edges", "counts"))
        if not counts or len(edges) != len(counts) + 1:
            edges, counts = [-1.0, 1.0], [0.0]
        return Histogram(np.asarray(edges, dtype=np.float64), np.asarray(counts, dtype=np.int64))

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
        return Duplicates(self._run, pairs)

    def _groups(self, field: str) -> list[list[int]]:
        found = [[i for i in _list(group) if type(i) is int] for group in _list(self.report.get(field))]
        return sorted((group for group in found if len(group) > 1), key=len, reverse=True)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
