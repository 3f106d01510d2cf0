"""The figures of metrics.jsonl as NumPy columns."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.format import MISSING, number
from transcoder.reporting.run_tables import html_table, text_table
from transcoder.reporting.series import MetricsTable

_HEAD = ("figure", "last", "least", "most", "values")


class Column(NamedTuple):
    """One figure over the run: steps [n] int64 and values [n] float64; a value that was NaN or infinite is kept as such."""

    steps: NDArray[np.int64]
    values: NDArray[np.float64]


class Metrics(Mapping[str, Column]):
    """Figure name -> Column, as `steps, values = run.metrics["metrics/fvu"]`."""

    def __init__(self, table: MetricsTable) -> None:
        self._table = table

    @property
    def events(self) -> list[dict[str, Any]]:
        """What happened: data, checkpoints, evaluations, resumes, in order."""
        return self._table.events

    def __getitem__(self, name: str) -> Column:
        if name not in self._table.series:
            near = difflib.get_close_matches(name, self._table.series, n=3)
            hint = f"; near are {', '.join(near)}" if near else ""
            raise KeyError(f"metrics.jsonl has no figure {name!r}{hint}")
        series = self._table.series[name]
        return Column(np.array(series.steps, dtype=np.int64), np.array(series.values, dtype=np.float64))

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._table.series))

    def __len__(self) -> int:
        return len(self._table.series)

    def __repr__(self) -> str:
        return text_table(_HEAD, self._rows())

    def _repr_html_(self) -> str:
        return html_table(_HEAD, self._rows())

    def _rows(self) -> list[tuple[str, ...]]:
        rows: list[tuple[str, ...]] = []
        for name in self:
            values = self[name].values
            finite = values[np.isfinite(values)]
            range_of = (
                (number(finite[-1]), number(finite.min()), number(finite.max())) if len(finite) else (MISSING,) * 3
            )
            rows.append((name, *range_of, str(len(values))))
        return rows
