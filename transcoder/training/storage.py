"""Free space, and the run folder's lock."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import socket
import time
import warnings
from pathlib import Path
from types import TracebackType

LOCK_NAME = ".lock"


class RunLockedError(RuntimeError):
    """Another process is writing this run folder. The message names its process id and host."""


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the file system of `folder` (its nearest existing parent)."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def human_bytes(count: int) -> str:
    """`1,234,567 bytes (1.2 MiB)`: exact for a script, short for a person."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count:,} bytes" if unit == "bytes" else f"{count:,} bytes ({size:.1f} {unit})"


class FolderLock(contextlib.AbstractContextManager["FolderLock"]):
    """Exclusive use of a run folder, held until `release` or the end of the process, however it ends.

    The lock is `flock` on `<folder>/.lock`, so a killed run never leaves a stale one; the file's content
    (process id, host, start time) only serves the message of the run that is refused.

    Raises:
        RunLockedError: another process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / LOCK_NAME
        self._descriptor: int | None = None
        self._was_there = self.path.exists()
        while self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._take()
                if not self._is_current():
                    # Discarded by its owner between our opening and our locking it: this lock locks nobody out.
                    self.release()
            except BaseException:
                self.release()
                raise

    def _is_current(self) -> bool:
        assert self._descriptor is not None
        try:
            return os.path.samestat(os.fstat(self._descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _take(self) -> None:
        assert self._descriptor is not None
        try:
            import fcntl
        except ImportError:
            warnings.warn("this platform has no flock: two runs in one folder would not be noticed", stacklevel=3)
            return
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunLockedError(
                f"run folder {self.path.parent}: in use by {_owner(self.path)}; "
                "wait for it, stop it, or choose another folder with --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            warnings.warn(
                f"{self.path}: this file system has no locks ({error}); two runs here would clash",
                stacklevel=3,
            )
        owner = {
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "since": time.strftime("%Y-%m-%d %H:%M:%S"),
        }
        # On a full disk the lock still holds; only the owner's name is missing from the refusal.
        with contextlib.suppress(OSError):
            os.ftruncate(self._descriptor, 0)
            os.pwrite(self._descriptor, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Give the folder free. The lock file stays."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def discard(self) -> None:
        """Give the folder free without a trace: the lock file goes too, if this lock made it."""
        if self._descriptor is not None and not self._was_there:
            # While it is still held: whoever opened it meanwhile finds that it is not the folder's any more.
            with contextlib.suppress(OSError):
                self.path.unlink(missing_ok=True)
        self.release()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
