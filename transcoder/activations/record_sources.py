"""Where records come from: the standard library, local files, or Hugging Face `datasets`; and digests of their files."""

from __future__ import annotations

import copy
import difflib
import functools
import hashlib
import io
import itertools
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from transcoder.activations.documents import MASK_COLUMN, DataError, Record, Records, RecordSource, cut, record_of
from transcoder.activations.local_files import (
    READ,
    LocalData,
    encoding_of,
    format_of,
    is_saved,
    local_data,
    reading,
    visible_files,
)
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

logger = logging.getLogger(__name__)


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
    columns = section.text_column, section.tokens_column
    source: RecordSource
    if path.exists():
        data = local_data(path, section.dataset_config, section.dataset_split)
        if data.format in ("datasets", "disk"):
            source = HubRecords(str(path), section.dataset_config, section.dataset_split, *columns, data)
        else:
            source = FileRecords(data, *columns)
    elif _looks_like_path(name):
        raise DataError(
            f"activations.dataset: no file or folder at {name!r}; give an existing file or folder ({READ}), 'stdlib', or the "
            "name of a Hugging Face dataset"
        )
    else:
        name = name.removeprefix("hf:")
        here = local_path(name, "activations.dataset")
        local = str(here) if here.exists() else name
        # A folder that `save_to_disk` wrote has no files that `load_dataset` reads.
        saved = local_data(here, None, section.dataset_split) if here.is_dir() and is_saved(here) else None
        source = HubRecords(local, section.dataset_config, section.dataset_split, *columns, saved)
    source = RetriedRecords(source)
    return source, source, section.heldout_fraction


def _looks_like_path(name: str) -> bool:
    many_parts = name.count("/") > 1 and not name.startswith("hf:")
    return name.startswith((".", "~", os.sep)) or many_parts or format_of(Path(name)) is not None


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
    """Text, JSON and Parquet files, in the order of their names.

    A line of a JSON file (or an object of the one list in it) and a row of a Parquet file is a document (its `text_column`, or
    `tokens_column` if that is set); any other file is plain text, read in blocks that end at a line where they can, without the
    bytes that are no UTF-8.
    """

    def __init__(self, data: LocalData, text_column: str, tokens_column: str | None) -> None:
        self._column = tokens_column or text_column
        self._tokens = tokens_column is not None
        self._files, self._folder, self._text = data.files, data.root, data.format == "text"
        if self._tokens and self._text:
            raise DataError(
                f"activations.tokens_column: only files of rows have columns, and {str(data.root)!r} has none of them"
            )
        self._check_columns()

    def _check_columns(self) -> None:
        field = "tokens_column" if self._tokens else "text_column"
        for path in () if self._text else self._files:
            names: list[str] | None = None
            if format_of(path) == "parquet":
                names = _parquet(path).schema_arrow.names
            elif path.stat().st_size:
                found = [row for row in itertools.islice(_json_rows(path), 100) if isinstance(row, dict)]
                if not found:
                    raise DataError(
                        f"activations.dataset: {path} is not JSON lines, nor a list of objects: none of its first lines is an "
                        "object"
                    )
                # A field may be absent from some of the records.
                names = list(dict.fromkeys(name for row in found for name in row))
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
        if self._text:
            for block, (text, lost) in enumerate(itertools.islice(_text_blocks(path), skip, None), start=skip):
                yield Record(f"{path} block {block}", text, lost_bytes=lost)
        elif format_of(path) == "parquet":
            for row, values in enumerate(_parquet_rows(path, self._column, self._tokens, skip), start=skip):
                yield record_of(f"{path} row {row}", values, self._column, self._tokens)
        else:
            for line, found in enumerate(itertools.islice(_json_rows(path), skip, None), start=skip + 1):
                where = f"{path} line {line}"
                if isinstance(found, str):
                    yield Record(where, None, found)
                else:
                    yield record_of(where, found, self._column, self._tokens)


def _parquet(path: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"activations.dataset: {path} is not a readable Parquet file: {error}") from error


def _parquet_rows(path: Path, column: str, tokens: bool, skip: int) -> Iterator[dict[str, Any]]:
    """The rows' values of the column, and of token ids their mask where there is one."""
    import pyarrow

    try:
        yield from _parquet_values(path, [column, MASK_COLUMN] if tokens else [column], skip)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        raise DataError(f"activations.dataset: {path} is damaged in the middle: {error}") from error
    except OSError as error:
        # Arrow says so of pages that it cannot decompress, too: without an errno it is the file and not the disk.
        if error.errno is not None:
            raise
        raise DataError(f"activations.dataset: {path} is damaged in the middle: {error}") from error


def _parquet_values(path: Path, columns: list[str], skip: int) -> Iterator[dict[str, Any]]:
    with _parquet(path) as file:
        columns = [name for name in columns if name in file.schema_arrow.names]
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            for batch in file.iter_batches(batch_size=256, row_groups=[group], columns=columns):
                taken = min(skip, len(batch))
                skip -= taken
                yield from batch.slice(taken).to_pylist()


def _json_rows(path: Path) -> Iterator[dict[str, Any] | str]:
    """The object of each line, or those of the list that the file is; for a line that is not one the reason, so that line
    numbers stay places."""
    with reading(path) as file:
        head = file.read(64).lstrip(b"\xef\xbb\xbf\xff\xfe\0 \t\r\n")
    if head.startswith(b"[") and (rows := _json_list(path)) is not None:
        yield from (row if isinstance(row, dict) else "not a JSON object" for row in rows)
        return
    wide = encoding_of(path) == "utf-16"
    with reading(path) as file:
        for line in io.TextIOWrapper(file, "utf-16", "replace", newline="\n") if wide else file:
            try:
                value = json.loads(line)
            except UnicodeDecodeError:
                yield "not UTF-8"
                continue
            except ValueError:
                value = None
            yield value if isinstance(value, dict) else "not a JSON object" if line.strip() else "blank"


def _json_list(path: Path) -> list[Any] | None:
    """The list that a whole file is; None where it is not one."""
    try:
        with reading(path) as file:
            found = json.load(file)
    except ValueError:
        return None
    return found if isinstance(found, list) else None


def _text_blocks(path: Path) -> Iterator[tuple[str, int]]:
    """The file in blocks cut at line ends, and of each the number of bytes that are left out because they are no UTF-8."""
    encoding, told = encoding_of(path), False
    errors = "ignore" if encoding == "utf-16" else "surrogateescape"
    with reading(path) as binary, io.TextIOWrapper(binary, encoding=encoding, errors=errors) as file:
        rest = ""
        while True:
            read = file.read(FILE_BLOCK_CHARACTERS)
            rest += read
            while len(rest) > FILE_BLOCK_CHARACTERS or (rest and not read):
                block, rest = cut(rest, FILE_BLOCK_CHARACTERS)
                kept = _BAD_BYTES.sub("", block)
                if len(kept) < len(block) and not told:
                    told = True
                    logger.warning(
                        "%s: bytes that are not UTF-8 are left out of the text, and counted (lost_bytes)", path
                    )
                yield kept, len(block) - len(kept)
            if not read:
                return


_BAD_BYTES = re.compile("[\udc80-\udcff]")


class HubRecords:
    """A dataset of Hugging Face `datasets`, streamed: not downloaded whole; resuming seeks by shard."""

    def __init__(
        self,
        name: str,
        config: str | None,
        split: str,
        text_column: str,
        tokens_column: str | None,
        data: LocalData | None = None,
    ) -> None:
        self._name, self._config, self._split, self._data = name, config, split, data
        self._local = Path(name).exists()
        self._column = tokens_column or text_column
        self._tokens = tokens_column is not None
        self._dataset = self._load()
        self._listed = self.digest() if self._local else None
        names = self._dataset.column_names
        if names is None:
            names = list(next(self._rows(self._dataset), {}))
            self._dataset = None
        _check_column("tokens_column" if self._tokens else "text_column", self._column, names, f"dataset {name!r}")

    def read(self, state: dict[str, Any] | None) -> Records:
        # A dataset keeps the place of its one iterator, and readers may run in two threads: each gets its own.
        dataset, self._dataset = self._dataset or self._load_again(), None
        if state and state["dataset"] is not None:
            dataset.load_state_dict(copy.deepcopy(state["dataset"]))
        return self._read_from(dataset, int(state["record"]) if state else 0)

    def _read_from(self, dataset: Any, first: int) -> Records:
        for number, row in enumerate(self._rows(dataset), start=first):
            record = record_of(f"dataset {self._name!r} record {number}", row, self._column, self._tokens)
            yield record, {"record": number + 1, "dataset": dataset.state_dict()}

    def _rows(self, dataset: Any) -> Iterator[dict[str, Any]]:
        """The rows. Local files that `datasets` cannot make rows of are at fault, whatever it raises, unless a disk fails."""
        try:
            yield from dataset
        except Exception as error:
            if not self._local or isinstance(error, OSError):
                raise
            raise DataError(
                f"activations.dataset: {self._name!r} is not what Hugging Face datasets reads by its name: "
                f"{type(error).__name__}: {brief(error)}; files of text and tables have to be UTF-8"
            ) from error

    def _load(self) -> Any:
        data = self._data
        if data is None:
            return _load_streaming(self._name, self._config, self._split)
        if data.format == "disk":
            return _load_saved(data.root, self._split)
        files = {self._split: [str(file) for file in data.files]}
        return _load_streaming(data.module, None, self._split, data_files=files, **(data.options or {}))

    def _load_again(self) -> Any:
        """As the first time, and a folder's files are listed again: one that is missing for a moment is an error."""
        dataset = self._load()
        if self._local and self.digest() != self._listed:
            raise FileNotFoundError(f"the files of {self._name} are not those that were there at first")
        return dataset

    def digest(self) -> str | None:
        """The repository's commit, or the files of a local folder; None where the hub was not asked."""
        folder = Path(self._name)
        if folder.exists():
            files = self._data.files if self._data else [folder] if folder.is_file() else visible_files(folder)
            return files_digest(
                (path.name if folder.is_file() else str(path.relative_to(folder)), path) for path in files
            )
        from huggingface_hub.constants import HF_HUB_OFFLINE

        return None if HF_HUB_OFFLINE else _check_hub_dataset(self._name)


def _load_saved(folder: Path, split: str) -> Any:
    """What `save_to_disk` wrote, as a stream; of several splits one."""
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # dozens of types, as from load_dataset
        raise DataError(
            f"activations.dataset: {str(folder)!r} looks like a folder of save_to_disk, and load_from_disk does not read it: "
            f"{type(error).__name__}: {brief(error)}; write it again, or as Parquet by to_parquet"
        ) from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise DataError(
                f"activations.dataset_split: {str(folder)!r} has the splits {', '.join(map(repr, found))}, got {split!r}"
            )
        found = found[split]
    elif split != "train" and str(found.split) != split:
        raise DataError(
            f"activations.dataset_split: {str(folder)!r} was saved as one data set, without splits; expected 'train', got "
            f"{split!r}"
        )
    # A format that was set (torch, pandas, some of the columns) is saved with the data.
    return found.with_format(None).to_iterable_dataset()


def _load_streaming(name: str, config: str | None, split: str, **how: Any) -> Any:
    import datasets
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not how and not Path(name).exists() and not HF_HUB_OFFLINE:
        _check_hub_dataset(name)
    try:
        return datasets.load_dataset(name, config, split=split, streaming=True, **how)
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
