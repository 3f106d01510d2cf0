"""Records, the documents made of them, and the state from which reading goes on.

A source reads records from a saved place and says with each one the place behind it. `Reader` makes documents of them. This
module knows no tokenizer and no model.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, TypeGuard

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


Records: TypeAlias = Iterator[tuple[Record, dict[str, Any]]]
"""Records, each with the state behind it in JSON values."""


class RecordSource(Protocol):
    """Where records come from.

    `read` gives the records that follow a saved state (None: all of them), always in the same order. `digest` is a short text
    that changes when the records do, or None where that cannot be known.
    """

    def read(self, state: dict[str, Any] | None) -> Records: ...
    def digest(self) -> str | None: ...


class Reader:
    """Documents of one epoch: unusable records skipped and counted, very long ones split.

    Skipped: no text, blank text, text with a NUL character (binary), an empty id list, and what the source
    could not decode. `state()` holds JSON values only and may be taken after any document.
    """

    def __init__(self, source: RecordSource, state: dict[str, Any] | None = None) -> None:
        state = state or {"records": None, "blocks": 0, "index": 0, "skipped": 0}
        self._place = state["records"]
        self._index, self._blocks, self.skipped = int(state["index"]), int(state["blocks"]), int(state["skipped"])
        self._documents = self._read(source.read(self._place))

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def __next__(self) -> Document:
        return next(self._documents)

    def _read(self, records: Records) -> Iterator[Document]:
        for record, place in records:
            index, given = self._index, self._blocks
            if not _usable(record.content):
                self.skipped += 1
                self._finish_record(place)
                continue
            for number, (content, ends) in enumerate(_blocks(record.content), start=1):
                # The state moves before the document is handed out: it is the state behind this document.
                if ends:
                    self._finish_record(place)
                elif number > given:
                    self._blocks = number
                if number > given:
                    yield Document(index, record.name, content, ends)

    def _finish_record(self, place: dict[str, Any]) -> None:
        self._place, self._blocks = place, 0
        self._index += 1

    def state(self) -> dict[str, Any]:
        return {"records": self._place, "blocks": self._blocks, "index": self._index, "skipped": self.skipped}


def is_heldout(index: int, fraction: float) -> bool:
    """Whether the document at this place of the stream is for evaluation only; a hash of the place."""
    digest = hashlib.blake2b(b"heldout document %d" % index, digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def cut(text: str, length: int) -> tuple[str, str]:
    """`text` in two, the first at most `length` long and, if it can, ending at a line or a space."""
    if len(text) <= length:
        return text, ""
    end = max(text.rfind("\n", length // 2, length), -1) + 1 or text.rfind(" ", length // 2, length) + 1 or length
    return text[:end], text[end:]


def _usable(content: str | list[int] | None) -> TypeGuard[str | list[int]]:
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
