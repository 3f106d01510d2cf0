"""What the injected faults share: a small disk, and no pauses before a write is tried again."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.faults.small_disk import MIB, Limited, SmallDisk
from transcoder import files
from transcoder.training import checkpoint, disk_space


@pytest.fixture(autouse=True)
def _nobody_makes_room_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "BACK_OFF", (0.0, 0.0))


@pytest.fixture
def disk(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SmallDisk]:
    """Of 2 MiB, or of so many as an indirect parameter says."""
    size = getattr(request, "param", 2)
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(folder)]
    mounted = bool(shutil.which("mount")) and subprocess.run(command, capture_output=True).returncode == 0
    small = SmallDisk(folder, mounted, size * MIB)
    if not mounted:

        def limited_open(path: Path, mode: str = "r", *args: Any) -> Any:
            if small.read_only and "w" in mode:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS))
            file: Any = open(path, mode, *args)  # noqa: SIM115 (handed to the caller's own `with`)
            return Limited(file, small) if "w" in mode and folder in Path(path).parents else file

        monkeypatch.setattr(files, "open", limited_open, raising=False)
        monkeypatch.setattr(checkpoint, "open", limited_open, raising=False)
        inside_allocate = disk_space.allocate

        def limited_allocate(descriptor: int, size: int) -> None:
            if size > small.free():
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            inside_allocate(descriptor, size)

        monkeypatch.setattr(disk_space, "allocate", limited_allocate)
        inside = disk_space.free_bytes
        monkeypatch.setattr(
            checkpoint, "free_bytes", lambda p: small.free() if folder in [p, *p.parents] else inside(p)
        )
    yield small
    if mounted:
        # Lazily: the traceback of a failed test may hold a file open.
        subprocess.run(["umount", "-l", str(folder)], check=True)
