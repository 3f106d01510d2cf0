from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from tests.activations.streams import files
from transcoder.activations.documents import RECORD_BLOCK_LENGTH, DataError, Reader, RecordSource, is_heldout
from transcoder.activations.record_sources import (
    FILE_BLOCK_CHARACTERS,
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
        (tmp_path / "sub" / "c.JSONL.gz").write_bytes(
            gzip.compress("".join(json.dumps({"text": d}) + "\n" for d in documents[40:]).encode())
        )
        (tmp_path / "README.md").write_text("not read")
        (tmp_path / "LICENSE").write_text("not read")
        (tmp_path / ".hidden").write_text("not read")
    if form.startswith("hub"):
        return HubRecords(str(tmp_path), None, "train", "text", None)
    if form == "tokens":
        return files(tmp_path / "a.parquet", "text", "ids")
    return files(tmp_path, "text", None)


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
    lines = ['{"id": 1}', *lines, ""]
    lines += ['{"text": 5}', '{"text": "bin\\u0000ary"}', '{"text": "last"}']
    (tmp_path / "a.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "\xff"}')
    (tmp_path / "d.jsonl").write_bytes(b"")
    reader = Reader(files(tmp_path, "text", None))
    assert [(d.index, d.content) for d in reader] == [(1, "good"), (10, "last")]
    assert reader.skipped == 10
    assert reader.reasons == {
        "blank": 3, "not a JSON object": 2, "missing or null": 2, "int instead of text": 1, "binary": 1, "not UTF-8": 1,
    }  # fmt: skip


def test_skipped_count_survives_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": ""}\n{"text": "a"}\n{"text": ""}\n{"text": "b"}\n')
    source = files(path, "text", None)
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
    source = files(path, "text", None)
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
    found = list(Reader(files(path, "text", None)))
    assert "".join(str(d.content) for d in found) == text
    assert max(len(d.content) for d in found) <= FILE_BLOCK_CHARACTERS
    assert [d.index for d in found] == list(range(len(found)))


def test_a_text_file_with_bad_bytes_loses_those_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"good line\n" * 5000 + b"caf\xe9 \xff\xfe" + b"more\n" * 5000 + b"\xff")
    reader = Reader(files(path, "text", None))
    first = next(reader)
    again = Reader(files(path, "text", None), json.loads(json.dumps(reader.state())))
    text = str(first.content) + "".join(str(d.content) for d in again)
    assert text == "good line\n" * 5000 + "caf " + "more\n" * 5000
    assert (again.skipped, again.lost_bytes) == (0, 4)
    assert "bytes that are not UTF-8 are left out" in caplog.text
    path.write_bytes("Grüße, 世界\n".encode("utf-16"))
    assert [d.content for d in Reader(files(path, "text", None))] == ["Grüße, 世界\n"]


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
        ({"dataset": "{folder}/c.txt", "tokens_column": "ids"}, "only files of rows have columns"),
        ({"dataset": "{folder}/torn.parquet"}, "torn.parquet is not a readable Parquet file"),
        ({"dataset": "{folder}/empty"}, "no file below"),
        ({"dataset": "{folder}/object.json"}, "object.json is not JSON lines"),
        ({"dataset": "{folder}/data.pkl"}, "data.pkl is neither UTF-8 text nor of a format that is read"),
        ({"dataset": "{folder}/mixed"}, "notes.docx is neither UTF-8 text nor"),
        ({"dataset": "{folder}/a.jsonl", "dataset_split": "test"}, "is one file, which has neither"),
        ({"dataset": "{folder}/splits", "dataset_split": "validation"}, r"has the splits 'train', 'test'"),
        ({"dataset": "{folder}/tables"}, "formats that are not read together"),
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
    (tmp_path / "object.json").write_text('{\n"text":\n["a"]}\n')
    (tmp_path / "data.pkl").write_bytes(b"\x80\x04\x95\x00\x01")
    for name in ("mixed", "splits", "tables"):
        (tmp_path / name).mkdir()
    (tmp_path / "mixed" / "readme.rst").write_text("text")
    (tmp_path / "mixed" / "notes.docx").write_bytes(b"PK\x03\x04\x00\x00")
    (tmp_path / "splits" / "train.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "splits" / "test.jsonl").write_text('{"text": "b"}\n')
    (tmp_path / "tables" / "a.csv").write_text("text\na\n")
    (tmp_path / "tables" / "b.parquet").write_bytes((tmp_path / "b.parquet").read_bytes())
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "a.jsonl").write_text('{"text": "a"}\n')
    filled = {name: value.replace("{folder}", str(tmp_path)) for name, value in section.items()}
    with pytest.raises(DataError, match=message):
        record_sources(ActivationsSection(**filled))  # type: ignore[arg-type]


def contents(path: Path, **section: Any) -> list[Any]:
    """What a run with this dataset trains on."""
    source, _, _ = record_sources(ActivationsSection(dataset=str(path), **section))
    found = list(Reader(source))
    reader = Reader(source)
    for _ in range(len(found) // 2):
        next(reader)
    state = json.loads(json.dumps(reader.state()))
    assert list(Reader(source, state)) == found[len(found) // 2 :]
    return [document.content for document in found]


def compressed(name: str, data: bytes) -> bytes:
    import bz2
    import lzma

    import zstandard

    packers = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstandard.compress}
    return next((pack(data) for suffix, pack in packers.items() if name.lower().endswith(suffix)), data)


@pytest.mark.parametrize(
    "name",
    ["a.jsonl", "a.JSONL", "a.json", "a.ndjson", "a.jsonl.gz", "a.Jsonl.BZ2", "a.json.xz", "a.jsonl.zst", "array.json", "a.csv",
     "a.TSV", "a.csv.gz", "a.arrow", "a.PARQUET", "a.zip", "a.utf16.jsonl"],
)  # fmt: skip
@pytest.mark.parametrize("folder", [False, True])
def test_every_common_suffix_is_read_in_any_case(tmp_path: Path, documents: list[str], name: str, folder: bool) -> None:
    import pyarrow
    import pyarrow.parquet

    path, table = tmp_path / name, pyarrow.table({"text": documents})
    lines = "".join(json.dumps({"text": d}) + "\n" for d in documents)
    kind = name.lower().split(".")[1]
    if kind == "parquet":
        pyarrow.parquet.write_table(table, path)
    elif kind == "arrow":
        with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    elif kind == "zip":
        import zipfile

        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inside.jsonl", lines)
    else:
        text = {
            "csv": "text\n" + "\n".join(documents),
            "tsv": "text\tother\n" + "\n".join(d + "\tx" for d in documents),
        }.get(kind, lines)
        if name == "array.json":
            text = json.dumps([{"text": d} for d in documents], indent=1)
        path.write_bytes(compressed(name, text.encode("utf-16" if "utf16" in name else "utf-8")))
    if folder:
        (tmp_path / "README.md").write_text("not read")
        (tmp_path / "LICENSE").write_text("not read")
    assert contents(tmp_path if folder else path) == documents


def test_a_downloaded_repository_gives_its_split(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "0123"
    for name, split in (("data/train-00000-of-00001", "a"), ("data/test-00000-of-00001", "b"), ("more/x", "c")):
        file = snapshot / f"{name}.jsonl"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"text": split}) + "\n")
    (snapshot / "LICENSE").write_text("license")
    (snapshot / "README.md").write_text("# readme")
    (tmp_path / "datasets--a--b" / "refs").mkdir()
    (tmp_path / "datasets--a--b" / "refs" / "main").write_text("0123")
    assert contents(snapshot) == contents(tmp_path / "datasets--a--b") == ["a"]
    assert contents(snapshot, dataset_split="test") == ["b"]
    assert "other files are not: LICENSE, more/x.jsonl" in caplog.text
    configs = (
        "configs:\n- config_name: one\n  data_files: data/*.jsonl\n- config_name: two\n  data_files: more/*.jsonl\n"
    )
    (snapshot / "README.md").write_text(f"---\n{configs}---\n# readme")
    assert contents(snapshot, dataset_config="two") == ["c"]
    with pytest.raises(DataError, match=r"dataset_config None.*one"):
        contents(snapshot)


def test_folders_of_save_to_disk_are_read(tmp_path: Path, documents: list[str]) -> None:
    import datasets

    datasets.disable_progress_bars()
    saved = datasets.Dataset.from_dict({"text": documents, "ids": [[n] for n in range(60)]})
    saved.select(range(10, 40)).save_to_disk(str(tmp_path / "one"), num_shards=2)
    datasets.DatasetDict({"train": saved, "test": saved.select([3])}).save_to_disk(str(tmp_path / "two"))
    assert contents(tmp_path / "one") == documents[10:40]
    assert contents(tmp_path / "two") == documents
    assert contents(tmp_path / "two", dataset_split="test") == documents[3:4]
    assert contents(tmp_path / "two", tokens_column="ids") == [[n] for n in range(60)]
    saved.with_format("numpy", columns=["ids"]).save_to_disk(str(tmp_path / "in" / "formatted"))
    assert contents(tmp_path / "in" / "formatted", tokens_column="ids") == [[n] for n in range(60)]
    assert contents(tmp_path / "in" / "formatted") == documents
    with pytest.raises(DataError, match=r"give one of them, as '.*formatted'"):
        contents(tmp_path / "in")
    assert record_sources(ActivationsSection(dataset=f"hf:{tmp_path / 'one'}"))[0].digest()
    with pytest.raises(DataError, match=r"has the splits 'train', 'test', got 'x'"):
        contents(tmp_path / "two", dataset_split="x")
    with pytest.raises(DataError, match="saved as one data set"):
        contents(tmp_path / "one", dataset_split="x")


@pytest.mark.parametrize("content", [b"", b"text\n1,2\n3,4,5\n", b'text\n"open', "text\nété\n".encode("latin-1")])
def test_a_table_that_is_none_is_refused_at_once(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=r"a\.csv' is not what Hugging Face datasets reads"):
        contents(tmp_path / "a.csv")


def test_a_link_to_a_folder_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("there", "here"):
        (tmp_path / name).mkdir()
    (tmp_path / "there" / "a.txt").write_text("a")
    (tmp_path / "here" / "link").symlink_to(tmp_path / "there")
    with pytest.raises(DataError, match=r"here/link, is not followed"):
        contents(tmp_path / "here")
    (tmp_path / "here" / "b.txt").write_text("b")
    assert contents(tmp_path / "here") == ["b"]
    assert "links to folders are not followed" in caplog.text


def test_a_folder_of_plain_text_of_any_name_is_text(tmp_path: Path) -> None:
    for name in ("README.md", "LICENSE", "a.rst", "b.py", "c"):
        (tmp_path / name).write_text(name)
    assert contents(tmp_path / "README.md") == ["README.md"]
    assert contents(tmp_path) == ["a.rst", "b.py", "c"]
    (tmp_path / "d.txt").write_text("d")
    assert contents(tmp_path) == ["d"]
    (tmp_path / "e").mkdir()
    for name, text in (("README.md", "---\nconfigs:\n- config_name: x\n  data_files: none/*\n---\n"), ("LICENSE", "")):
        (tmp_path / "e" / name).write_text(text)
        with pytest.raises(DataError, match="finds no data in the folder"):
            contents(tmp_path / "e")
    (tmp_path / "e" / "README.md").write_text("# none")
    with pytest.raises(DataError, match=r"no data in .*only LICENSE"):
        contents(tmp_path / "e")


def test_an_attention_mask_leaves_padding_out(tmp_path: Path) -> None:
    rows = [
        {"input_ids": [5, 6, 0, 0], "attention_mask": [1, 1, 0, 0]},
        {"input_ids": [0, 7], "attention_mask": [0, 1]},
        {"input_ids": [8]},
        {"input_ids": [9], "attention_mask": [1, 1]},
    ]
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        source, _, _ = record_sources(ActivationsSection(dataset=str(tmp_path / name), tokens_column="input_ids"))
        reader = Reader(source)
        assert [d.content for d in reader] == [[5, 6], [7], [8]]
        assert reader.reasons == {"attention_mask of another length": 1}


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
