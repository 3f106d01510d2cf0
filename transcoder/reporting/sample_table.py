"""Reading activation samples: small columns as NumPy, contexts only for the rows that are shown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

COLUMNS = ("latent", "kind", "activation", "token", "position", "sequence", "step", "context", "anchor")
"""What every samples.parquet has; `tokens`, the display strings, may lack."""
BATCH_ROWS = 8192
"""Rows of contexts in memory at a time."""


@dataclass(frozen=True, eq=False)
class Contexts:
    """Contexts of some rows, as words of a vocabulary.

    Fields:
        words: display strings; the first is the empty one, which stands for padding.
        offsets: [rows + 1] int64 into `codes`.
        codes: int32 numbers of words.
    """

    words: list[str]
    offsets: NDArray[np.int64]
    codes: NDArray[np.int32]

    def of(self, row: int) -> NDArray[np.int32]:
        """The codes of one row."""
        return self.codes[self.offsets[row] : self.offsets[row + 1]]


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
    _path: Path

    def __len__(self) -> int:
        return len(self.latent)

    def contexts(self, rows: NDArray[np.int64]) -> list[list[str]]:
        """The context of each row as display strings; token ids in words where the file has no strings.

        Padding (a negative id) is an empty string.
        """
        found = self.coded_contexts(rows)
        return [[found.words[c] for c in found.of(n)] for n in range(len(rows))]

    def coded_contexts(self, rows: NDArray[np.int64]) -> Contexts:
        """The contexts of `rows`, in their order. Reads the file once, `BATCH_ROWS` rows at a time."""
        import pyarrow.parquet as pq

        order = np.argsort(rows, kind="stable")
        wanted = rows[order]
        words: dict[str, int] = {"": 0}
        parts: list[NDArray[np.int32]] = []
        with pq.ParquetFile(self._path) as file:
            names = [name for name in ("context", "tokens") if name in file.schema_arrow.names]
            first = 0
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names):
                inside = wanted[np.searchsorted(wanted, first) : np.searchsorted(wanted, first + len(batch))] - first
                first += len(batch)
                if len(inside):
                    parts.extend(_coded(batch.take(inside), words))
        lengths = np.zeros(len(rows), np.int64)
        lengths[order] = [len(p) for p in parts]
        place = np.empty(len(rows), np.int64)
        place[order] = np.arange(len(rows))
        codes = [parts[n] for n in place]
        joined = np.concatenate(codes) if codes else np.zeros(0, np.int32)
        return Contexts(list(words), np.concatenate([[0], np.cumsum(lengths)]), joined)

    def containing(self, text: str) -> NDArray[np.bool_]:
        """[rows] bool: whether `text` stands in the row's context, whatever its case; it may run over several tokens."""
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        found: list[NDArray[np.bool_]] = []
        with pq.ParquetFile(self._path) as file:
            names = [name for name in ("context", "tokens") if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=BATCH_ROWS, columns=names[-1:]):
                if "tokens" in names:
                    # Joined by the library: a run keeps millions of tokens.
                    joined = pc.binary_join(batch.column("tokens"), pa.scalar(""))
                else:
                    joined = pa.array(
                        ["".join(f"[{i}]" for i in ids or () if i >= 0) for ids in batch.column(0).to_pylist()]
                    )
                hit = pc.fill_null(pc.match_substring(joined, pattern=text, ignore_case=True), False)
                found.append(np.asarray(hit.to_numpy(zero_copy_only=False), dtype=bool))
        return np.concatenate(found) if found else np.zeros(0, dtype=bool)


def read_samples(path: Path) -> SampleTable:
    """Read samples.parquet; the contexts only when they are asked for.

    Raises:
        ImportError: pyarrow is not installed.
        ValueError: not Parquet, or columns are lacking; the message names them.
    """
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            lacking = [name for name in COLUMNS if name not in file.schema_arrow.names]
            if lacking:
                raise ValueError(f"columns are lacking: {', '.join(lacking)}")
            table = file.read(columns=[name for name in COLUMNS if name not in ("context", "token")])
    except pa.ArrowException as error:
        raise ValueError(f"not a Parquet file: {error}") from error

    def integers(name: str) -> NDArray[np.int64]:
        return table.column(name).to_numpy().astype(np.int64)

    return SampleTable(
        latent=integers("latent"),
        top=np.asarray(pc.equal(table.column("kind"), "top").to_numpy(), dtype=bool),
        activation=table.column("activation").to_numpy().astype(np.float64),
        position=integers("position"),
        sequence=integers("sequence"),
        step=integers("step"),
        anchor=integers("anchor"),
        _path=path,
    )


def _coded(batch: Any, words: dict[str, int]) -> list[NDArray[np.int32]]:
    """One array a row; new words are added."""
    contexts = batch.column("context")
    lengths = np.asarray(contexts.value_lengths().fill_null(0).to_numpy(zero_copy_only=False), np.int64)
    ids = contexts.flatten()
    strings = batch.column("tokens") if "tokens" in batch.schema.names else None
    # Strings of another number than the ids (another writer's file) cannot be told apart by place.
    if strings is not None and strings.value_lengths().fill_null(0).equals(contexts.value_lengths().fill_null(0)):
        encoded = strings.flatten().fill_null("").dictionary_encode()
        spelled = encoded.dictionary.to_pylist()
    else:
        encoded = ids.dictionary_encode()
        spelled = [f"[{i}]" for i in encoded.dictionary.to_pylist()]
    numbers = np.asarray([words.setdefault(s, len(words)) for s in spelled] or [0], np.int32)
    codes = numbers[np.asarray(encoded.indices.to_numpy(zero_copy_only=False), np.int64)]
    codes[np.asarray(ids.to_numpy(zero_copy_only=False)) < 0] = 0
    return np.split(codes, np.cumsum(lengths)[:-1])
