"""A small disk that tests really fill."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from transcoder.training import checkpoint, disk_space

KIB, MIB = 2**10, 2**20


class SmallDisk:
    """A folder that holds `size` bytes: a real tmpfs where mounting is permitted, else a limit under open()."""

    def __init__(self, folder: Path, mounted: bool, size: int) -> None:
        self.folder, self.mounted, self.size, self.read_only = folder, mounted, size, False

    def used(self) -> int:
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    def free(self) -> int:
        return disk_space.free_bytes(self.folder) if self.mounted else self.size - self.used()

    def leave(self, room: int) -> Path:
        """Fill the disk but for `room` bytes."""
        filler = self.folder / "filler"
        with open(filler, "ab") as file:
            file.write(b"\0" * (self.free() - room))
        return filler


class Limited:
    """A file whose writes fail once its small disk is full."""

    def __init__(self, file: BinaryIO, disk: SmallDisk) -> None:
        self.file, self.disk = file, disk

    def __enter__(self) -> Limited:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def write(self, data: bytes) -> int:
        self.file.flush()
        if len(data) > self.disk.free():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def believe_there_is_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """What statvfs says under a quota or with other writers: the write itself must meet the full disk."""
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: 2**60)
