"""Whether a process still works on a run folder, found without touching its lock."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

LOCK_FILE = ".lock"
LOCK_TABLE = Path("/proc/locks")


@dataclass(frozen=True)
class RunProcess:
    """`state` is "running"; "gone": it ran on this machine and holds the folder no more; "elsewhere": it ran on another
    machine, which cannot be seen from here; "unknown": nothing says who wrote the folder."""

    state: Literal["running", "gone", "elsewhere", "unknown"]
    pid: int | None = None
    host: str | None = None


def process_of(run_dir: Path) -> RunProcess:
    """Who holds the run folder's lock.

    The lock is never tried: for a moment that would hold it, and a run that starts in this moment would be refused. The
    kernel's own table says who holds it; where there is none, whether the process that the lock names is alive.
    """
    path = Path(run_dir) / LOCK_FILE
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        pid, host = int(owner["pid"]), str(owner["host"])
        inode = path.stat().st_ino
    except (OSError, ValueError, KeyError, TypeError):
        return RunProcess("unknown")
    if host != socket.gethostname():
        return RunProcess("elsewhere", pid, host)
    held = _held(inode, pid)
    if held is None:
        held = _alive(pid)
    return RunProcess("running" if held else "gone", pid, host)


def _held(inode: int, pid: int) -> bool | None:
    """Whether process `pid` holds a flock on the file `inode`; None where the kernel has no table of locks."""
    try:
        lines = LOCK_TABLE.read_text().splitlines()
    except OSError:
        return None
    # "3: FLOCK  ADVISORY  WRITE 14132 fe:00:1183 0 EOF"; the device is left out: overlays and network disks name others there.
    for words in (line.split() for line in lines):
        if len(words) >= 6 and words[1] == "FLOCK" and words[4] == str(pid) and words[5].endswith(f":{inode}"):
            return True
    return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        # Another user's process is a process.
        return True
    return True
