"""Reading activation samples: small columns as NumPy, contexts only for the rows that are shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("latent", "kind", "activation", "token", "position", "sequence", "step", "context", "anchor")
"""What every samples.parquet has; `tokens`, the display strings, may lack."""


@dataclass(frozen=True, eq=False)
class SampleTable:
    """Samples, one row each; every column has the same length.

    Fields:
        latent: int64 latent ids.
        top: bool, True for a top-activating sample, False for a position-stratified one.
        activation: float64.
        position, sequence, step, anchor: int64.
    """

    latent: NDArray[np.int64]
    top: NDArray[np.bool_]
    activation: NDArray[np.float64]
    position: NDArray[np.int64]
    sequence: NDArray[np.int64]
    step: NDArray[np.int64]
    anchor: NDArray[np.int64]
    _table: Any

    def __len__(self) -> int:
        return len(self.latent)

    def contexts(self, rows: NDArray[np.int64]) -> list[list[str]]:
        """The context of each row as display strings; token ids in words where the file has no strings.

        Padding (a negative id) is left out by `context_bounds`; here it is an empty string.
        """
        names = self._table.column_names
        ids = self._table.column("context").take(rows).to_pylist()
        strings = self._table.column("tokens").take(rows).to_pylist() if "tokens" in names else [None] * len(rows)
        return [_display(i or [], s) for i, s in zip(ids, strings, strict=True)]

    def containing(self, text: str) -> NDArray[np.bool_]:
        """[rows] bool: whether `text` stands in the row's context, whatever its case; it may run over several tokens."""
        import pyarrow as pa
        import pyarrow.compute as pc

        if "tokens" in self._table.column_names:
            # Joined by the library: a run keeps millions of tokens.
            joined = pc.binary_join(self._table.column("tokens"), pa.scalar(""))
        else:
            joined = pa.chunked_array([["".join(c) for c in self.contexts(np.arange(len(self)))]], type=pa.string())
        found = pc.match_substring(joined, pattern=text, ignore_case=True)
        return np.asarray(pc.fill_null(found, False).to_numpy(zero_copy_only=False), dtype=bool)


def read_samples(path: Path) -> SampleTable:
    """Read samples.parquet.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: not Parquet, or columns are lacking; the message names them.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path)
    except pa.ArrowException as error:
        raise ValueError(f"not a Parquet file: {error}") from error
    lacking = [name for name in COLUMNS if name not in table.column_names]
    if lacking:
        raise ValueError(f"columns are lacking: {', '.join(lacking)}")

    def integers(name: str) -> NDArray[np.int64]:
        return table.column(name).to_numpy().astype(np.int64)

    return SampleTable(
        latent=integers("latent"),
        top=np.asarray([kind == "top" for kind in table.column("kind").to_pylist()], dtype=bool),
        activation=table.column("activation").to_numpy().astype(np.float64),
        position=integers("position"),
        sequence=integers("sequence"),
        step=integers("step"),
        anchor=integers("anchor"),
        _table=table,
    )


def _display(ids: list[int], strings: list[str] | None) -> list[str]:
    if strings is not None and len(strings) == len(ids):
        return ["" if i < 0 else (s or "") for i, s in zip(ids, strings, strict=True)]
    return ["" if i < 0 else f"[{i}]" for i in ids]
