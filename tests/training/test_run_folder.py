"""The lock of a run's folder."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from transcoder.training.run_folder import FolderLock, RunLockedError

LOCK_AND_WAIT = """
import sys
from pathlib import Path
from transcoder.training.run_folder import FolderLock
with FolderLock(Path(sys.argv[1])):
    print("locked", flush=True)
    sys.stdin.read()
"""


def test_a_second_run_in_one_folder_is_refused_by_name(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LOCK_AND_WAIT, str(tmp_path / "run")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as owner:
        assert owner.stdout is not None
        assert owner.stdout.readline() == b"locked\n"
        with pytest.raises(RunLockedError, match=rf"run: in use by process {owner.pid} on "):
            FolderLock(tmp_path / "run")
        with pytest.raises(RunLockedError, match=rf"run: in use by process {owner.pid} on "):
            FolderLock(tmp_path / "run")
        owner.kill()
    with FolderLock(tmp_path / "run") as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    with FolderLock(tmp_path / "run"):
        pass


def test_a_lock_that_was_discarded_meanwhile_locks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file was opened before, and locked after, its owner took it away: the next one takes the new file's lock."""
    owner = FolderLock(tmp_path)
    flock = fcntl.flock
    taken = []

    def late(descriptor: int, operation: int) -> None:
        if operation & fcntl.LOCK_EX:
            taken.append(descriptor)
            if len(taken) == 1:
                owner.discard()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with FolderLock(tmp_path):
        assert len(taken) == 2
        with pytest.raises(RunLockedError, match="in use by process"):
            FolderLock(tmp_path)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS])
def test_a_file_system_without_locks_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def none(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="two runs in one folder would clash"), FolderLock(tmp_path / "run") as lock:
        assert json.loads(lock.path.read_text())["pid"] == os.getpid()
    lock.discard()
    assert not (tmp_path / "run").exists()


def test_a_link_in_place_of_the_lock_leads_nowhere(tmp_path: Path) -> None:
    """A run folder from elsewhere may bring one."""
    (tmp_path / "precious").write_text("words")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(OSError, match="lock"):
        FolderLock(tmp_path / "run")
    assert (tmp_path / "precious").read_text() == "words"
