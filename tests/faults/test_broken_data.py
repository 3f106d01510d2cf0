"""Data that break off in the middle: every document comes once and in order, or the run says why it cannot go on."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.activations.streams import files
from transcoder.activations import retry
from transcoder.activations.documents import DataError, Reader, RecordSource
from transcoder.activations.local_files import local_data
from transcoder.activations.record_sources import FileRecords, HubRecords, record_sources
from transcoder.activations.retry import RetriedRecords
from transcoder.config import ActivationsSection

FILES, LINES = 4, 5
WHOLE = [f"file {number} line {line}" for number in range(FILES) for line in range(LINES)]


def write(folder: Path, number: int) -> None:
    lines = [json.dumps({"text": text}) for text in WHOLE[number * LINES : (number + 1) * LINES]]
    (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four files of documents."""
    path = tmp_path / "data"
    path.mkdir()
    for number in range(FILES):
        write(path, number)
    return path


class Pauses:
    """What happens while the source waits, in the place of time that passes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.acts: dict[int, Callable[[], None]] = {}

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)
        self.acts.get(len(self.seconds), lambda: None)()


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> Pauses:
    made = Pauses()
    monkeypatch.setattr(retry.time, "sleep", made)
    return made


def source_of(kind: str, folder: Path) -> RecordSource:
    if kind == "files":
        return RetriedRecords(files(folder, "text", None))
    return RetriedRecords(HubRecords(str(folder), None, "train", "text", None))


@pytest.mark.parametrize("kind", ["files", "hub"])
@pytest.mark.parametrize("resumed", [False, True])
def test_a_source_that_comes_back_is_read_on_where_it_broke(
    folder: Path, pauses: Pauses, kind: str, resumed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The third file is away for two tries, as on a file server that restarts."""
    reader = Reader(source_of(kind, folder))
    found = [next(reader) for _ in range(3)]
    if resumed:
        reader = Reader(source_of(kind, folder), json.loads(json.dumps(reader.state())))
    (folder / "2.jsonl").unlink()
    pauses.acts = {2: lambda: write(folder, 2)}
    with caplog.at_level(logging.WARNING):
        found += list(reader)
    assert [d.content for d in found] == WHOLE
    assert [d.index for d in found] == list(range(len(WHOLE)))
    assert pauses.seconds == list(retry.PAUSES[:2])
    assert "the data broke off (FileNotFoundError" in caplog.text
    assert reader.skipped == 0


@pytest.mark.parametrize("kind", ["files", "hub"])
def test_a_source_that_stays_away_is_an_error_at_its_place(folder: Path, pauses: Pauses, kind: str) -> None:
    reader = Reader(source_of(kind, folder))
    found = [next(reader) for _ in range(3)]
    (folder / "2.jsonl").unlink()
    with pytest.raises(DataError, match=r"did not come back in 6 tries over 63 s: FileNotFoundError.*--resume"):
        found.extend(reader)
    assert pauses.seconds == list(retry.PAUSES)
    assert [d.content for d in found] == WHOLE[: 2 * LINES]
    write(folder, 2)
    again = Reader(source_of(kind, folder), json.loads(json.dumps(reader.state())))
    assert [d.content for d in again] == WHOLE[2 * LINES :]


def test_wrong_data_are_not_tried_again(folder: Path, pauses: Pauses) -> None:
    class Wrong(FileRecords):
        def _read_from(self, first: int, skip: int):  # type: ignore[no-untyped-def]
            raise DataError("line 3: wrong")

    with pytest.raises(DataError, match="line 3: wrong"):
        list(Reader(RetriedRecords(Wrong(local_data(folder, None, "train"), "text", None))))
    assert pauses.seconds == []


def test_a_damaged_parquet_file_is_named(tmp_path: Path, pauses: Pauses) -> None:
    """Its footer is whole and a page in the middle is not."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"document {n} " + "x" * (n % 7) for n in range(2000)]})
    pyarrow.parquet.write_table(table, path, row_group_size=200, compression="zstd", use_dictionary=False)
    data = bytearray(path.read_bytes())
    data[len(data) // 2 : len(data) // 2 + 200] = b"\xff" * 200
    path.write_bytes(data)
    found: list[object] = []
    with pytest.raises(DataError, match=r"a\.parquet.*damaged"):
        found.extend(document.content for document in Reader(RetriedRecords(files(path, "text", None))))
    assert pauses.seconds == []
    assert found == [f"document {n} " + "x" * (n % 7) for n in range(len(found))]
    assert 0 < len(found) < 2000


def test_what_a_run_reads_is_patient(folder: Path) -> None:
    training, heldout, _ = record_sources(ActivationsSection(dataset=str(folder)))
    assert isinstance(training, RetriedRecords)
    assert training is heldout
