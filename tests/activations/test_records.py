from __future__ import annotations

import json
from pathlib import Path

import pytest

from transcoder.activations.documents import RECORD_BLOCK_LENGTH, DataError, Reader, RecordSource, is_heldout
from transcoder.activations.record_sources import (
    FILE_BLOCK_CHARACTERS,
    FileRecords,
    HubRecords,
    StdlibRecords,
    files_digest,
    record_sources,
)
from transcoder.config import ActivationsSection


@pytest.fixture(params=["jsonl", "parquet", "text", "folder", "hub-jsonl", "hub-parquet", "tokens"])
def source(request: pytest.FixtureRequest, tmp_path: Path, documents: list[str]) -> RecordSource:
    """The same 60 documents in every form."""
    import pyarrow
    import pyarrow.parquet

    form = request.param
    table = pyarrow.table({"text": documents, "ids": [[i, i + 1] for i in range(len(documents))]})
    if form in ("jsonl", "hub-jsonl"):
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    elif form in ("parquet", "hub-parquet", "tokens"):
        # Small row groups: resuming has whole groups to pass over.
        pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=7)
    elif form == "text":
        for i, document in enumerate(documents):
            (tmp_path / f"{i:03}.txt").write_text(document)
    else:
        (tmp_path / "sub").mkdir()
        (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": d}) + "\n" for d in documents[:20]))
        pyarrow.parquet.write_table(table.slice(20, 20), tmp_path / "b.parquet")
        for i, document in enumerate(documents[40:]):
            (tmp_path / "sub" / f"{i:03}.md").write_text(document)
        (tmp_path / ".hidden").write_text("not read")
    if form.startswith("hub"):
        return HubRecords(str(tmp_path), None, "train", "text", None)
    if form == "tokens":
        return FileRecords(tmp_path / "a.parquet", "text", "ids")
    return FileRecords(tmp_path, "text", None)


def test_every_form_gives_the_same_documents_in_order(source: RecordSource, documents: list[str]) -> None:
    found = list(Reader(source))
    assert [d.index for d in found] == list(range(60))
    if isinstance(found[0].content, str):
        assert [d.content for d in found] == documents
    else:
        assert [d.content for d in found] == [[i, i + 1] for i in range(60)]


@pytest.mark.parametrize("stop", [0, 1, 19, 20, 33, 59, 60])
def test_reading_goes_on_from_a_saved_state(source: RecordSource, stop: int) -> None:
    reader = Reader(source)
    for _ in range(stop):
        next(reader)
    state = json.loads(json.dumps(reader.state()))
    rest = list(reader)
    assert len(rest) == 60 - stop
    assert list(Reader(source, state)) == rest


def test_start_states_that_name_the_first_record_are_read(source: RecordSource) -> None:
    """They name the place before the first record, where `Reader.state` gives None."""
    place = {"record": 0, "dataset": None} if isinstance(source, HubRecords) else {"file": 0, "record": 0}
    state = {"records": place, "blocks": 0, "index": 0, "skipped": 0}
    assert list(Reader(source, state)) == list(Reader(source))


def test_stdlib_splits_are_disjoint_and_resume() -> None:
    train, heldout, fraction = record_sources(ActivationsSection(dataset="stdlib"))
    assert fraction == 0
    reader = Reader(train)
    first = [next(reader) for _ in range(5)]
    again = Reader(StdlibRecords("train"), json.loads(json.dumps(reader.state())))
    assert next(again) == next(reader)
    names = {next(r).name for r in [Reader(heldout)] for _ in range(5)}
    assert names.isdisjoint({d.name for d in first})


def test_unusable_records_are_skipped_and_counted(tmp_path: Path) -> None:
    lines = ['{"text": "good"}', '{"text": ""}', '{"text": " \\n"}', "not json", '{"text": null}', "[1]"]
    lines += ['{"text": 5}', '{"text": "bin\\u0000ary"}', '{"text": "last"}']
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "b.txt").write_bytes(b"\xff\xfe\x00latin")
    (tmp_path / "c.bin").write_bytes(b"\x00\x01\x02")
    (tmp_path / "d.txt").write_bytes(b"")
    reader = Reader(FileRecords(tmp_path, "text", None))
    assert [(d.index, d.content) for d in reader] == [(0, "good"), (8, "last")]
    assert reader.skipped == 9
    assert reader.reasons == {
        "blank": 2, "not a JSON object": 2, "missing or null": 1, "int instead of text": 1, "binary": 2, "not UTF-8": 1,
    }  # fmt: skip


def test_skipped_count_survives_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    source = FileRecords(path, "text", None)
    reader = Reader(source)
    next(reader)
    again = Reader(source, reader.state())
    assert [d.content for d in again] == ["b"]
    assert again.skipped == 2


def test_a_huge_record_comes_in_blocks_that_join_to_it(tmp_path: Path) -> None:
    text = "".join(f"line {i} of a very long document\n" for i in range(20000))
    assert len(text) > 2 * RECORD_BLOCK_LENGTH
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": text}) + '\n{"text": "next"}\n')
    source = FileRecords(path, "text", None)
    reader = Reader(source)
    blocks = []
    states = [reader.state()]
    for document in reader:
        blocks.append(document)
        states.append(json.loads(json.dumps(reader.state())))
    assert [b.index for b in blocks] == [0, 0, 0, 1]
    assert [b.ends for b in blocks] == [False, False, True, True]
    assert "".join(str(b.content) for b in blocks[:3]) == text
    assert all(str(b.content).endswith("\n") for b in blocks[:3])
    for taken, state in enumerate(states):
        assert list(Reader(source, state)) == blocks[taken:]


def test_a_long_text_file_is_many_documents(tmp_path: Path) -> None:
    text = "".join(f"line {i}\n" for i in range(10000)) + "x" * (3 * FILE_BLOCK_CHARACTERS)
    path = tmp_path / "a.txt"
    path.write_text(text, encoding="utf-8")
    found = list(Reader(FileRecords(path, "text", None)))
    assert "".join(str(d.content) for d in found) == text
    assert max(len(d.content) for d in found) <= FILE_BLOCK_CHARACTERS
    assert [d.index for d in found] == list(range(len(found)))


def test_a_text_file_that_stops_being_utf8_is_read_up_to_there(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\n" * 5000 + b"\xff" + b"more\n" * 5000)
    reader = Reader(FileRecords(path, "text", None))
    assert all(set(str(d.content)) <= set("good line\n") for d in reader)
    assert reader.skipped == 1


def test_heldout_share_is_stable_and_near_the_fraction() -> None:
    chosen = [i for i in range(20000) if is_heldout(i, 0.02)]
    assert 320 < len(chosen) < 480
    assert not any(is_heldout(i, 0.0) for i in range(1000))
    assert chosen[:5] == [i for i in range(chosen[4] + 1) if is_heldout(i, 0.02)]
    # Raising the share keeps what was held out before.
    assert all(is_heldout(i, 0.05) for i in chosen)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"dataset": "/no/such/file.txt"}, "no file or folder"),
        ({"dataset": "missing.jsonl"}, "no file or folder"),
        ({"dataset": "./missing"}, "no file or folder"),
        ({"dataset": "stdlib", "tokens_column": "ids"}, "stdlib"),
        ({"dataset": "{folder}/a.jsonl", "text_column": "txt"}, "did you mean 'text'"),
        ({"dataset": "{folder}/b.parquet", "text_column": "body"}, r"it has \['text', 'ids'\]"),
        ({"dataset": "{folder}/b.parquet", "tokens_column": "idz"}, "did you mean 'ids'"),
        ({"dataset": "{folder}/c.txt", "tokens_column": "ids"}, "only JSONL and Parquet"),
        ({"dataset": "{folder}/torn.parquet"}, "torn.parquet is not a readable Parquet file"),
        ({"dataset": "{folder}/empty"}, "no file below"),
        ({"dataset": "{folder}/array.json"}, "array.json is not JSON lines"),
        ({"dataset": "hf:{folder}/hub", "dataset_split": "nosuch"}, "nosuch"),
        ({"dataset": "hf:{folder}/hub", "text_column": "txt"}, "did you mean 'text'"),
    ],
)
def test_errors_come_when_the_source_is_built(tmp_path: Path, section: dict[str, str], message: str) -> None:
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"], "ids": [[1]]}), tmp_path / "b.parquet")
    (tmp_path / "c.txt").write_text("text")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "b.parquet").read_bytes()[:-20])
    (tmp_path / "empty").mkdir()
    (tmp_path / "array.json").write_text('[\n{"text":\n"a"}]\n')
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.jsonl").write_text('{"text": "a"}\n')
    filled = {name: value.replace("{folder}", str(tmp_path)) for name, value in section.items()}
    with pytest.raises(DataError, match=message):
        record_sources(ActivationsSection(**filled))  # type: ignore[arg-type]


def test_an_unknown_hub_dataset_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    # A port that nothing listens on stands for a machine without a network.
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(DataError, match="Check the name"):
        record_sources(ActivationsSection(dataset="nobody/no-such-dataset"))


@pytest.mark.parametrize(
    ("length", "whole", "places"),
    [
        (10_000_000, 10_000_000, [0, 1, 70_000, 5_000_000, 9_999_999]),
        (10_000_000, 9_999_999, [0, 65_535, 9_934_464, 9_999_999]),
        (1_048_576, 0, [*range(0, 1_048_576, 70_001), 1_048_575]),
        (65_537, 0, [0, 65_535, 65_536]),
        (1, 0, [0]),
    ],
)
def test_a_files_digest_sees_changes(tmp_path: Path, length: int, whole: int, places: list[int]) -> None:
    """Everywhere in files that are small together, and in large ones in their blocks, first and last included."""
    path = tmp_path / "file"

    def digest(content: bytes, name: str = "name") -> str:
        path.write_bytes(content)
        return files_digest([(name, path)], whole)

    content = b"a" * length
    before = digest(content)
    for place in places:
        assert digest(content[:place] + b"b" + content[place + 1 :]) != before, place
    assert digest(content) == before
    assert digest(content, "other") != before
    assert digest(content[:-1]) != before
    assert digest(content + b"a") != before
