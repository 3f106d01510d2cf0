"""Conversations: a column of messages becomes text by the tokenizer's own chat template."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from transcoder.activations.documents import DataError, Document, Reader
from transcoder.activations.record_sources import FileRecords
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
    reader = Reader(FileRecords(path, "messages", None))
    found = list(reader)
    assert [document.content for document in found[:2]] == [TURNS, TURNS[:1]]
    assert [document.content for document in found[2:]] == (["text"] if suffix == "jsonl" else [])
    assert reader.reasons == {"a list instead of text": 2 if suffix == "jsonl" else 1}

    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    vocabulary = Vocabulary(tokenizer, len(tokenizer))
    tokenizer.chat_template = None
    with pytest.raises(DataError, match="messages with roles, and this tokenizer has no chat template"):
        vocabulary.encode(found[0])
    tokenizer.chat_template = TEMPLATE
    text = Document(0, "text", "user: Hello <b>\nassistant: Yes\n")
    assert vocabulary.encode(found[0]).tolist() == vocabulary.encode(text).tolist()
    tokenizer.chat_template = "{{ raise_exception('only system messages') }}"
    with pytest.raises(DataError, match="does not take these messages: only system messages"):
        vocabulary.encode(found[0])


def test_a_state_of_before_reasons_were_counted_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n{"text": "\\u0000"}\n{"text": "b"}\n')
    source = FileRecords(path, "text", None)
    reader = Reader(source, {"records": {"file": 0, "record": 2}, "blocks": 0, "index": 2, "skipped": 1})
    assert [document.content for document in reader] == ["b"]
    assert (reader.skipped, reader.reasons) == (2, {"by an earlier version": 1, "binary": 1})
