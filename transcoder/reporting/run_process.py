"""Whether a process still works on a run folder, found without touching its lock."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from transcoder.files import process_is_alive

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
        found = path.stat()
    except OSError:
        return RunProcess("unknown")
    here, table = socket.gethostname(), _locks(found)
    try:
        owner = json.loads(path.read_text(encoding="utf-8"))
        pid, host = int(owner["pid"]), str(owner["host"])
    except (OSError, ValueError, KeyError, TypeError):
        # On a full disk the lock holds, and only the name of its owner is missing.
        holder = next((p for p, same_device in table or () if same_device), None)
        return RunProcess("unknown") if holder is None else RunProcess("running", holder, here)
    if host != here:
        return RunProcess("elsewhere", pid, host)
    held = process_is_alive(pid) if table is None else any(p == pid or same_device for p, same_device in table)
    return RunProcess("running" if held else "gone", pid, host)


def _locks(found: os.stat_result) -> list[tuple[int, bool]] | None:
    """(process, whether the device is the file's too) of every flock on a file of this number; None where the kernel has no
    table of locks. Overlays and network disks give the table another device than the file has."""
    try:
        lines = LOCK_TABLE.read_text().splitlines()
    except OSError:
        return None
    device = f"{os.major(found.st_dev):02x}:{os.minor(found.st_dev):02x}"
    holders = []
    # "3: FLOCK  ADVISORY  WRITE 14132 fe:00:1183 0 EOF"
    for words in (line.split() for line in lines):
        if len(words) >= 6 and words[1] == "FLOCK" and words[4].isdecimal():
            at, _, inode = words[5].rpartition(":")
            if inode == str(found.st_ino):
                holders.append((int(words[4]), at == device))
    return holders
