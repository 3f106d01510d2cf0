"""The smaller views of a run: prefixes, positions, and whether its parts were really used."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.format import MISSING, number, percent
from transcoder.reporting.ledger_verdict import Verdict, verdicts
from transcoder.reporting.run_errors import missing_part
from transcoder.reporting.run_tables import html_table, text_table
from transcoder.reporting.runfolder import RunFolder
from transcoder.reporting.sample_table import SampleTable

BINS = 10
Row = TypeVar("Row")


class Rows(Sequence[Row], Generic[Row]):
    """A list of like things that shows itself as a table."""

    _head: tuple[str, ...]

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = list(rows)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        return self._rows[index]

    def __len__(self) -> int:
        return len(self._rows)

    def __repr__(self) -> str:
        return text_table(self._head, self._cells())

    def _repr_html_(self) -> str:
        return html_table(self._head, self._cells())

    def _cells(self) -> list[tuple[str, ...]]:
        raise NotImplementedError


@dataclass(frozen=True)
class Prefix:
    """What one Matryoshka width explains: `added` latents more than the prefix before, FVU down to `fvu` by `gain`."""

    width: int
    added: int
    fvu: float
    gain: float | None


class Prefixes(Rows[Prefix]):
    """Prefixes, the narrowest first. `heldout` is False where only training batches were measured."""

    _head = ("width", "latents added", "FVU", "explained", "FVU gained")

    def __init__(self, rows: Sequence[Prefix], heldout: bool) -> None:
        super().__init__(rows)
        self.heldout = heldout

    @classmethod
    def read(cls, folder: RunFolder) -> Prefixes:
        """Raises: RunPartMissingError: no FVU by prefix was logged."""
        heldout = folder.prefix_figures("evaluation/fvu_prefix")
        found = heldout or folder.prefix_figures("metrics/fvu_prefix")
        if not found:
            raise missing_part(folder, "figures by prefix", "metrics.jsonl")
        rows: list[Prefix] = []
        for width, fvu in found.items():
            before = rows[-1] if rows else None
            rows.append(
                Prefix(width, width, fvu, None)
                if before is None
                else Prefix(width, width - before.width, fvu, before.fvu - fvu)
            )
        return cls(rows, bool(heldout))

    def _cells(self) -> list[tuple[str, ...]]:
        return [
            (
                number(p.width),
                number(p.added),
                number(p.fvu),
                percent(1 - p.fvu),
                MISSING if p.gain is None else number(p.gain),
            )
            for p in self
        ]


class Ledger(Rows[Verdict]):
    """A verdict a part: "used", "off", "not proven" or "unknown", with calls, effect, files and what is lacking."""

    _head = ("part", "verdict", "calls", "effect", "files", "lacking")

    @classmethod
    def read(cls, folder: RunFolder) -> Ledger:
        return cls(verdicts(folder))

    def _cells(self) -> list[tuple[str, ...]]:
        return [(v.title, v.state, number(v.calls), v.effect, number(v.files), v.why) for v in self]


class Positions:
    """Where in the sequence the kept samples stand.

    Raises: RunPartMissingError: there are no samples.
    """

    def __init__(self, folder: RunFolder) -> None:
        samples = folder.samples
        if samples is None:
            raise missing_part(folder, "positions", "activation samples")
        self._samples: SampleTable = samples
        self._folder = folder

    @cached_property
    def length(self) -> int:
        """Tokens of a sequence."""
        longest = int(self._samples.position.max()) + 1
        stated = self._folder.setting("activations.sequence_length")
        return max(stated, longest) if isinstance(stated, int) else longest

    @cached_property
    def edges(self) -> NDArray[np.float64]:
        """[bins + 1]: equal parts of the sequence."""
        return np.linspace(0, self.length, BINS + 1)

    @cached_property
    def top(self) -> NDArray[np.int64]:
        """[bins]: of the strongest samples, how many stand in each part. Only these show a preference."""
        return np.histogram(self._samples.position[self._samples.top], self.edges)[0]

    @cached_property
    def stratified(self) -> NDArray[np.int64]:
        """[bins]: of the samples drawn evenly over positions."""
        return np.histogram(self._samples.position[~self._samples.top], self.edges)[0]

    @property
    def sink_share(self) -> float | None:
        """Share of the evenly drawn samples at special tokens; None where it was not recorded."""
        found = self._folder.sample_summary.get("sink_fraction")
        return float(found) if isinstance(found, (int, float)) else None

    def __repr__(self) -> str:
        return f"{text_table(self._head, self._cells())}\nsamples at special tokens: {percent(self.sink_share)}"

    def _repr_html_(self) -> str:
        return f"{html_table(self._head, self._cells())}<p>samples at special tokens: {percent(self.sink_share)}</p>"

    _head = ("positions", "strongest samples", "over positions")

    def _cells(self) -> list[tuple[str, ...]]:
        first = np.ceil(self.edges).astype(int)
        return [
            (f"{first[n]} to {first[n + 1] - 1}", str(self.top[n]), str(self.stratified[n]))
            for n in range(len(self.top))
        ]
