"""The start of a run in its folder: locked for one process; a start that fails leaves no trace."""

from __future__ import annotations

import contextlib
from pathlib import Path
from types import TracebackType

from transcoder.training.disk_reserve import RESERVE_NAME
from transcoder.training.storage import FolderLock

MADE = ("config.yaml", "metrics.jsonl", ".run_id", RESERVE_NAME)
"""What a start can leave in the folder, besides the lock, before training begins."""


class RunStart(contextlib.AbstractContextManager["RunStart"]):
    """Holds the folder's lock. When the block raises before `begun`, what this start made is removed: the files of `MADE`, the
    lock file, and the folders that were not there before and are empty.

    Raises:
        RunLockedError: another process holds the folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self._new_folders = [folder for folder in (run_dir, *run_dir.parents) if not folder.exists()]
        self._new_files = [run_dir / name for name in MADE if not (run_dir / name).exists()]
        self._begun = False
        self._lock = FolderLock(run_dir)

    def begun(self) -> None:
        """From here on the folder holds a run."""
        self._begun = True

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None or self._begun:
            self._lock.release()
            return
        for file in self._new_files:
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)
        self._lock.discard()
        for folder in self._new_folders:
            with contextlib.suppress(OSError):
                folder.rmdir()
