"""A run in its folder: locked for one process; a start that fails leaves no trace."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import time
import warnings
from pathlib import Path

from transcoder.training.disk_space import RESERVE_NAME

LOCK_NAME = ".lock"
MADE = ("config.yaml", "metrics.jsonl", ".run_id", RESERVE_NAME, LOCK_NAME)
"""What a start can leave in the folder before training begins."""


class RunLockedError(RuntimeError):
    """Another process is writing this run folder. The message names its process id and host."""


class FolderLock(contextlib.AbstractContextManager["FolderLock"]):
    """Exclusive use of a run folder, held until `release` or the end of the process, however it ends.

    A `with` block that raises before `begun` is set is a start that failed: what it made is removed (`discard`). The lock is
    `flock` on `<folder>/.lock` (by filelock), so a killed run leaves none; the file's content (process id, host, start time) is
    for the message of a run that is refused, and for `transcoder watch`.

    Raises:
        RunLockedError: another process holds the folder.
    """

    def __init__(self, folder: Path) -> None:
        from filelock import FileLock, Timeout

        self.path = folder / LOCK_NAME
        self.begun = False
        """The folder holds a run from here on."""
        self._new_folders = [place for place in (folder, *folder.parents) if not place.exists()]
        self._new_files = [folder / name for name in MADE if not (folder / name).exists()]
        folder.mkdir(parents=True, exist_ok=True)
        # A second try: the holder may discard its file between our opening and our locking it. Soft locks outlive a kill.
        self._lock = FileLock(self.path, timeout=0.1, poll_interval=0.05, thread_local=False, fallback_to_soft=False)
        try:
            self._lock.acquire()
        except Timeout:
            raise RunLockedError(
                f"run folder {folder}: in use by {_owner(self.path)}; "
                "wait for it, stop it, or choose another folder with --out"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
            warnings.warn(f"{self.path}: no locks here ({error}); two runs in one folder would clash", stacklevel=2)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        # On a full disk the lock still holds; only the owner's name is missing from the refusal.
        with contextlib.suppress(OSError):
            self.path.write_text(json.dumps(owner), encoding="utf-8")

    def release(self) -> None:
        """Give the folder free. The lock file stays."""
        self._lock.release(force=True)

    def discard(self) -> None:
        """Give the folder free without a trace: the files of `MADE` and the folders that were not there before go, if empty."""
        # The lock file goes while it is held: a process that has opened it meanwhile finds that it is no longer the folder's.
        for file in self._new_files:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        self.release()
        for folder in self._new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or self.begun:
            self.release()
        else:
            self.discard()


def _owner(path: Path) -> str:
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        return f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"
