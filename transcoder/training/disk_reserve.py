"""Disk space that a run holds for its last state: allocated for real, given up when nothing else is left."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path

RESERVE_NAME = ".reserve"
_CHUNK = 1 << 20


class Reserve:
    """A file of `size` bytes in the run's folder, whose blocks nobody else can take.

    Blocks are allocated (`posix_fallocate`), not only promised: a sparse file would reserve nothing, and a quota is met
    here and not at the end of a run. On a file system that compresses or copies on write (btrfs, ZFS) a later write may need
    blocks of its own all the same.

    Args:
        folder: the run's folder.
        size: bytes; 0 holds nothing.
    """

    def __init__(self, folder: Path, size: int) -> None:
        self.path, self.size = folder / RESERVE_NAME, size

    @property
    def held(self) -> int:
        """Bytes really allocated now."""
        try:
            found = self.path.stat()
        except OSError:
            return 0
        # Blocks of 512 bytes, as POSIX counts them; a platform that does not say is believed.
        return min(found.st_size, getattr(found, "st_blocks", found.st_size // 512 + 1) * 512)

    def make(self) -> None:
        """Allocate it, unless it is there.

        Raises:
            OSError: there is no room for it, or a quota forbids it; nothing is left behind.
        """
        if self.size == 0 or self.held >= self.size:
            return
        try:
            # Never through a link that a folder from elsewhere may bring along.
            self.path.unlink(missing_ok=True)
            with open(self.path, "xb") as file:
                allocate(file.fileno(), self.size)
        except OSError:
            self.release()
            raise

    def release(self) -> bool:
        """Give the space back. True where there was some."""
        was = self.held > 0
        with contextlib.suppress(OSError):
            self.path.unlink(missing_ok=True)
        return was


def allocate(descriptor: int, size: int) -> None:
    """Give an open, empty file `size` bytes of blocks of its own; OSError where they are not to be had."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, size)
        return
    for start in range(0, size, _CHUNK):
        os.write(descriptor, b"\x5a" * min(_CHUNK, size - start))


def room_for(folder: Path, wanted: int) -> int:
    """How many of `wanted` bytes this user may really take in `folder`: found by taking them for a moment.

    `statvfs` knows no user's quota. Blocks are allocated by `fallocate` and given back at once; nothing is written. Where that
    cannot be asked (no such call, or not on this file system), `wanted` is the answer.
    """
    fallocate = _fallocate()
    if fallocate is None or wanted <= 0:
        return wanted
    with contextlib.suppress(OSError), _unnamed_file(folder) as descriptor:
        if _fits(fallocate, descriptor, wanted):
            return wanted
        low, high = 0, wanted
        while high - low > wanted // 256:
            middle = (low + high) // 2
            low, high = (middle, high) if _fits(fallocate, descriptor, middle) else (low, middle)
        return low
    return wanted


def _fits(fallocate: object, descriptor: int, size: int) -> bool:
    """False only where a full disk or a quota says no."""
    import ctypes

    # posix_fallocate would write every block where the file system cannot allocate: this call says no instead.
    failed = fallocate(descriptor, 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0  # type: ignore[operator]
    cause = ctypes.get_errno() if failed else 0
    os.ftruncate(descriptor, 0)
    return cause not in (errno.ENOSPC, errno.EDQUOT)


def _fallocate() -> object | None:
    import ctypes
    import sys

    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None)


@contextlib.contextmanager
def _unnamed_file(folder: Path) -> Iterator[int]:
    path = folder / ".room"
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        # Without a name a kill leaves nothing behind.
        path.unlink()
        yield descriptor
    finally:
        os.close(descriptor)
