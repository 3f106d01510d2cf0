"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any


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


def replace_lines(path: Path, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Make `lines`, each with its "step", the end of a JSONL file. Earlier lines stay; those of this step and later go, for a
    resumed run writes them again."""
    kept = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            if line.strip() and json.loads(line)["step"] < step:
                kept.append(line)
    replace_text(path, "".join(f"{line}\n" for line in [*kept, *(json.dumps(dict(line)) for line in lines)]))
