"""The latents of a run: one latent with its contexts and relations, and a table of latents that filters and searches."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.checkpoint import NEIGHBOURS
from transcoder.reporting.duplicates import Duplicates
from transcoder.reporting.format import MISSING, number
from transcoder.reporting.latent_table import LatentTable
from transcoder.reporting.parts import RunPartMissingError
from transcoder.reporting.samples import Context, SampleTable
from transcoder.reporting.tables import SHOWN, ShownAsTable, safe

if TYPE_CHECKING:
    import pandas as pd

    from transcoder.reporting.run import Run

CONTEXTS_SHOWN = 5
"""Contexts of each kind that a latent's representation shows."""
COLUMNS = ("prefix", "firings", "density", "max_activation", "group")
"""What `LatentColumns` knows of every latent; attributes of `Latents` and `Latent`."""


class LatentColumns:
    """Columns [d_sae] over all latents of a run, each read when it is first asked for.

    A column whose part of the run is not there is a RunPartMissingError that says why.
    """

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def d_sae(self) -> int:
        for size in (self.run.setting("transcoder.d_sae"), self.run.correlation.get("d_sae")):
            if isinstance(size, int):
                return size
        raise self.run.missing_error("latents (how many there are is unknown)", "config.yaml")

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Cumulative prefix widths; only the whole dictionary where there are no nested prefixes."""
        return tuple(self.run.widths) or (self.d_sae,)

    @cached_property
    def prefix(self) -> NDArray[np.int64]:
        """int64: the narrowest prefix that each latent is in, 0 for the first."""
        return np.searchsorted(np.asarray(self.widths), np.arange(self.d_sae), side="right").astype(np.int64)

    @property
    def firings(self) -> NDArray[np.int64]:
        """int64: tokens on which each fired under the final weights, see `latents.parquet`."""
        return self._counted.fired

    @property
    def density(self) -> NDArray[np.float64]:
        """float64: share of those tokens; 0 is dead."""
        return self._counted.fired / self._counted.tokens

    @property
    def _counted(self) -> LatentTable:
        found = self.run.heldout_latents
        if found is None or not found.tokens:
            why = next((m.why for m in self.run.lacking if "latent" in m.what), "no token was looked at")
            raise RunPartMissingError(f"run {str(self.run.path)!r} has no firing counts: {why}")
        return found

    @property
    def samples(self) -> SampleTable:
        if self.run.samples is None:
            raise self.run.missing_error("contexts", "activation samples")
        return self.run.samples

    @cached_property
    def max_activation(self) -> NDArray[np.float64]:
        """float64: the strongest activation that was kept as a sample; NaN for a latent without samples."""
        peaks = np.full(self.d_sae, np.nan)
        inside = self.samples.latent < self.d_sae
        np.fmax.at(peaks, self.samples.latent[inside], self.samples.activation[inside])
        return peaks

    @cached_property
    def group(self) -> NDArray[np.int64]:
        """int64: the number of each latent's group in `run.duplicates.groups`, -1 for none."""
        numbers = np.full(self.d_sae, -1, dtype=np.int64)
        for n, group in enumerate(self.run.duplicates.groups):
            numbers[[latent for latent in group if 0 <= latent < self.d_sae]] = n
        return numbers


class Latent:
    """One latent. Everything is read when it is asked for; a part that the run lacks is a RunPartMissingError.

    Attributes:
        prefix: the narrowest Matryoshka prefix it is in, 0 for the first.
        firings: tokens on which it fired, of `run.heldout_latents.tokens`; density: their share.
        max_activation: the strongest activation kept; None for a latent without samples.
        group: the number of its duplicate group in `run.duplicates.groups`; None where it has no duplicate.
    """

    prefix: int
    firings: int
    density: float
    max_activation: float | None
    group: int | None

    def __init__(self, columns: LatentColumns, latent: int) -> None:
        self._columns = columns
        self.id = latent

    def __getattr__(self, name: str) -> Any:
        if name not in COLUMNS:
            raise AttributeError(f"Latent has no attribute {name!r}")
        value = getattr(self._columns, name)[self.id].item()
        return None if value != value or value < 0 else value

    @property
    def prefix_width(self) -> int:
        """The width of the narrowest prefix it is in."""
        return self._columns.widths[self.prefix]

    @property
    def contexts(self) -> list[Context]:
        """Every kept sample, the strongest first; empty where none was kept of this latent."""
        samples = self._columns.samples
        return samples.read_contexts(samples.rows_of(self.id))

    @property
    def top(self) -> list[Context]:
        """Its strongest activations."""
        return [c for c in self.contexts if c.kind == "top"]

    @property
    def stratified(self) -> list[Context]:
        """Samples drawn evenly over positions."""
        return [c for c in self.contexts if c.kind == "stratified"]

    @property
    def positions(self) -> NDArray[np.int64]:
        """[samples] int64: the places in their sequences of its samples, the strongest first."""
        return self._columns.samples.position[self._columns.samples.rows_of(self.id)]

    @property
    def pairs(self) -> Duplicates:
        """The pairs it is in, each with bounds, the cost of merging and the verdict."""
        return self._columns.run.duplicates.of(self.id)

    @property
    def mergeable(self) -> dict[int, bool | None]:
        """Partner id -> whether the two can be merged; None where that was not tested."""
        return {p.other(self.id): p.mergeable for p in self.pairs}

    def neighbours(self, count: int = NEIGHBOURS) -> list[tuple[int, float]]:
        """The latents nearest by cosine of decoder rows, as (id, cosine), from the last good checkpoint."""
        return self._columns.run.checkpoint.neighbours([self.id], count)[self.id]

    def __repr__(self) -> str:
        lines = [f"latent {self.id}: {self._headline()}"]
        for title, contexts in self._shown_contexts():
            lines += [f"{title}:", *(f"  {c!r}" for c in contexts)]
        return "\n".join([*lines, *self._relations()])

    def _repr_html_(self) -> str:
        parts = [f"<p><b>latent {self.id}</b> {safe(self._headline())}</p>"]
        peak = self._or_none("max_activation") or 0.0
        for title, contexts in self._shown_contexts():
            rows = (f"<tr><td>{number(c.activation)}</td><td>{c.shaded(peak)}</td></tr>" for c in contexts)
            parts.append(f'<p>{title}</p><table style="text-align:left"><tbody>{"".join(rows)}</tbody></table>')
        parts += [f"<p>{safe(line)}</p>" for line in self._relations()]
        return f"<div>{''.join(parts)}</div>"

    def _headline(self) -> str:
        facts = [f"prefix {self.prefix} (width {self.prefix_width:,})"] if len(self._columns.widths) > 1 else []
        firings, peak = self._or_none("firings"), self._or_none("max_activation")
        if firings is not None:
            count = f"fired on {number(firings)} tokens (density {number(self.density)})"
            facts.append(count if firings else "dead: did not fire on the tokens looked at")
        if peak is not None:
            facts.append(f"max activation {number(peak)}")
        return ", ".join(facts)

    def _shown_contexts(self) -> list[tuple[str, list[Context]]]:
        contexts = self._or_none("contexts")
        if contexts is None:
            return []
        kinds = (("strongest", "top"), ("over positions", "stratified"))
        found = [(title, [c for c in contexts if c.kind == kind][:CONTEXTS_SHOWN]) for title, kind in kinds]
        return [(title, some) for title, some in found if some] or [("no samples were kept", [])]

    def _relations(self) -> list[str]:
        found = []
        if pairs := self._or_none("pairs"):
            said = (f"{p.other(self.id)} (correlation {p.correlation:.3f}, {p.said})" for p in pairs[:NEIGHBOURS])
            found.append(f"pairs: {', '.join(said)}")
        near = self._or_none("neighbours")
        if near is not None:
            found.append(f"decoder neighbours: {', '.join(f'{n} ({cosine:.2f})' for n, cosine in near)}")
        return found

    def _or_none(self, name: str) -> Any:
        try:
            found = getattr(self, name)
            return found() if callable(found) else found
        except RunPartMissingError:
            return None


class Latents(ShownAsTable, Sequence[Latent]):
    """Latents in order: all of a run's, or those that a filter or a search left.

    `latents[17]` is the 17th of this table, which is latent 17 as long as nothing was left out (`by_id` in any case). Slices,
    integer arrays and boolean masks give tables: `latents[latents.density > 0.01]`. `id`, `prefix`, `firings`, `density`,
    `max_activation` and `group` are arrays with an entry a latent, see `LatentColumns`.
    """

    HEAD = ("id", "prefix", "fired", "density", "max activation", "group", "context")

    def __init__(
        self, columns: LatentColumns, ids: NDArray[np.int64], found: Mapping[int, Context] | None = None
    ) -> None:
        self._columns = columns
        self.id = ids
        self._found = found or {}
        """Of a search: latent -> the context in which it fires most on the text."""

    def __getattr__(self, name: str) -> NDArray[Any]:
        if name not in COLUMNS:
            raise AttributeError(f"Latents has no attribute {name!r}")
        column: NDArray[Any] = getattr(self._columns, name)[self.id]
        return column

    def frame(self) -> pd.DataFrame:
        """A row a latent, by ids; every column that the run has."""
        import pandas as pd

        known: dict[str, NDArray[Any]] = {}
        for name in COLUMNS:
            with contextlib.suppress(RunPartMissingError):
                known[name] = getattr(self, name)
        return pd.DataFrame(known, index=pd.Index(self.id, name="id"))

    def by_id(self, latent: int) -> Latent:
        """Raises: IndexError: the run has no such latent."""
        if not 0 <= latent < self._columns.d_sae:
            raise IndexError(f"latent: expected 0 to {self._columns.d_sae - 1}, got {latent}")
        return Latent(self._columns, int(latent))

    def search(self, text: str) -> Latents:
        """Latents with `text` in one of their contexts, upper and lower case alike; those that fire on it the most first: by
        the mean over a latent's contexts of its activation on the text, as a share of its strongest."""
        samples, columns = self._columns.samples, self._columns
        rows = np.flatnonzero(samples.containing(text) & np.isin(samples.latent, self.id))
        read = ((c.firing_on(text), c) for c in samples.read_contexts(rows))
        score, found = np.zeros(columns.d_sae), dict[int, Context]()
        for firing, context in sorted(read, key=lambda pair: -pair[0]):
            found.setdefault(context.latent, context)
            score[context.latent] += firing
        ids = np.asarray(list(found), dtype=np.int64)
        kept = np.bincount(samples.latent, minlength=columns.d_sae)[ids]
        rank = np.argsort(-score[ids] / kept / columns.max_activation[ids], kind="stable")
        return Latents(columns, ids[rank], found)

    def filter(
        self,
        prefix: int | None = None,
        density: tuple[float | None, float | None] | None = None,
        group: int | bool | None = None,
    ) -> Latents:
        """Those of this table that fit all that is given.

        Args:
            prefix: number of the narrowest prefix, 0 for the first.
            density: (least, most), both included; None leaves a side open.
            group: a number in `run.duplicates.groups`; True: in any group; False: in none.

        Raises:
            ValueError: there is no such prefix or group.  RunPartMissingError: the run lacks what is asked for.
        """
        keep = np.ones(len(self), dtype=bool)
        if prefix is not None:
            widths = self._columns.widths
            if not 0 <= prefix < len(widths):
                known = ", ".join(f"{n} (width {w})" for n, w in enumerate(widths))
                raise ValueError(f"filter: prefix: expected one of {known}; got {prefix!r}")
            keep &= self.prefix == prefix
        if density is not None:
            least, most = density
            keep &= self.density >= (-np.inf if least is None else least)
            keep &= self.density <= (np.inf if most is None else most)
        if isinstance(group, bool):
            keep &= (self.group >= 0) == group
        elif group is not None:
            count = len(self._columns.run.duplicates.groups)
            if not 0 <= group < count:
                raise ValueError(f"filter: group: expected 0 to {count - 1}, True or False; got {group!r}")
            keep &= self.group == group
        return self[keep]

    def sort(self, by: str, descending: bool = True) -> Latents:
        """Ordered by a column; latents without a value come last.

        Args:
            by: "id", "prefix", "firings", "density", "max_activation" or "group".
        """
        if by not in ("id", *COLUMNS):
            raise ValueError(f"sort: by: expected one of id, {', '.join(COLUMNS)}; got {by!r}")
        values = np.asarray(getattr(self, by), dtype=np.float64)
        return self[np.argsort(-values if descending else values, kind="stable")]

    @overload
    def __getitem__(self, index: int) -> Latent: ...
    @overload
    def __getitem__(self, index: slice | NDArray[Any] | list[int]) -> Latents: ...
    def __getitem__(self, index: int | slice | NDArray[Any] | list[int]) -> Latent | Latents:
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"latents: expected an index below {len(self)}, got {index}")
            return Latent(self._columns, int(self.id[index]))
        if isinstance(index, list):
            index = np.asarray(index, dtype=None if index else np.int64)
        return Latents(self._columns, self.id[index], self._found)

    def __len__(self) -> int:
        return len(self.id)

    def _headline(self) -> str:
        total = self._columns.d_sae
        return f"{len(self):,} latents" if len(self) == total else f"{len(self):,} of {total:,} latents"

    def _cells(self) -> list[tuple[str, ...]]:
        rows = []
        for latent in self[:SHOWN]:
            known = [latent._or_none(name) for name in COLUMNS[1:]]
            numbers = (MISSING if v is None else number(v) for v in known)
            context = self._context(latent.id)
            rows.append((str(latent.id), str(latent.prefix), *numbers, "" if context is None else context.marked(60)))
        return rows

    def _context(self, latent: int) -> Context | None:
        """What a search found, else the strongest."""
        if latent in self._found:
            return self._found[latent]
        try:
            samples = self._columns.samples
        except RunPartMissingError:
            return None
        found = samples.read_contexts(samples.rows_of(latent)[:1])
        return found[0] if found else None
