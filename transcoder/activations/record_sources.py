"""Where records come from: the standard library, local files, or Hugging Face `datasets`; and digests of their files."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from transcoder.activations.documents import DataError, Messages, Record, Records, RecordSource, cut
from transcoder.activations.retry import RetriedRecords
from transcoder.config import ActivationsSection
from transcoder.demo.stdlib_text import iter_documents, source_files
from transcoder.files import local_path
from transcoder.settings import brief

FILE_BLOCK_CHARACTERS = 1 << 14
"""A plain text file is read as documents of at most this length: a long file can be shuffled and held out."""
WHOLE_BYTES = 1 << 28
"""Files of together at most this size (256 MiB) are hashed whole, in well under a second."""
BLOCKS, BLOCK_BYTES = 16, 1 << 16
_JSON_SUFFIXES = (".jsonl", ".json")
_RECORD_SUFFIXES = (*_JSON_SUFFIXES, ".parquet")


def record_sources(section: ActivationsSection) -> tuple[RecordSource, RecordSource, float]:
    """(training source, evaluation source, share to hold out by place); the share is 0 where the two sources differ.

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
        return StdlibRecords("train"), StdlibRecords("heldout"), 0.0
    path = local_path(name, "activations.dataset")
    source: RecordSource
    if path.exists():
        source = FileRecords(path, section.text_column, section.tokens_column)
    elif _looks_like_path(name):
        raise DataError(
            f"activations.dataset: no file or folder at {name!r}; give an existing text, JSONL or Parquet "
            "file, a folder of them, 'stdlib', or the name of a Hugging Face dataset"
        )
    else:
        name = name.removeprefix("hf:")
        here = local_path(name, "activations.dataset")
        source = HubRecords(
            str(here) if here.exists() else name, section.dataset_config, section.dataset_split, section.text_column,
            section.tokens_column,
        )  # fmt: skip
    source = RetriedRecords(source)
    return source, source, section.heldout_fraction


def _looks_like_path(name: str) -> bool:
    suffix = Path(name).suffix.lower()
    many_parts = name.count("/") > 1 and not name.startswith("hf:")
    return name.startswith((".", "~", os.sep)) or many_parts or suffix in (".txt", *_RECORD_SUFFIXES)


class StdlibRecords:
    """The machine's own standard library, one of its two splits by file name."""

    def __init__(self, split: Literal["train", "heldout"]) -> None:
        self._split: Literal["train", "heldout"] = split

    def read(self, state: dict[str, Any] | None) -> Records:
        start = int(state["document"]) if state else 0
        documents = iter_documents(self._split, start=start)
        return ((Record(d.name, d.text), {"document": after}) for after, d in enumerate(documents, start=start + 1))

    def digest(self) -> str:
        """Another Python version has another standard library."""
        return files_digest(source_files(self._split))


class FileRecords:
    """Text, JSONL and Parquet: one file, or every file below a folder in the order of their paths.

    A line of `.jsonl` or `.json` and a row of `.parquet` is a document (its `text_column`, or `tokens_column` if that is
    set); any other file is plain UTF-8 text, read in blocks that end at a line where they can. Hidden files
    are left out.
    """

    def __init__(self, path: Path, text_column: str, tokens_column: str | None) -> None:
        self._column = tokens_column or text_column
        self._tokens = tokens_column is not None
        self._files = [path] if path.is_file() else _files_below(path)
        self._folder = path.parent if path.is_file() else path
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

    def read(self, state: dict[str, Any] | None) -> Records:
        return self._read_from(int(state["file"]), int(state["record"])) if state else self._read_from(0, 0)

    def _read_from(self, first: int, skip: int) -> Records:
        for number, path in enumerate(self._files[first:], start=first):
            for after, record in enumerate(self._read_file(path, skip), start=skip + 1):
                yield record, {"file": number, "record": after}
            skip = 0

    def digest(self) -> str:
        single = len(self._files) == 1 and self._files[0].parent == self._folder
        return files_digest(
            (path.suffix if single else path.relative_to(self._folder).as_posix(), path) for path in self._files
        )

    def _read_file(self, path: Path, skip: int) -> Iterator[Record]:
        if path.suffix == ".parquet":
            for row, value in enumerate(_parquet_column(path, self._column, skip), start=skip):
                yield _record(f"{path} row {row}", value, self._tokens)
        elif path.suffix in _JSON_SUFFIXES:
            for line, record in enumerate(itertools.islice(_json_lines(path), skip, None), start=skip + 1):
                where = f"{path} line {line}"
                if record is None:
                    yield Record(where, None, "not a JSON object")
                else:
                    yield _record(where, record.get(self._column), self._tokens)
        elif self._tokens:
            yield Record(str(path), None, "a file without columns")
        else:
            for block, text in enumerate(itertools.islice(_text_blocks(path), skip, None), start=skip):
                yield Record(f"{path} block {block}", text, "not UTF-8")


def _files_below(folder: Path) -> list[Path]:
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


class HubRecords:
    """A dataset of Hugging Face `datasets`, streamed: not downloaded whole; resuming seeks by shard."""

    def __init__(self, name: str, config: str | None, split: str, text_column: str, tokens_column: str | None) -> None:
        self._name, self._config, self._split = name, config, split
        self._local = Path(name).exists()
        self._column = tokens_column or text_column
        self._tokens = tokens_column is not None
        self._dataset = _load_streaming(name, config, split)
        self._listed = self.digest() if self._local else None
        names = self._dataset.column_names
        if names is None:
            names = list(next(iter(self._dataset), {}))
            self._dataset = None
        _check_column("tokens_column" if self._tokens else "text_column", self._column, names, f"dataset {name!r}")

    def read(self, state: dict[str, Any] | None) -> Records:
        # A dataset keeps the place of its one iterator, and readers may run in two threads: each gets its own.
        dataset, self._dataset = self._dataset or self._load_again(), None
        if state and state["dataset"] is not None:
            dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        return self._read_from(dataset, int(state["record"]) if state else 0)

    def _read_from(self, dataset: Any, first: int) -> Records:
        for number, row in enumerate(dataset, start=first):
            record = _record(f"dataset {self._name!r} record {number}", row.get(self._column), self._tokens)
            yield record, {"record": number + 1, "dataset": dataset.state_dict()}

    def _load_again(self) -> Any:
        """As the first time, and a folder's files are listed again: one that is missing for a moment is an error."""
        dataset = _load_streaming(self._name, self._config, self._split)
        if self._local and self.digest() != self._listed:
            raise FileNotFoundError(f"the files of {self._name} are not those that were there at first")
        return dataset

    def digest(self) -> str | None:
        """The repository's commit, or the files of a local folder; None where the hub was not asked."""
        folder = Path(self._name)
        if folder.exists():
            files = [folder] if folder.is_file() else _files_below(folder)
            return files_digest(
                (path.name if folder.is_file() else str(path.relative_to(folder)), path) for path in files
            )
        from huggingface_hub.constants import HF_HUB_OFFLINE

        return None if HF_HUB_OFFLINE else _check_hub_dataset(self._name)


def _load_streaming(name: str, config: str | None, split: str) -> Any:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not Path(name).exists() and not HF_HUB_OFFLINE:
        _check_hub_dataset(name)
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True)
    except Exception as error:
        # `datasets` raises dozens of types here (missing, gated, bad split or configuration, no network).
        raise DataError(
            f"activations.dataset: cannot open {name!r} (dataset_config {config!r}, dataset_split "
            f"{split!r}) with Hugging Face datasets: {type(error).__name__}: {brief(error)}. Check the name, configuration "
            "and split, and the network; without a network use 'stdlib' or a local file or folder."
        ) from error


@functools.cache
def _check_hub_dataset(name: str) -> str | None:
    """The commit that the hub has of it. Asked once a process."""
    # One quick question first: load_dataset retries for half a minute where there is no network.
    from huggingface_hub import HfApi

    try:
        return HfApi().dataset_info(name, timeout=15).sha
    except Exception as error:
        raise DataError(
            f"activations.dataset: no file or folder {name!r}, and the Hugging Face hub gives no dataset of "
            f"that name: {type(error).__name__}: {brief(error)}. Check the name and the network (a private or gated dataset "
            "needs `hf auth login`); without a network use 'stdlib' or a local file or folder."
        ) from error


def _check_column(field: str, column: str, names: Iterable[str], where: str) -> None:
    names = list(names)
    if column not in names:
        close = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"activations.{field}: no column {column!r} in {where}; it has {names}{hint}")


def _record(name: str, value: Any, tokens: bool) -> Record:
    """A record of the value of a column. A conversation is kept as its messages; a value of another type says so."""
    if value is None:
        return Record(name, None, "missing or null")
    if tokens:
        return Record(name, list(value) if isinstance(value, (list, tuple)) else [value])
    if isinstance(value, str):
        return Record(name, value)
    if isinstance(value, list) and value and all(isinstance(turn, dict) and "role" in turn for turn in value):
        return Record(name, Messages(value))
    kind = "a list" if isinstance(value, list) else type(value).__name__
    return Record(name, None, f"{kind} instead of text")


def files_digest(files: Iterable[tuple[str, Path]], whole_bytes: int = WHOLE_BYTES) -> str:
    """16 hexadecimal digits of (name, size, content) of each file.

    Where the files are larger than `whole_bytes` together, up to 16 blocks of 64 KiB stand for each one's content, spread
    evenly from its first byte to its last: a change between them that keeps the size is not seen then. Times and places
    are not looked at: a copy has the digest of its original.

    Raises:
        OSError: a file cannot be read.
    """
    sized = [(name, path, path.stat().st_size) for name, path in files]
    whole = sum(size for _, _, size in sized) <= whole_bytes
    digest = hashlib.blake2b(digest_size=8)
    for name, path, size in sized:
        digest.update(repr((name, size)).encode())
        last = max(0, size - BLOCK_BYTES)
        sampled = {last * i // (BLOCKS - 1) for i in range(BLOCKS)}
        with path.open("rb") as file:
            for start in range(0, size, BLOCK_BYTES) if whole else sorted(sampled):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
