"""What a machine that loses its power must find: every file is on the disk before it takes its name, and the name after it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("traced_writes.py")
APPENDED = {"metrics.jsonl"}
NO_CONTENT = {".lock"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traced")
    command = [sys.executable, str(PROGRAM), str(folder)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert run.returncode == 0, run.stderr
    return folder


@pytest.fixture(scope="module")
def events(place: Path) -> list[list[Any]]:
    return [json.loads(line) for line in (place / "trace.jsonl").read_text().splitlines()]


def written(place: Path) -> list[Path]:
    folders = (place / "run", place / "second", place / "saved", place / "cache")
    return [file for folder in folders for file in folder.rglob("*") if file.is_file() and file.name not in NO_CONTENT]


def test_every_file_is_on_the_disk_before_it_takes_its_name(place: Path, events: list[list[Any]]) -> None:
    synced, renamed = set(), set()
    for event in events:
        if event[0] == "fsync":
            synced.add(tuple(event[1]))
        else:
            for name, state in event[3].items():
                assert tuple(state) in synced, f"{name} became {event[1]} and was not on the disk"
                renamed.add(state[0])
    files = written(place)
    kinds = {file.name for file in files}
    assert kinds >= {
        *("config.yaml", "metrics.jsonl", "usage.json", "summary.json", "report.html", "latents.parquet"),
        *("samples.parquet", "correlation_step_00000012.json", "regularizer.jsonl", "heldout_codes.safetensors"),
        *("similarity.json", "state.json", "trainer.safetensors", "transcoder.safetensors", "config.json"),
        *("a.safetensors", "index.json", ".run_id"),
    }
    for file in files:
        found = os.stat(file)
        assert (found.st_ino, found.st_size, found.st_mtime_ns) in synced, f"{file} is not on the disk"
        assert file.name in APPENDED or found.st_ino in renamed, f"{file} was written under its own name"


def test_every_new_name_is_on_the_disk(events: list[list[Any]]) -> None:
    open_names: dict[int, str] = {}
    for event in events:
        if event[0] == "rename":
            open_names[event[2]] = event[1]
        else:
            open_names.pop(event[1][0], None)
    assert open_names == {}
