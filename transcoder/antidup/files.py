"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path


def replace_files(writers: Mapping[Path, Callable[[Path], None]]) -> None:
    """Write every file under a temporary name, then move all into place.

    Nothing is moved unless everything was written; whatever goes wrong (a full disk raises OSError), the
    temporary files are removed and the error goes on to the caller.

    Args:
        writers: for each path a function that writes the content to the path it is given.
    """
    temporaries = {path: path.with_name(path.name + ".tmp") for path in writers}
    try:
        for path, write in writers.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            write(temporaries[path])
        for path, temporary in temporaries.items():
            os.replace(temporary, path)
    finally:
        for temporary in temporaries.values():
            temporary.unlink(missing_ok=True)


def replace_text(path: Path, text: str) -> None:
    """`replace_files` of one UTF-8 text."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    replace_files({path: write})
