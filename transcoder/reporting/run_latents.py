"""The latents of a run: a sequence of latents, and a table of them that filters and searches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.format import MISSING, number
from transcoder.reporting.run_contexts import Context, read_contexts, shaded
from transcoder.reporting.run_duplicates import Duplicates
from transcoder.reporting.run_errors import RunPartMissingError
from transcoder.reporting.run_latent_columns import LatentColumns
from transcoder.reporting.run_tables import SHOWN, html_table, left_out, safe, text_table

NEIGHBOURS = 8
CONTEXTS_SHOWN = 5
"""Contexts of each kind that a latent's representation shows."""
COLUMNS = ("prefix", "firings", "density", "max_activation", "group")
_HEAD = ("id", "prefix", "fired", "density", "max activation", "group", "context")


class Latent:
    """One latent. Everything is read when it is asked for.

    A part that the run lacks is a RunPartMissingError that says why, such as contexts where samples were off.
    """

    def __init__(self, columns: LatentColumns, latent: int) -> None:
        self._columns = columns
        self.id = latent

    @property
    def prefix(self) -> int:
        """The narrowest Matryoshka prefix it is in, 0 for the first."""
        return int(self._columns.prefix[self.id])

    @property
    def prefix_width(self) -> int:
        """The width of that prefix."""
        return self._columns.widths[self.prefix]

    @property
    def firings(self) -> int:
        """Tokens on which it fired, of `run.checkpoint.firings.tokens`."""
        return int(self._columns.firings[self.id])

    @property
    def density(self) -> float:
        """Share of tokens on which it fires."""
        return float(self._columns.density[self.id])

    @property
    def max_activation(self) -> float | None:
        """The strongest activation kept; None for a latent without samples."""
        peak = float(self._columns.max_activation[self.id])
        return None if np.isnan(peak) else peak

    @property
    def contexts(self) -> list[Context]:
        """Every kept sample, the strongest first; empty where none was kept of this latent."""
        return read_contexts(self._columns.samples, self._columns.rows(self.id))

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
        return self._columns.samples.position[self._columns.rows(self.id)]

    @property
    def group(self) -> int | None:
        """The number of its duplicate group in `run.duplicates.groups`; None where it has no duplicate."""
        found = int(self._columns.group[self.id])
        return None if found < 0 else found

    @property
    def pairs(self) -> Duplicates:
        """The duplicate pairs it is in, each with bounds, persistence and the merge test's verdict."""
        return self._columns.run.duplicates.of(self.id)

    @property
    def mergeable(self) -> dict[int, bool | None]:
        """Partner id -> whether the two can be merged; None where that was not tested."""
        return {p.other(self.id): p.mergeable for p in self.pairs}

    def neighbours(self, count: int = NEIGHBOURS) -> list[tuple[int, float]]:
        """The latents nearest by cosine of decoder rows, as (id, cosine), from the last good checkpoint."""
        return self._columns.neighbours(self.id, count)

    def __repr__(self) -> str:
        lines = [f"latent {self.id}: {self._headline()}"]
        for title, contexts in self._shown_contexts():
            lines += [f"{title}:", *(f"  {c!r}" for c in contexts)]
        lines += [f"{name}: {text}" for name, text in self._relations()]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        parts = [f"<p><b>latent {self.id}</b> {safe(self._headline())}</p>"]
        peak = self._or_none("max_activation") or 0.0
        for title, contexts in self._shown_contexts():
            rows = "".join(
                f'<tr><td>{number(c.activation)}</td><td style="text-align:left">{shaded(c, peak)}</td></tr>'
                for c in contexts
            )
            parts.append(f"<p>{title}</p><table><tbody>{rows}</tbody></table>")
        parts += [f"<p>{safe(name)}: {safe(text)}</p>" for name, text in self._relations()]
        return f"<div>{''.join(parts)}</div>"

    def _headline(self) -> str:
        widths = self._columns.widths
        facts = [f"prefix {self.prefix} (width {self.prefix_width:,})"] if len(widths) > 1 else []
        firings, density = self._or_none("firings"), self._or_none("density")
        if firings is not None:
            facts.append(f"fired on {number(firings)} tokens (density {number(density)})")
        peak = self._or_none("max_activation")
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

    def _relations(self) -> list[tuple[str, str]]:
        found = []
        pairs = self._or_none("pairs")
        if pairs:
            told = (f"{p.other(self.id)} (correlation {p.correlation:.3f}, {p.verdict})" for p in pairs[:NEIGHBOURS])
            found.append(("duplicates", ", ".join(told)))
        try:
            near = self.neighbours()
        except RunPartMissingError:
            near = []
        if near:
            found.append(("decoder neighbours", ", ".join(f"{n} ({cosine:.2f})" for n, cosine in near)))
        return found

    def _or_none(self, name: str) -> Any:
        try:
            return getattr(self, name)
        except RunPartMissingError:
            return None


class Latents(Sequence[Latent]):
    """Latents in order: all of a run's, or those that a filter or a search left.

    `latents[17]` is the 17th of this table, which is latent 17 as long as nothing was left out (`by_id` in any case). Slices,
    integer arrays and boolean masks give tables: `latents[latents.density > 0.01]`. `id`, `prefix`, `firings`, `density`,
    `max_activation` and `group` are arrays with an entry a latent.
    """

    def __init__(self, columns: LatentColumns, ids: NDArray[np.int64], found: Mapping[int, int] | None = None) -> None:
        self._columns = columns
        self.id = ids
        self._found = found or {}
        """Of a search: latent -> the row of its strongest sample that has the text."""

    @property
    def prefix(self) -> NDArray[np.int64]:
        """int64: the narrowest prefix of each, 0 for the first."""
        return self._columns.prefix[self.id]

    @property
    def firings(self) -> NDArray[np.int64]:
        """int64: tokens on which each fired in the monitor's last block or two before the checkpoint."""
        return self._columns.firings[self.id]

    @property
    def density(self) -> NDArray[np.float64]:
        """float64: share of those tokens."""
        return self._columns.density[self.id]

    @property
    def max_activation(self) -> NDArray[np.float64]:
        """float64: the strongest activation kept of each; NaN where there is no sample."""
        return self._columns.max_activation[self.id]

    @property
    def group(self) -> NDArray[np.int64]:
        """int64: the number of each one's group in `run.duplicates.groups`; -1 for none."""
        return self._columns.group[self.id]

    def columns(self) -> dict[str, NDArray[Any]]:
        """Every column that the run has, by name, as a data frame takes them."""
        every = {name: self._columns.known(name) for name in COLUMNS}
        return {"id": self.id, **{name: column[self.id] for name, column in every.items() if column is not None}}

    def by_id(self, latent: int) -> Latent:
        """Raises: IndexError: the run has no such latent."""
        if not 0 <= latent < self._columns.d_sae:
            raise IndexError(f"latent: expected 0 to {self._columns.d_sae - 1}, got {latent}")
        return Latent(self._columns, int(latent))

    def search(self, text: str) -> Latents:
        """Latents with `text` in one of their contexts, upper and lower case alike; those with the most such contexts first."""
        samples = self._columns.samples
        rows = np.flatnonzero(samples.containing(text) & np.isin(samples.latent, self.id))
        rows = rows[np.argsort(-samples.activation[rows], kind="stable")]
        found, first, counts = np.unique(samples.latent[rows], return_index=True, return_counts=True)
        order = np.argsort(-counts, kind="stable")
        shown = dict(zip(found.tolist(), rows[first].tolist(), strict=True))
        return Latents(self._columns, found[order], shown)

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
            share = self.density
            keep &= (share >= (-np.inf if least is None else least)) & (share <= (np.inf if most is None else most))
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
        chosen = index if isinstance(index, slice) else np.asarray(index)
        if isinstance(chosen, np.ndarray) and chosen.size == 0 and chosen.dtype != bool:
            chosen = chosen.astype(np.int64)
        return Latents(self._columns, self.id[chosen], self._found)

    def __len__(self) -> int:
        return len(self.id)

    def __iter__(self) -> Iterator[Latent]:
        return (Latent(self._columns, int(n)) for n in self.id)

    def __repr__(self) -> str:
        rows = self._rows()
        return "\n".join(filter(None, [self._headline(), text_table(_HEAD, rows) if rows else "", left_out(len(self))]))

    def _repr_html_(self) -> str:
        rows = self._rows()
        table = html_table(_HEAD, rows) if rows else ""
        return f"<p>{safe(self._headline())}</p>{table}<p>{safe(left_out(len(self)))}</p>"

    def _headline(self) -> str:
        total = self._columns.d_sae
        return f"{len(self):,} latents" if len(self) == total else f"{len(self):,} of {total:,} latents"

    def _rows(self) -> list[tuple[str, ...]]:
        some = self[:SHOWN]
        known = some.columns()
        rows: list[tuple[str, ...]] = []
        for n, latent in enumerate(some):
            values = {name: column[n] for name, column in known.items()}
            group = values.get("group", -1)
            context = self._context(latent.id)
            rows.append(
                (
                    str(latent.id),
                    str(values["prefix"]),
                    number(values["firings"]) if "firings" in values else MISSING,
                    number(values["density"]) if "density" in values else MISSING,
                    number(values["max_activation"]) if np.isfinite(values.get("max_activation", np.nan)) else MISSING,
                    MISSING if group < 0 else str(group),
                    "" if context is None else context.marked(60),
                )
            )
        return rows

    def _context(self, latent: int) -> Context | None:
        """What a search found, else the strongest."""
        try:
            row = self._found.get(latent)
            rows = self._columns.rows(latent)[:1] if row is None else np.asarray([row])
            found = read_contexts(self._columns.samples, rows)
        except RunPartMissingError:
            return None
        return found[0] if found else None
