"""The text that every Python installation carries: the source files of its own standard library.

The documents come in a fixed order that is shuffled by a hash of the file name, so that neighbours are not
from one package, and each file name belongs to the ``train`` or to the ``heldout`` split by another hash.
Both depend on the relative path alone: a file is in the same split on Python 3.10 and on 3.13, and a model
trained on one version's ``train`` split never saw a file of a ``heldout`` name. (Text may still move between
files from one Python version to the next: the split is by name.)
"""

from __future__ import annotations

import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

__all__ = ["HELDOUT_FRACTION", "Document", "Split", "count_skipped", "document_split", "iter_documents", "source_files"]

Split = Literal["train", "heldout"]

HELDOUT_FRACTION = 0.05
"""Share of the file names (not of the bytes) that is held out."""

# Tests are left out because installations differ in whether they ship them; a folder of one of these names is
# skipped at any depth, which covers idlelib/idle_test and lib2to3/tests too.
_EXCLUDED_FOLDERS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__", "lib-dynload"}
)
# Generated when Python is built: they hold the paths and compiler flags of one machine, not library source.
_GENERATED_PREFIXES = ("_sysconfigdata", "config-")


@dataclass(frozen=True)
class Document:
    """One source file.

    Attributes:
        name: path relative to the standard library folder, with forward slashes.
        text: the whole file, with line ends as ``\\n`` and without a byte order mark; never blank.
    """

    name: str
    text: str


def iter_documents(split: Split | None, start: int = 0) -> Iterator[Document]:
    """Yield the standard library's source files in a fixed order, reading each only when it is due.

    Args:
        split: ``"train"``, ``"heldout"`` (about 5 % of the files), or None for both.
        start: number of documents to leave out at the beginning, so that
            ``iter_documents(split, start=n)`` goes on where a reader of ``n`` documents stopped.

    Raises:
        FileNotFoundError: this Python was installed without the sources of its standard library.
    """
    if split not in ("train", "heldout", None):
        raise ValueError(f"split must be 'train', 'heldout' or None, got {split!r}")
    if start < 0:
        raise ValueError(f"start must not be negative, got {start}")
    root = _stdlib_root()
    names = _names(root)
    if not names:
        raise FileNotFoundError(
            f"no source files of the standard library in {root}: this Python was installed without them "
            "(as a zip or as compiled files); use another installation or another text"
        )
    return _iter_documents(root, [name for name in names if split in (None, document_split(name))], start)


def document_split(name: str) -> Split:
    """Return the split of a relative path; it depends on nothing but the path."""
    return "heldout" if _hash("split", name) < HELDOUT_FRACTION * 2**64 else "train"


def source_files(split: Split | None) -> list[tuple[str, Path]]:
    """(relative name, path) of a split's files in the order of `iter_documents`, those included that it skips."""
    root = _stdlib_root()
    return [(name, root / name) for name in _names(root) if split in (None, document_split(name))]


def count_skipped(split: Split | None = None) -> int:
    """Return how many files of a split are left out because they are not UTF-8."""
    return sum(_read(path) is None for _, path in source_files(split))


def _iter_documents(root: Path, names: list[str], start: int) -> Iterator[Document]:
    # Separate from iter_documents so that wrong arguments raise at the call and not at the first next().
    seen = 0
    for name in names:
        text = _read(root / name)
        if not text:  # not UTF-8 (None) or blank
            continue
        if seen >= start:
            yield Document(name, text)
        seen += 1


def _stdlib_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _names(root: Path) -> list[str]:
    names = []
    for folder, subfolders, files in os.walk(root):
        # Pruned in place, so that a large site-packages is never walked.
        subfolders[:] = [name for name in subfolders if not _is_excluded(name)]
        prefix = Path(folder).relative_to(root)
        names += [(prefix / name).as_posix() for name in files if name.endswith(".py") and not _is_excluded(name)]
    return sorted(names, key=lambda name: (_hash("order", name), name))


def _is_excluded(name: str) -> bool:
    """Tell whether a folder or file of this name, at any depth, is left out."""
    return name in _EXCLUDED_FOLDERS or name.startswith(_GENERATED_PREFIXES)


def _read(path: Path) -> str | None:
    """Return the text of a file, "" when it is blank, None when it is not UTF-8."""
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError:
        return None
    # Windows installs the same files with CRLF line ends.
    return text.replace("\r\n", "\n") if text.strip() else ""


def _hash(purpose: str, name: str) -> int:
    """Return 64 stable bits of a name; the purpose keeps the order and the split independent."""
    return int.from_bytes(hashlib.sha256(f"{purpose}\0{name}".encode()).digest()[:8], "big")
