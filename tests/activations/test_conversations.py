"""Conversations: a column of messages becomes text by the tokenizer's own chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.activations.streams import files
from transcoder.activations.documents import DataError, Document, Reader, Unusable
from transcoder.activations.packing import Packer
from transcoder.activations.vocabulary import Vocabulary

TURNS = [{"role": "user", "content": "Hello <b>"}, {"role": "assistant", "content": "Yes"}]
TEMPLATE = "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_conversations_are_written_by_the_tokenizers_chat_template(
    tmp_path: Path, model_folder: Path, suffix: str
) -> None:
    import pyarrow
    import pyarrow.parquet
    from transformers import AutoTokenizer

    rows = [{"messages": TURNS}, {"messages": []}, {"messages": TURNS[:1]}]
    path = tmp_path / f"a.{suffix}"
    if suffix == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"messages": [1, 2]}, {"messages": "text"}]))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    reader = Reader(files(path, "messages", None))
    found = list(reader)
    assert [document.content for document in found[:2]] == [TURNS, TURNS[:1]]
    assert [document.content for document in found[2:]] == (["text"] if suffix == "jsonl" else [])
    assert reader.reasons == {"no messages": 1} | ({"a list instead of text": 1} if suffix == "jsonl" else {})

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="messages with roles, and this tokenizer has no chat template"):
        vocabulary.encode(found[0])
    tokenizer.chat_template = TEMPLATE
    text = Document(0, "text", "user: Hello <b>\nassistant: Yes\n")
    assert vocabulary.encode(found[0]).tolist() == vocabulary.encode(text).tolist()
    tokenizer.chat_template = "{{ raise_exception('only system messages') }}"
    with pytest.raises(Unusable, match=r"refused by the chat template \(only system messages\)"):
        vocabulary.encode(found[0])


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_messages_of_every_layout_are_read(tmp_path: Path, suffix: str) -> None:
    """Content in parts, tool calls without content, ShareGPT's names; what holds no text is counted."""
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    image = [{"type": "image", "url": "x"}]
    rows: list[list[dict[str, object]]] = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": None, "tool_calls": [call]}],
        [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        [{"role": "user", "content": ""}],
    ]
    if suffix == "jsonl":
        rows += [[{"role": "user", "content": parts}], [{"role": "user", "content": image}]]
    path = tmp_path / f"a.{suffix}"
    write_rows(path, [{"messages": row} for row in rows])
    reader = Reader(files(path, "messages", None))
    called = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    expected = [
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "", "tool_calls": [called]}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
        [{"role": "user", "content": "ab"}],
    ]
    assert [document.content for document in reader] == expected[: 3 if suffix == "jsonl" else 2]
    assert reader.reasons == {"messages without content": 1} | (
        {"a message with a part that is no text": 1} if suffix == "jsonl" else {}
    )


def test_conversations_that_the_template_refuses_are_skipped_and_counted(tmp_path: Path, model_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    tokenizer.chat_template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}" + TEMPLATE
    )
    rows = [{"messages": TURNS[1:]}, {"messages": TURNS}] * 10
    path = tmp_path / "a.jsonl"
    write_rows(path, rows)
    packer = Packer(files(path, "messages", None), Vocabulary(tokenizer, len(tokenizer)), 16, True, lambda _: True)
    while packer.epoch < 2:
        packer.pack(4)
    assert packer.skipped()["refused by the chat template (user first)"] >= 20
    again = Packer(files(path, "messages", None), Vocabulary(tokenizer, len(tokenizer)), 16, True, lambda _: True)
    again.load_state_dict(packer.state_dict())
    for _ in range(5):
        a, b = packer.pack(3), again.pack(3)
        assert a is not None
        assert b is not None
        assert (a.tokens == b.tokens).all()
    assert packer.counts() == again.counts()


def write_rows(path: Path, rows: list[dict[str, object]]) -> None:
    import pyarrow
    import pyarrow.parquet

    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def test_a_state_of_before_reasons_were_counted_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n{"text": "\\u0000"}\n{"text": "b"}\n')
    source = files(path, "text", None)
    reader = Reader(source, {"records": {"file": 0, "record": 2}, "blocks": 0, "index": 2, "skipped": 1})
    assert [document.content for document in reader] == ["b"]
    assert (reader.skipped, reader.reasons) == (2, {"by an earlier version": 1, "binary": 1})
