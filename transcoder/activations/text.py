"""Where documents come from: the standard library, local files, Hugging Face `datasets`, already-tokenised
columns.

A source opens a reader at a saved state; a reader yields documents in a fixed order and tells, at any
moment, the state from which another reader goes on. Nothing here knows a tokenizer or a model.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from transcoder.config import ActivationsSection
from transcoder.demo.stdlib_text import iter_documents

FILE_BLOCK_CHARACTERS = 1 << 14
"""A plain text file is read as documents of at most this length: a long file can be shuffled and held out."""
RECORD_BLOCK_CHARACTERS = 1 << 18
"""A longer record is tokenised in blocks of this length: bounds memory and what a saved cursor must carry."""
_JSON_SUFFIXES = (".jsonl", ".json")
_RECORD_SUFFIXES = (*_JSON_SUFFIXES, ".parquet")


class DataError(ValueError):
    """Data that cannot be read or used. The message names the file or document and says what to do."""


@dataclass(frozen=True)
class Document:
    """One document, or one block of a very long one.

    Fields:
        index: its place in the stream, from 0; blocks of one document share it.
        name: what an error calls it.
        content: the text, or the token ids of an already-tokenised document.
        ends: False for a block that the same document goes on after.
    """

    index: int
    name: str
    content: str | list[int]
    ends: bool = True


@dataclass(frozen=True)
class Record:
    """What a source delivers before skipping and splitting; `content` None: it cannot be used."""

    name: str
    content: str | list[int] | None


class Records(Protocol):
    """An iterator of records that knows the state (JSON values) after the last one it gave."""

    def __iter__(self) -> Iterator[Record]: ...
    def __next__(self) -> Record: ...
    def state(self) -> dict[str, Any]: ...


class Source(Protocol):
    """Opens the same records, in the same order, from the start (None) or from a saved state."""

    def open(self, state: dict[str, Any] | None) -> Records: ...


class Reader:
    """Documents of one epoch: unusable records skipped and counted, very long ones split.

    Skipped: no text, blank text, text with a NUL character (binary), an empty id list, and what the source
    could not decode. `state()` holds JSON values only and may be taken after any document.
    """

    def __init__(self, source: Source, state: dict[str, Any] | None = None) -> None:
        state = state or {"records": None, "blocks": 0, "index": 0, "skipped": 0}
        self._records = source.open(state["records"])
        self._before = self._records.state()
        self._index, self.skipped = int(state["index"]), int(state["skipped"])
        self._blocks: Iterator[tuple[str | list[int], bool]] = iter(())
        self._name = ""
        self._given = 0
        self._skip_blocks = int(state["blocks"])

    def __iter__(self) -> Reader:
        return self

    def __next__(self) -> Document:
        while True:
            for content, ends in self._blocks:
                self._given += 1
                if self._given <= self._skip_blocks:
                    continue
                document = Document(self._index, self._name, content, ends)
                if ends:
                    self._close_record()
                return document
            self._before = self._records.state()
            record = next(self._records)
            if _usable(record.content):
                assert record.content is not None
                self._name, self._blocks = record.name, _blocks(record.content)
            else:
                self.skipped += 1
                self._close_record()

    def _close_record(self) -> None:
        self._index += 1
        self._blocks, self._given, self._skip_blocks = iter(()), 0, 0
        self._before = self._records.state()

    def state(self) -> dict[str, Any]:
        blocks = max(self._given, self._skip_blocks)
        return {"records": self._before, "blocks": blocks, "index": self._index, "skipped": self.skipped}


def is_heldout(index: int, fraction: float) -> bool:
    """Whether the document at this place of the stream is for evaluation only; a hash of the place."""
    digest = hashlib.blake2b(b"heldout document %d" % index, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def build_sources(section: ActivationsSection) -> tuple[Source, Source, float]:
    """(training source, evaluation source, share to hold out by place); 0 where the sources are apart
    already.

    `section.dataset` is `stdlib`, an existing file or folder, or else a name for Hugging Face `datasets`;
    the prefix `hf:` forces `datasets` for a local folder too (its splits and configurations are then those
    of `datasets`).

    Raises:
        DataError: a missing file, an unknown column or split, an unknown dataset or no network.
    """
    name = section.dataset
    if name == "stdlib" and not Path(name).exists():
        if section.tokens_column is not None:
            raise DataError(
                "activations.tokens_column: the dataset 'stdlib' is text; set it to null or choose another dataset"
            )
        return StdlibSource("train"), StdlibSource("heldout"), 0.0
    path = Path(name).expanduser()
    source: Source
    if path.exists():
        source = FilesSource(path, section.text_column, section.tokens_column)
    elif _looks_like_path(name):
        raise DataError(
            f"activations.dataset: no file or folder at {name!r}; give an existing text, JSONL or Parquet "
            "file, a folder of them, 'stdlib', or the name of a Hugging Face dataset"
        )
    else:
        source = HubSource(
            name.removeprefix("hf:"), section.dataset_config, section.dataset_split, section.text_column,
            section.tokens_column,
        )  # fmt: skip
    return source, source, section.heldout_fraction


class StdlibSource:
    """The machine's own standard library, one of its two splits by file name."""

    def __init__(self, split: str) -> None:
        self._split = split

    def open(self, state: dict[str, Any] | None) -> Records:
        return _StdlibRecords(self._split, int(state["document"]) if state else 0)


class _StdlibRecords:
    def __init__(self, split: str, start: int) -> None:
        self._documents = iter_documents("train" if split == "train" else "heldout", start=start)
        self._document = start

    def __iter__(self) -> _StdlibRecords:
        return self

    def __next__(self) -> Record:
        document = next(self._documents)
        self._document += 1
        return Record(document.name, document.text)

    def state(self) -> dict[str, Any]:
        return {"document": self._document}


class FilesSource:
    """Text, JSONL and Parquet: one file, or every file below a folder in the order of their paths.

    A line of `.jsonl` or `.json` and a row of `.parquet` is a document (its `text_column`, or `tokens_column` if that is
    set); any other file is plain UTF-8 text, read in blocks that end at a line where they can. Hidden files
    are left out.
    """

    def __init__(self, path: Path, text_column: str, tokens_column: str | None) -> None:
        self._column = tokens_column or text_column
        self._tokens = tokens_column is not None
        self._files = [path] if path.is_file() else _files_below(path)
        if not self._files:
            raise DataError(f"activations.dataset: no file below {str(path)!r}; it needs text, JSONL or Parquet files")
        if self._tokens and not any(f.suffix in _RECORD_SUFFIXES for f in self._files):
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
                _check_column(field, self._column, names, str(path))

    def open(self, state: dict[str, Any] | None) -> Records:
        return _FileRecords(self, (int(state["file"]), int(state["record"])) if state else (0, 0))

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
                yield Record(f"{path} row {row}", _content(value, self._tokens))
        elif path.suffix in _JSON_SUFFIXES:
            for line, record in enumerate(itertools.islice(_json_lines(path), skip, None), start=skip + 1):
                value = None if record is None else record.get(self._column)
                yield Record(f"{path} line {line}", _content(value, self._tokens))
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


class HubSource:
    """A dataset of Hugging Face `datasets`, streamed: not downloaded whole; resuming seeks by shard."""

    def __init__(self, name: str, config: str | None, split: str, text_column: str, tokens_column: str | None) -> None:
        self._name, self._config, self._split = name, config, split
        self._column = tokens_column or text_column
        self._tokens = tokens_column is not None
        self._dataset = self._load()
        names = self._dataset.column_names
        if names is None:
            names = list(next(iter(self._dataset), {}))
            self._dataset = None
        _check_column("tokens_column" if self._tokens else "text_column", self._column, names, f"dataset {name!r}")

    def open(self, state: dict[str, Any] | None) -> Records:
        # A dataset keeps the place of its one iterator, and readers may run in two threads: each gets its own.
        dataset, self._dataset = self._dataset, None
        return _HubRecords(dataset or self._load(), self._name, self._column, self._tokens, state)

    def _load(self) -> Any:
        return _load_streaming(self._name, self._config, self._split)


class _HubRecords:
    def __init__(self, dataset: Any, name: str, column: str, tokens: bool, state: dict[str, Any] | None) -> None:
        self._dataset, self._name, self._column, self._tokens = dataset, name, column, tokens
        self._record = int(state["record"]) if state else 0
        if state and state["dataset"] is not None:
            dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        self._rows = iter(dataset)
        self._state = state["dataset"] if state else None

    def __iter__(self) -> _HubRecords:
        return self

    def __next__(self) -> Record:
        row = next(self._rows)
        self._state = None
        self._record += 1
        return Record(
            f"dataset {self._name!r} record {self._record - 1}", _content(row.get(self._column), self._tokens)
        )

    def state(self) -> dict[str, Any]:
        # Before the first row the dataset has no state of its own yet: the state it was opened at stands.
        if self._state is None and self._record:
            self._state = self._dataset.state_dict()
        return {"record": self._record, "dataset": self._state}


def _load_streaming(name: str, config: str | None, split: str) -> Any:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    local = Path(name).expanduser().exists()
    if not local and not HF_HUB_OFFLINE:
        _check_hub_dataset(name)
    try:
        dataset = datasets.load_dataset(
            str(Path(name).expanduser()) if local else name, config, split=split, streaming=True
        )
    except Exception as error:
        # `datasets` raises dozens of types here (missing, gated, bad split or configuration, no network).
        raise DataError(
            f"activations.dataset: cannot open {name!r} (dataset_config {config!r}, dataset_split "
            f"{split!r}) with Hugging Face datasets: {type(error).__name__}: {error}. Check the name, configuration "
            "and split, and the network; without a network use 'stdlib' or a local file or folder."
        ) from error
    return dataset


def _check_hub_dataset(name: str) -> None:
    # One quick question first: load_dataset retries for half a minute where there is no network.
    from huggingface_hub import HfApi

    try:
        HfApi().dataset_info(name, timeout=15)
    except Exception as error:
        raise DataError(
            f"activations.dataset: no file or folder {name!r}, and the Hugging Face hub gives no dataset of "
            f"that name: {type(error).__name__}: {error}. Check the name and the network (a private or gated dataset "
            "needs `hf auth login`); without a network use 'stdlib' or a local file or folder."
        ) from error


def _looks_like_path(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    many_parts = name.count("/") > 1 and not name.startswith("hf:")
    return name.startswith((".", "~", os.sep)) or many_parts or suffix in (".txt", *_RECORD_SUFFIXES)


def _files_below(folder: Path) -> list[Path]:
    found = (p for p in folder.rglob("*") if p.is_file())
    visible = (p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts))
    return sorted(visible, key=lambda p: p.relative_to(folder).as_posix())


def _check_column(field: str, column: str, names: Iterable[str], where: str) -> None:
    names = list(names)
    if column not in names:
        close = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"activations.{field}: no column {column!r} in {where}; it has {names}{hint}")


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"activations.dataset: {path} is not a readable Parquet file: {error}") from error


def _parquet_column(path: Path, column: str, skip: int) -> Iterator[Any]:
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
                block, rest = _cut(rest, FILE_BLOCK_CHARACTERS)
                yield block
            if not read:
                return


def _cut(text: str, length: int) -> tuple[str, str]:
    """`text` in two, the first at most `length` long and, if it can, ending at a line or a space."""
    if len(text) <= length:
        return text, ""
    end = max(text.rfind("\n", length // 2, length), -1) + 1 or text.rfind(" ", length // 2, length) + 1 or length
    return text[:end], text[end:]


def _content(value: Any, tokens: bool) -> str | list[int] | None:
    if not tokens:
        return value if isinstance(value, str) else None
    if value is None:
        return None
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _usable(content: str | list[int] | None) -> bool:
    if isinstance(content, str):
        return bool(content.strip()) and "\0" not in content
    return bool(content)


def _blocks(content: str | list[int]) -> Iterator[tuple[str | list[int], bool]]:
    if not isinstance(content, str):
        yield content, True
        return
    rest = content
    while rest:
        block, rest = _cut(rest, RECORD_BLOCK_CHARACTERS)
        yield block, not rest
