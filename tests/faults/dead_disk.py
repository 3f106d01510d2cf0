"""A folder whose disk is gone: nothing in it can be listed, read or even asked after."""

from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def lost(folder: Path) -> Iterator[bool]:
    """Meanwhile every look into `folder` fails: by a FUSE mount over it whose server is gone (ENOTCONN, as of a network disk)
    or, where mounting is not permitted, by its permissions. Gives False where neither works."""
    if _dead_mount(folder):
        try:
            yield True
        finally:
            subprocess.run(["umount", "-l", str(folder)], check=True)
        return
    folder.chmod(0)
    try:
        yield not os.access(folder, os.X_OK)
    finally:
        folder.chmod(0o700)


def _dead_mount(folder: Path) -> bool:
    try:
        server = os.open("/dev/fuse", os.O_RDWR)
    except OSError:
        return False
    options = f"fd={server},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    done = ctypes.CDLL(None).mount(b"gone", os.fsencode(folder), b"fuse", ctypes.c_ulong(0), options) == 0
    os.close(server)
    return done
