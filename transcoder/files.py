"""Files that are whole or absent: written under a temporary name, brought to the disk (fsync), then renamed.

Everything in a run folder and in a cache is written through this module, except metrics.jsonl, which is appended to
(`reporting.jsonl` documents its guarantees), and the files of W&B and TensorBoard.

A crash leaves the old content and, at most, a temporary file `.writing_<name>.<process id>`; the next write of the same name
removes those whose process is gone.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

WRITING, REPLACED, DELETING = ".writing_", ".replaced_", ".deleting_"
"""Prefixes of temporary names: a file or folder being written, a folder being replaced, a folder being deleted."""
_CHUNK = 1 << 24


def local_path(path: str | Path, name: str = "path") -> Path:
    """A path that a user gave, with `~`, `~user` and `$VARIABLE` or `${VARIABLE}` expanded: a config has no shell to do it.

    A name that holds a literal `$` is kept where such a file or folder is there.

    Args:
        name: what an error calls it, such as the setting.

    Raises:
        ValueError: the environment has no such variable, or the machine no such user.
    """
    found = Path(os.path.expandvars(os.path.expanduser(path)))
    parts = found.parts
    if parts and parts[0].startswith("~") and not Path(parts[0]).exists():
        raise ValueError(f"{name}: {str(path)!r}: there is no home folder for {parts[0]!r}; write the path in full")
    for count, part in enumerate(parts, start=1):
        unset = re.search(r"\$(\w+|\{[^}]*\})", part, re.ASCII)
        if unset and not Path(*parts[:count]).exists():
            raise ValueError(
                f"{name}: {str(path)!r}: the environment has no variable {unset[0]}; set it, or write the path in full"
            )
    return found


def lfs_hint(path: Path) -> str:
    """What to do where `path` is only the pointer that Git LFS leaves in the place of a file; empty otherwise."""
    with path.open("rb") as file:
        pointer = file.read(24) == b"version https://git-lfs."
    return "; it is a pointer of Git LFS, not the file: run `git lfs pull` in its repository" if pointer else ""


class WrittenFile(NamedTuple):
    """Size and checksum of a file."""

    bytes: int
    sha256: str


def file_digest(path: Path) -> WrittenFile:
    """Size and sha256 of a file, read in pieces."""
    digest, count = hashlib.sha256(), 0
    with open(path, "rb") as file:
        while part := file.read(_CHUNK):
            digest.update(part)
            count += len(part)
    return WrittenFile(count, digest.hexdigest())


@contextlib.contextmanager
def replacing_all(*paths: Path) -> Iterator[list[BinaryIO]]:
    """New binary files that take the places of `paths` when the block ends. Missing folders are made.

    All of them are on the disk before the first is renamed, so an error in the block or in a write leaves the old files as
    they were and no temporary one.

    Raises:
        OSError: with the errno of the operation that failed.
    """
    temporaries = [path.with_name(f"{WRITING}{path.name}.{os.getpid()}") for path in paths]
    try:
        with contextlib.ExitStack() as stack:
            files: list[BinaryIO] = []
            for path, temporary in zip(paths, temporaries, strict=True):
                path.parent.mkdir(parents=True, exist_ok=True)
                _remove_leftovers(path)
                files.append(stack.enter_context(open(temporary, "wb")))
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        for path, temporary in zip(paths, temporaries, strict=True):
            os.replace(temporary, path)
    except BaseException:
        for temporary in temporaries:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        raise
    for folder in {path.parent for path in paths}:
        fsync(folder)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """`replacing_all` of one file."""
    with replacing_all(path) as (file,):
        yield file


def replace_atomically(path: Path, data: bytes | str) -> Path:
    """`replacing` with the whole content at hand. Text is UTF-8; lone surrogates, which UTF-8 cannot hold, become "?"."""
    with replacing(path) as file:
        file.write(data.encode("utf-8", errors="replace") if isinstance(data, str) else data)
    return path


def replace_lines(path: Path, step: int, lines: Iterable[Mapping[str, Any]]) -> None:
    """Make `lines`, each with its "step", the end of a JSONL file. Earlier lines stay; those of this step and later go, for a
    resumed run writes them again."""
    before = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in before if line.strip() and json.loads(line)["step"] < step]
    replace_atomically(path, "".join(f"{line}\n" for line in [*kept, *(json.dumps(dict(line)) for line in lines)]))


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """A new, empty folder that takes the place of `path`, with all that the block wrote into it on the disk, when the block
    ends; an error leaves `path` as it was and nothing else.

    A crash between the two renames leaves an earlier folder under the name `.replaced_<name>`.
    """
    temporary, replaced = path.with_name(WRITING + path.name), path.with_name(REPLACED + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        for made in [*temporary.rglob("*"), temporary]:
            fsync(made)
        if path.exists():
            # A rename cannot replace a folder with files in it.
            shutil.rmtree(replaced, ignore_errors=True)
            os.rename(path, replaced)
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync(path.parent)
    fsync(path.parent.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def remove_folder(folder: Path) -> None:
    """Delete a folder. It is renamed to a hidden name first, so that no reader finds it half deleted."""
    doomed = folder.with_name(DELETING + folder.name.lstrip("."))
    shutil.rmtree(doomed, ignore_errors=True)
    os.rename(folder, doomed)
    shutil.rmtree(doomed)


def fsync(path: Path) -> None:
    """Bring a file's content, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network and FUSE file systems cannot fsync a folder; the files' own fsync is done by then.
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(descriptor)


def process_is_alive(pid: int) -> bool:
    """Whether this machine has a process of this number."""
    try:
        # PermissionError: the process exists but belongs to another user.
        with contextlib.suppress(PermissionError):
            os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def _remove_leftovers(path: Path) -> None:
    """Temporary files of this name whose process was killed."""
    for leftover in path.parent.glob(f"{WRITING}{glob.escape(path.name)}.*"):
        pid = leftover.name.rpartition(".")[2]
        if pid.isdecimal() and not process_is_alive(int(pid)):
            with contextlib.suppress(OSError):
                leftover.unlink(missing_ok=True)


def read_json_object(path: Path, where: str = "") -> dict[str, Any]:
    """A file's JSON object. `where` begins the errors.

    Raises:
        FileNotFoundError: no such file.   ValueError: it is no JSON object.
    """
    named = f"{where}: {path}" if where else str(path)
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{named}: expected a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{named}: expected a JSON object, got {type(values).__name__}")
    return values
