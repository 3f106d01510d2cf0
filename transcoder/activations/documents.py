"""Documents in a fixed order, and the state from which another reader goes on.

A source opens a reader at a saved state; a reader yields documents and tells, at any moment, the state behind the last
one. Nothing here knows a tokenizer or a model.
"""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

RECORD_BLOCK_LENGTH = 1 << 18
"""A record of more characters, or token ids, is given in blocks of this length: bounds memory and what a saved cursor
must carry."""


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
    """Opens the same records, in the same order, from the start (None) or from a saved state.

    `digest` is a short text that changes when the records do, or None where that cannot be known.
    """

    def open(self, state: dict[str, Any] | None) -> Records: ...
    def digest(self) -> str | None: ...


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


def check_column(field: str, column: str, names: Iterable[str], where: str) -> None:
    names = list(names)
    if column not in names:
        close = difflib.get_close_matches(column, names, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise DataError(f"activations.{field}: no column {column!r} in {where}; it has {names}{hint}")


def content_of(value: Any, tokens: bool) -> str | list[int] | None:
    if not tokens:
        return value if isinstance(value, str) else None
    if value is None:
        return None
    return list(value) if isinstance(value, (list, tuple)) else [value]


def cut(text: str, length: int) -> tuple[str, str]:
    """`text` in two, the first at most `length` long and, if it can, ending at a line or a space."""
    if len(text) <= length:
        return text, ""
    end = max(text.rfind("\n", length // 2, length), -1) + 1 or text.rfind(" ", length // 2, length) + 1 or length
    return text[:end], text[end:]


def _usable(content: str | list[int] | None) -> bool:
    if isinstance(content, str):
        return bool(content.strip()) and "\0" not in content
    return bool(content)


def _blocks(content: str | list[int]) -> Iterator[tuple[str | list[int], bool]]:
    if not isinstance(content, str):
        for begin in range(0, len(content), RECORD_BLOCK_LENGTH):
            end = begin + RECORD_BLOCK_LENGTH
            yield content[begin:end], end >= len(content)
        return
    rest = content
    while rest:
        block, rest = cut(rest, RECORD_BLOCK_LENGTH)
        yield block, not rest
