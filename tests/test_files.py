"""Files that are whole or absent, whatever goes wrong while they are written."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.files import (
    file_digest,
    local_path,
    remove_folder,
    replace_atomically,
    replace_lines,
    replacing,
    replacing_all,
    replacing_folder,
)

PARTS = st.text("ab ü.-%~", min_size=1, max_size=5).filter(
    lambda part: part not in (".", "..") and not part.startswith("~")
)


@settings(deadline=None)
@given(
    st.lists(PARTS, max_size=3),
    st.sampled_from(["~", "$PLACE", "${PLACE}", "$PLACE/x/$INNER", "~/x/${INNER}", ""]),
    st.booleans(),
)
def test_a_path_has_its_home_and_variables_expanded_once_and_nothing_else(
    parts: list[str], start: str, as_path: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        for variable, value in (("HOME", "/home/me"), ("PLACE", "/home/me"), ("INNER", "in ner")):
            patch.setenv(variable, value)
        given_path = "/".join([*([start] if start else []), *parts]) or "."
        expanded = "/home/me" + ("/x/in ner" if "INNER" in start else "") if start else ""
        wanted = Path("/".join([*([expanded] if start else []), *parts]) or ".")
        found = local_path(Path(given_path) if as_path else given_path)
        assert found == wanted
        assert local_path(found) == wanted


@pytest.mark.parametrize(
    "path", ["$NOT_SET_AT_ALL", "here/${NOT_SET_AT_ALL}/x", "/tmp/a$NOT_SET_AT_ALL", "~no_such_user_here/x"]
)
def test_a_path_of_an_unknown_variable_or_user_is_refused_by_name(path: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^--out: .*(NOT_SET_AT_ALL|no_such_user_here)"):
        local_path(path, "--out")


def test_a_folder_whose_name_holds_a_dollar_is_itself(tmp_path: Path) -> None:
    folder = tmp_path / "us$NOT_SET_AT_ALL"
    folder.mkdir()
    assert local_path(folder / "new") == folder / "new"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_pair(first: Path, second: Path, text: str) -> None:
    with replacing_all(first, second) as files:
        for file in files:
            file.write(text.encode())


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "made" / "usage.json"
    replace_atomically(target, b"old")
    assert replace_atomically(target, "n\ud800w").read_bytes() == b"n?w"
    (target.parent / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        replace_atomically(target.parent / "folder", b"x")
    assert names(target.parent) == ["folder", "usage.json"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_a_pair_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    pair = [tmp_path / "weights", tmp_path / "config.json"]
    write_pair(*pair, "one")
    written = []

    def full(descriptor: int) -> None:
        written.append(descriptor)
        if len(written) == 2:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        write_pair(*pair, "two")
    assert raised.value.errno == code
    assert [path.read_text() for path in pair] == ["one", "one"]
    assert names(tmp_path) == ["config.json", "weights"]


def test_an_error_of_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    replace_atomically(tmp_path / "a", "old")
    with pytest.raises(AttributeError), replacing(tmp_path / "a") as file:
        file.write(b"half").no_such_method()
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == ["a"]


KILLED = """
import os, signal, sys
from pathlib import Path
from transcoder.files import replacing
with replacing(Path(sys.argv[1])) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_leaves_goes_with_the_next_write(tmp_path: Path) -> None:
    target = tmp_path / "samples[1].parquet"
    replace_atomically(target, "old")
    subprocess.run([sys.executable, "-c", KILLED, str(target)], timeout=120)
    assert target.read_text() == "old"
    assert len(names(tmp_path)) == 2
    # Another process may be writing the same name now: pid 1 lives.
    (tmp_path / ".writing_samples[1].parquet.1").touch()
    replace_atomically(target, "new")
    assert names(tmp_path) == [".writing_samples[1].parquet.1", "samples[1].parquet"]
    assert target.read_text() == "new"


def test_lines_of_a_step_that_is_done_again_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "lines.jsonl"
    for step in (1, 2, 3):
        replace_lines(path, step, [{"step": step, "n": 1}])
    replace_lines(path, 2, [{"step": 2, "n": 2}])
    assert path.read_text() == '{"step": 1, "n": 1}\n{"step": 2, "n": 2}\n'


def test_a_folder_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    for content in ("old", "new"):
        with replacing_folder(tmp_path / "made") as folder:
            (folder / "inside").mkdir()
            (folder / "inside" / "file").write_text(content)
    with pytest.raises(FileExistsError), replacing_folder(tmp_path / "made") as folder:
        folder.mkdir()
    assert names(tmp_path) == ["made"]
    assert (tmp_path / "made" / "inside" / "file").read_text() == "new"
    remove_folder(tmp_path / "made")
    assert names(tmp_path) == []


def test_digest(tmp_path: Path) -> None:
    replace_atomically(tmp_path / "a", b"abc")
    assert file_digest(tmp_path / "a").bytes == 3
    assert file_digest(tmp_path / "a").sha256.startswith("ba7816bf")
