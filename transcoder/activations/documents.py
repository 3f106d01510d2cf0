"""Records, the documents made of them, and the state from which reading goes on.

A source reads records from a saved place and says with each one the place behind it. `Reader` makes documents of them. This
module knows no tokenizer and no model.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

RECORD_BLOCK_LENGTH = 1 << 18
"""A record of more characters, or token ids, is given in blocks of this length: bounds memory and what a saved cursor
must carry."""


MASK_COLUMN = "attention_mask"
"""The column that marks the padding of a column of token ids by 0."""


class DataError(ValueError):
    """Data that cannot be read or used. The message names the file or document and says what to do."""


class Unusable(Exception):
    """A document that cannot be used and is skipped. The message is the reason, in a few words that are the same for each."""


class Messages(list[dict[str, Any]]):
    """A conversation: messages with `role` and `content`, which the tokenizer's chat template makes text of."""


@dataclass(frozen=True)
class Document:
    """One document, or one block of a very long one.

    Fields:
        index: its place in the stream, from 0; blocks of one document share it.
        name: what an error calls it.
        content: the text, the messages of a conversation, or the token ids of an already-tokenised document.
        ends: False for a block that the same document goes on after.
    """

    index: int
    name: str
    content: str | Messages | list[int]
    ends: bool = True


@dataclass(frozen=True)
class Record:
    """What a source delivers before skipping and splitting; `content` None: it cannot be used, for the reason `why`."""

    name: str
    content: str | Messages | list[int] | None
    why: str = ""
    lost_bytes: int = 0
    """Bytes that are left out of the text because they are no UTF-8."""


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

    Attributes:
        reasons: {why: records skipped for it}.
        lost_bytes: bytes of texts that were no UTF-8 and are left out.
    """

    def __init__(self, source: RecordSource, state: dict[str, Any] | None = None) -> None:
        state = state or {"records": None, "blocks": 0, "index": 0, "skipped": 0}
        self._place = state["records"]
        self._index, self._blocks = int(state["index"]), int(state["blocks"])
        self.reasons = reasons_of(state["skipped"])
        self.lost_bytes = int(state.get("lost_bytes", 0))
        self._documents = self._read(source.read(self._place))

    @property
    def skipped(self) -> int:
        """Records skipped so far."""
        return sum(self.reasons.values())

    def __iter__(self) -> Iterator[Document]:
        return self._documents

    def __next__(self) -> Document:
        return next(self._documents)

    def _read(self, records: Records) -> Iterator[Document]:
        for record, place in records:
            index, given = self._index, self._blocks
            self.lost_bytes += 0 if given else record.lost_bytes
            content = record.content
            why = record.why if content is None else _why_not(content)
            if content is None or why:
                self.skip(why)
                self._finish_record(place)
                continue
            for number, (block, ends) in enumerate(_blocks(content), start=1):
                # The state moves before the document is handed out: it is the state behind this document.
                if ends:
                    self._finish_record(place)
                elif number > given:
                    self._blocks = number
                if number > given:
                    yield Document(index, record.name, block, ends)

    def skip(self, why: str) -> None:
        """Count a record that is skipped."""
        self.reasons[why] = self.reasons.get(why, 0) + 1

    def _finish_record(self, place: dict[str, Any]) -> None:
        self._place, self._blocks = place, 0
        self._index += 1

    def state(self) -> dict[str, Any]:
        lost = {"lost_bytes": self.lost_bytes} if self.lost_bytes else {}
        return {
            "records": self._place,
            "blocks": self._blocks,
            "index": self._index,
            "skipped": dict(self.reasons),
        } | lost


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


def reasons_of(saved: Any) -> dict[str, int]:
    """{why: count} as a state has it; that of an earlier version has the number alone."""
    if isinstance(saved, dict):
        return {str(why): int(count) for why, count in saved.items()}
    return {"by an earlier version": int(saved)} if saved else {}


def reasons_in_words(reasons: dict[str, int]) -> str:
    """Such as "3 of the records were skipped: 2 blank, 1 not UTF-8", the most frequent reason first."""
    if not reasons:
        return "no record was skipped"
    counted = sorted(reasons.items(), key=lambda item: -item[1])
    return f"{sum(reasons.values())} records were skipped: {', '.join(f'{count} {why}' for why, count in counted)}"


def _why_not(content: str | Messages | list[int]) -> str:
    """Why a content cannot be used; empty where it can."""
    if not isinstance(content, str):
        return "" if content else "empty list"
    if not content.strip():
        return "blank"
    return "binary" if "\0" in content else ""


def _blocks(content: str | Messages | list[int]) -> Iterator[tuple[str | Messages | list[int], bool]]:
    if isinstance(content, Messages):
        yield content, True
        return
    if not isinstance(content, str):
        for begin in range(0, len(content), RECORD_BLOCK_LENGTH):
            end = begin + RECORD_BLOCK_LENGTH
            yield content[begin:end], end >= len(content)
        return
    rest = content
    while rest:
        block, rest = cut(rest, RECORD_BLOCK_LENGTH)
        yield block, not rest


def record_of(name: str, row: Mapping[str, Any], column: str, tokens: bool) -> Record:
    """A record of a row's value in a column. A conversation is kept as its messages; a value of another type says so. Of token
    ids, those that the row's `attention_mask` marks as padding are left out."""
    value = row.get(column)
    if value is None:
        return Record(name, None, "missing or null")
    if tokens:
        ids, mask = list(value) if isinstance(value, (list, tuple)) else [value], row.get(MASK_COLUMN)
        if mask is None:
            return Record(name, ids)
        if not isinstance(mask, (list, tuple)) or len(mask) != len(ids):
            return Record(name, None, f"{MASK_COLUMN} of another length")
        return Record(name, [i for i, used in zip(ids, mask, strict=True) if used])
    if isinstance(value, str):
        return Record(name, value)
    if isinstance(value, list) and all(isinstance(turn, dict) and turn.keys() & {"role", "from"} for turn in value):
        return _conversation(name, value)
    kind = "a list" if isinstance(value, list) else type(value).__name__
    return Record(name, None, f"{kind} instead of text")


_ROLES = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant"}
"""Roles of ShareGPT's layout (`from`, `value`) by their usual names."""


def _conversation(name: str, turns: list[dict[str, Any]]) -> Record:
    """Messages as chat templates take them: no null fields (Parquet writes every field of every message), the text of a
    content given in parts joined, arguments of tool calls as mappings, ShareGPT's names as the usual ones."""
    if not turns:
        return Record(name, None, "no messages")
    messages = Messages()
    for turn in turns:
        message = {key: value for key, value in turn.items() if value is not None}
        if "role" not in message:
            message = {"role": _ROLES.get(str(turn.get("from")), turn.get("from")), "content": turn.get("value")}
        content = message.get("content", "")
        if isinstance(content, list):
            parts: list[Any] = [part.get("text") if isinstance(part, dict) else part for part in content]
            if not all(isinstance(part, str) for part in parts):
                return Record(name, None, "a message with a part that is no text")
            content = "".join(parts)
        calls = [call for call in message.get("tool_calls", []) if call]
        if calls:
            message["tool_calls"] = [_called(call) for call in calls]
        else:
            message.pop("tool_calls", None)
        messages.append({**message, "content": content or ""})
    if not any(message["content"].strip() or "tool_calls" in message for message in messages):
        return Record(name, None, "messages without content")
    return Record(name, messages)


def _called(call: dict[str, Any]) -> dict[str, Any]:
    """A tool call whose arguments, JSON text in OpenAI's layout, are the mapping that templates write out."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return call
    return {**call, "function": {**function, "arguments": arguments}}
