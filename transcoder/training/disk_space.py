"""Disk space of a run: what it needs, refused before it starts where that cannot fit, and what is held for its last state."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import math
import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

from transcoder.checkpoint_folder import CheckpointError
from transcoder.config import CheckpointSection, RunConfig

RESERVE_NAME = ".reserve"
CHECKPOINT_SLACK = 64 * 1024
"""Room for a checkpoint's folder and for blocks that are not full."""
LINE_BYTES = 4096
"""A line of metrics.jsonl: the demo's have 2 KB."""
PAIR_BYTES = 512
"""A pair in a correlation report: the demo's take a fifth of this."""
PAGES = 16 << 20
"""report.html, usage.json, summary.json and a report's metrics besides its pairs."""
_CHUNK = 1 << 20
_CHEAPER: tuple[tuple[str, Any, str], ...] = (
    ("keep_every", None, "null"),
    ("keep_best", False, "false"),
    ("keep_last", 1, "1"),
)
"""Settings that take less room, the least missed first, and how a flag spells them."""


def human_bytes(count: int) -> str:
    """`1,234,567 bytes (1.2 MiB)`: exact for a script, short for a person."""
    size, unit = float(count), "bytes"
    for unit in ("bytes", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{count:,} bytes" if unit == "bytes" else f"{count:,} bytes ({size:.1f} {unit})"


# -- what is needed ---------------------------------------------------------------------------------------------------


def log_bytes(config: RunConfig, samples_at_most: int) -> int:
    """Upper bound of all files but the checkpoints: the log, once more for each further sink, reports, and twice the bytes of
    the samples' state: their new file is written before the old one goes."""
    steps, anti = config.training.steps, config.antidup
    lines = 2 + steps // config.logging.every + steps // max(1, config.training.evaluation_every or steps)
    sinks = 1 + (config.logging.wandb != "off") + config.logging.tensorboard
    reports = (2 + steps // anti.monitor.correlation_save_frequency) * (1 + anti.monitor.max_reported_pairs)
    return (
        min(lines * LINE_BYTES, config.logging.max_megabytes << 20) * sinks
        + (reports * PAIR_BYTES if anti.monitor.enabled else 0)
        + 2 * samples_at_most
        + PAGES
    )


def checkpoint_bytes(section: CheckpointSection, each: int, steps: int) -> int:
    """Upper bound of the checkpoints of a run of `steps`: those kept and the one being written, `each` bytes."""
    saves = math.ceil(steps / section.every)
    kept = section.keep_last + int(section.keep_best)
    if section.keep_every is not None:
        kept += steps // math.lcm(section.every, section.keep_every)
    return min(saves, kept + 1) * (each + CHECKPOINT_SLACK)


def refuse_what_cannot_fit(
    folder: Path, section: CheckpointSection, each: int, steps: int, others: int, free: int
) -> None:
    """CheckpointError where checkpoints of `each` bytes and `others`, the bytes of all other files, need more than `free`."""

    def needed(section: CheckpointSection) -> int:
        return checkpoint_bytes(section, each, steps) + others

    if needed(section) <= free:
        return
    message = (
        f"{folder}: checkpoints ({human_bytes(checkpoint_bytes(section, each, steps))}) and the run's other files "
        f"({human_bytes(others)}) need {human_bytes(needed(section))}, free are {human_bytes(free)}. "
    )
    flags = ""
    for name, value, text in _CHEAPER:
        if getattr(section, name) != value:
            section = dataclasses.replace(section, **{name: value})
            flags += f" --checkpoint.{name} {text}"
            if needed(section) <= free:
                raise CheckpointError(f"{message}This would fit:{flags} (needs {human_bytes(needed(section))})")
    share = math.floor(100 * max(free - 2 * CHECKPOINT_SLACK, 0) / needed(section))
    raise CheckpointError(
        f"{message}The least is {human_bytes(needed(section))}{flags and ' with' + flags}: choose --out on another disk, free "
        f"space, or a smaller transcoder.d_sae (about {share} % of the present one fits)"
    )


# -- what is free -----------------------------------------------------------------------------------------------------


def free_bytes(folder: Path) -> int:
    """Bytes that this user may still write on the file system of `folder` (its nearest existing parent)."""
    place = folder.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free


def room_for(folder: Path, wanted: int) -> int:
    """How many of `wanted` bytes this user can really take in `folder`: found by taking them for a moment.

    `statvfs` knows no quota of a user. Blocks are allocated (`fallocate`) and given back at once; nothing is written. Where
    the system or the file system has no such call, `wanted` is the answer.
    """
    # Not posix_fallocate: where the file system cannot allocate, it writes every block, and this call fails instead.
    fallocate = getattr(ctypes.CDLL(None, use_errno=True), "fallocate64", None) if sys.platform == "linux" else None
    if fallocate is None or wanted <= 0:
        return wanted
    with contextlib.suppress(OSError), tempfile.TemporaryFile(dir=folder) as file:

        def fits(size: int) -> bool:
            failed = fallocate(file.fileno(), 0, ctypes.c_int64(0), ctypes.c_int64(size)) != 0
            cause = ctypes.get_errno() if failed else 0
            os.ftruncate(file.fileno(), 0)
            return cause not in (errno.ENOSPC, errno.EDQUOT)

        if fits(wanted):
            return wanted
        low, high = 0, wanted
        while high - low > wanted // 256:
            middle = (low + high) // 2
            low, high = (middle, high) if fits(middle) else (low, middle)
        return low
    return wanted


# -- what is held -----------------------------------------------------------------------------------------------------


class Reserve:
    """A file `.reserve` of `size` bytes in the run's folder: space that no other process can take.

    Its blocks are allocated (`posix_fallocate`): a sparse file would reserve nothing, and a quota is met here and not at the
    end of a run. File systems that compress or copy on write (btrfs, ZFS) may need further blocks for a later write all the
    same. A size of 0 holds nothing.
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
        # Blocks of 512 bytes, as POSIX counts them; a platform that does not count them is believed.
        return min(found.st_size, getattr(found, "st_blocks", found.st_size // 512 + 1) * 512)

    def make(self) -> None:
        """Allocate it, unless it is there. OSError where it does not fit, or a quota forbids it; nothing is left behind."""
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
