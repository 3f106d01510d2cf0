"""What a data source's files are, cheaply: enough to notice that they changed between two runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

WHOLE_BYTES = 1 << 28
"""Files of together at most this size (256 MiB) are hashed whole, in well under a second."""
BLOCKS, BLOCK_BYTES = 16, 1 << 16


def files_digest(files: Iterable[tuple[str, Path]], whole_bytes: int = WHOLE_BYTES) -> str:
    """16 hexadecimal digits of (name, size, content) of each file.

    Where the files are larger than `whole_bytes` together, up to 16 blocks of 64 KiB stand for each one's content, spread
    evenly from its first byte to its last: a change between them that keeps the size is not seen then. Times and places
    are not looked at: a copy has the digest of its original.

    Raises:
        OSError: a file cannot be read.
    """
    sized = [(name, path, path.stat().st_size) for name, path in files]
    whole = sum(size for _, _, size in sized) <= whole_bytes
    digest = hashlib.blake2b(digest_size=8)
    for name, path, size in sized:
        digest.update(repr((name, size)).encode())
        last = max(0, size - BLOCK_BYTES)
        sampled = {last * i // (BLOCKS - 1) for i in range(BLOCKS)}
        with path.open("rb") as file:
            for start in range(0, size, BLOCK_BYTES) if whole else sorted(sampled):
                file.seek(start)
                digest.update(file.read(BLOCK_BYTES))
    return digest.hexdigest()
