"""The pairs and groups of a correlation report: the one reader of them, which takes a report of any shape as far as it goes."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, overload

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.format import MISSING, number, percent, real, whole
from transcoder.reporting.tables import SHOWN, ShownAsTable, html_table
from transcoder.reporting.verdict import VERDICTS, duplicate_kind, pair_verdict

if TYPE_CHECKING:
    import pandas as pd

    from transcoder.reporting.latents import Latent
    from transcoder.reporting.run import Run

HEAD = ("i", "j", "correlation", "95 % interval", "decoder cosine", "tokens", "cost of merging", "verdict")


class Histogram(NamedTuple):
    """Pairs by correlation: `counts` [bins] between `edges` [bins + 1]."""

    edges: NDArray[np.float64]
    counts: NDArray[np.int64]


@dataclass(frozen=True)
class Pair:
    """Two latents that rise and fall together. What the report does not say is None.

    Fields:
        i, j: latent ids, i < j.
        correlation: Pearson's, of their activations; `lower` and `upper` bound it at 95 %.
        cosine, jaccard: of the two activation columns, and of the sets of tokens on which they fire.
        decoder_cosine: of their decoder rows.
        support: tokens on which either fires. `sequences`: how many sequences they stand in.
        merge_share: cost of one latent in the place of both, as a share of what the dropped one is worth, on held-out tokens;
            `merge_share_error` is its standard error, `merge_fvu_change` the change of the FVU.
        verdict: "duplicate", "correlated" or "undecided", see `reporting.verdict`.
        kind: of a duplicate: "twin" (same direction) or "split" (fire together, write different directions).
        flagged: held in enough blocks of the training text; blocks_above: in how many (None in a report of held-out tokens).
    """

    i: int
    j: int
    correlation: float
    lower: float | None
    upper: float | None
    cosine: float | None
    jaccard: float | None
    decoder_cosine: float | None
    support: int | None
    sequences: int | None
    merge_share: float | None
    merge_share_error: float | None
    merge_fvu_change: float | None
    blocks_above: int | None
    flagged: bool
    verdict: str
    kind: str | None
    _run: Run = dataclasses.field(repr=False, compare=False)

    @property
    def mergeable(self) -> bool | None:
        """Whether it is a duplicate; None where that is undecided."""
        return {"duplicate": True, "correlated": False}.get(self.verdict)

    @property
    def said(self) -> str:
        """The verdict in a word or two: "twin", "split", "correlated", ..."""
        return self.kind or self.verdict

    @property
    def cost(self) -> str:
        """The cost of merging with its error."""
        error = "" if self.merge_share_error is None else f" ± {percent(self.merge_share_error)}"
        return percent(self.merge_share) + error

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
            number(self.decoder_cosine),
            number(self.support),
            self.cost,
            self.said,
        )

    def _repr_html_(self) -> str:
        sides = "".join(f'<td style="vertical-align:top">{latent._repr_html_()}</td>' for latent in self.latents)
        return f"{html_table(HEAD, [self.cells()])}<table><tbody><tr>{sides}</tr></tbody></table>"


_FIELDS = [f.name for f in dataclasses.fields(Pair) if f.name != "_run"]
_WHOLE = ("i", "j", "support", "sequences", "blocks_above")


def _read_pair(run: Run, row: object) -> Pair | None:
    if not isinstance(row, dict):
        return None
    known: dict[str, Any] = {name: (whole if name in _WHOLE else real)(row.get(name)) for name in _FIELDS}
    if known["i"] is None or known["j"] is None or known["correlation"] is None:
        return None
    # A report of training says what the merge test cost, and leaves the verdict to its reader.
    verdict = row["verdict"] if row.get("verdict") in VERDICTS else pair_verdict(known["merge_share"])
    kind = duplicate_kind(known["decoder_cosine"]) if verdict == "duplicate" else None
    return Pair(**{**known, "flagged": row.get("flagged") is True, "verdict": verdict, "kind": kind}, _run=run)


class Duplicates(ShownAsTable, Sequence[Pair]):
    """Pairs above the threshold, strongest first; indexed, sliced and iterated like a list.

    Of a finished run they are counted on held-out tokens with the final weights (`final`); of one that is still training, in
    its newest correlation report. At most `antidup.monitor.max_reported_pairs` are listed; `total` counts all.

    Args:
        run: one without a report has no pairs.
        pairs: those that are left of the report's; None takes all that can be read.
    """

    HEAD = HEAD

    def __init__(self, run: Run, pairs: Iterable[Pair] | None = None) -> None:
        self._run, self.report = run, run.heldout_duplicates or run.correlation
        self.final = bool(run.heldout_duplicates)
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
        """Latents joined by duplicate pairs, the largest group first; of a run in training by candidate pairs."""
        found = self._groups("components" if self.final else "candidate_components")
        return found or ([] if self.final else self._groups("components"))

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
        """The duplicates: twins and splits."""
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
        if not self.final:
            return f"{count} candidate pairs{what} in training, at step {self.step:,}"
        verdicts = Counter(p.verdict for p in self)
        said = ", ".join(f"{verdicts[verdict]} {verdict}" for verdict in VERDICTS)
        return f"{count} pairs{what} on held-out tokens: {said}"

    def _some(self, pairs: Iterable[Pair]) -> Duplicates:
        return Duplicates(self._run, pairs)

    def _groups(self, field: str) -> list[list[int]]:
        found = [[i for i in _list(group) if type(i) is int] for group in _list(self.report.get(field))]
        return sorted((group for group in found if len(group) > 1), key=len, reverse=True)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []
