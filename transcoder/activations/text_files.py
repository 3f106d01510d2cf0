"""Documents from local text, JSONL and Parquet files."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transcoder.activations.documents import DataError, Record, Records, check_column, content_of, cut
from transcoder.activations.fingerprint import files_digest

FILE_BLOCK_CHARACTERS = 1 << 14
"""A plain text file is read as documents of at most this length: a long file can be shuffled and held out."""
_JSON_SUFFIXES = (".jsonl", ".json")
RECORD_SUFFIXES = (*_JSON_SUFFIXES, ".parquet")


class FilesSource:
    """Text, JSONL and Parquet: one file, or every file below a folder in the order of their paths.

    A line of `.jsonl` or `.json` and a row of `.parquet` is a document (its `text_column`, or `tokens_column` if that is
    set); any other file is plain UTF-8 text, read in blocks that end at a line where they can. Hidden files
    are left out.
    """

    def __init__(self, path: Path, text_column: str, tokens_column: str | None) -> None:
        self._column = tokens_column or text_column
        self._tokens = tokens_column is not None
        self._files = [path] if path.is_file() else files_below(path)
        self._folder = path.parent if path.is_file() else path
        if not self._files:
            raise DataError(f"activations.dataset: no file below {str(path)!r}; it needs text, JSONL or Parquet files")
        if self._tokens and not any(f.suffix in RECORD_SUFFIXES for f in self._files):
            raise DataError(
                f"activations.tokens_column: only JSONL and Parquet files have columns, and {str(path)!r} "
                "has none of them"
            )
        self._check_columns()

    def _check_columns(self) -> None:
        field = "tokens_column" if self._tokens else "text_column"
        for path in self._files:
            names: list[str] | None = None
            if path.suffix == ".parquet":
                names = _parquet(path).schema_arrow.names
            elif path.suffix in _JSON_SUFFIXES and path.stat().st_size:
                first = next((r for r in itertools.islice(_json_lines(path), 100) if r is not None), None)
                if first is None:
                    raise DataError(
                        f"activations.dataset: {path} is not JSON lines: none of its first lines is an object"
                    )
                names = list(first)
            if names is not None:
                check_column(field, self._column, names, str(path))

    def open(self, state: dict[str, Any] | None) -> Records:
        return _FileRecords(self, (int(state["file"]), int(state["record"])) if state else (0, 0))

    def digest(self) -> str:
        single = len(self._files) == 1 and self._files[0].parent == self._folder
        return files_digest(
            (path.suffix if single else path.relative_to(self._folder).as_posix(), path) for path in self._files
        )

    def records(self, file: int, start: int) -> Iterator[tuple[int, int, Record]]:
        """(file, number of the record after it, record) from record `start` of file number `file` on."""
        for number in range(file, len(self._files)):
            path = self._files[number]
            skip = start if number == file else 0
            for after, record in enumerate(self._read(path, skip), start=skip + 1):
                yield number, after, record

    def _read(self, path: Path, skip: int) -> Iterator[Record]:
        if path.suffix == ".parquet":
            for row, value in enumerate(_parquet_column(path, self._column, skip), start=skip):
                yield Record(f"{path} row {row}", content_of(value, self._tokens))
        elif path.suffix in _JSON_SUFFIXES:
            for line, record in enumerate(itertools.islice(_json_lines(path), skip, None), start=skip + 1):
                value = None if record is None else record.get(self._column)
                yield Record(f"{path} line {line}", content_of(value, self._tokens))
        elif self._tokens:
            yield Record(str(path), None)
        else:
            for block, text in enumerate(itertools.islice(_text_blocks(path), skip, None), start=skip):
                yield Record(f"{path} block {block}", text)


class _FileRecords:
    def __init__(self, source: FilesSource, at: tuple[int, int]) -> None:
        self._at = at
        self._records = source.records(*at)

    def __iter__(self) -> _FileRecords:
        return self

    def __next__(self) -> Record:
        file, after, record = next(self._records)
        self._at = (file, after)
        return record

    def state(self) -> dict[str, Any]:
        return {"file": self._at[0], "record": self._at[1]}


def files_below(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file())
    visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(visible, key=lambda p: p.relative_to(folder).as_posix())


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"activations.dataset: {path} is not a readable Parquet file: {error}") from error


def _parquet_column(path: Path, column: str, skip: int) -> Iterator[Any]:
    import pyarrow

    try:
        yield from _parquet_values(path, column, skip)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(f"activations.dataset: {path} is damaged in the middle: {error}") from error
    except OSError as error:
        # Arrow says so of pages that it cannot decompress, too: without an errno it is the file and not the disk.
        if error.errno is not None:
            raise
        raise DataError(f"activations.dataset: {path} is damaged in the middle: {error}") from error


def _parquet_values(path: Path, column: str, skip: int) -> Iterator[Any]:
    with _parquet(path) as file:
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=[column]):
                values = batch.column(0)
                taken = min(skip, len(values))
                skip -= taken
                yield from values.slice(taken).to_pylist()


def _json_lines(path: Path) -> Iterator[dict[str, Any] | None]:
    """The object of each line; None for a line that is not one, so that line numbers stay places."""
    with path.open("rb") as file:
        for line in file:
            try:
                value = json.loads(line)
            except ValueError:
                value = None
            yield value if isinstance(value, dict) else None


def _text_blocks(path: Path) -> Iterator[str | None]:
    """The file in blocks cut at line ends; None, and nothing more, where it stops being UTF-8."""
    with path.open(encoding="utf-8-sig") as file:
        rest = ""
        while True:
            try:
                read = file.read(FILE_BLOCK_CHARACTERS)
            except UnicodeDecodeError:
                yield None
                return
            rest += read
            while len(rest) > FILE_BLOCK_CHARACTERS or (rest and not read):
                block, rest = cut(rest, FILE_BLOCK_CHARACTERS)
                yield block
            if not read:
                return
