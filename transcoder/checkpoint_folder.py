"""Finding and verifying the checkpoint folders of a run. `training.checkpoint` writes them."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from transcoder.files import WrittenFile, file_digest, local_path

FORMAT, VERSION = "transcoder-checkpoint", 1
MODEL_FILE, TRAINER_FILE, STATE_FILE = "transcoder.safetensors", "trainer.safetensors", "state.json"
FOLDER = re.compile(r"(?:\.replaced_)?step_(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, or none can be read. The message names folders, causes and what to do."""


def verify_checkpoint(path: Path | str) -> int:
    """Check sizes and checksums of one checkpoint folder. Returns its step.

    Raises: ValueError naming a file that is missing, torn or corrupted. CheckpointError where a newer version wrote it.
    OSError.
    """
    path = local_path(path)
    state = read_state(path)
    for name, expected in state["files"].items():
        if (found := file_digest(path / name)) != expected:
            raise ValueError(f"{path.name}/{name}: expected {expected}, got {found}")
    return int(state["step"])


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder that `path` means: itself, or the newest good one of a run folder.

    Raises:
        FileNotFoundError: no such folder, or no checkpoint in it.
        CheckpointError: there are checkpoints, but none of them verifies.
    """
    path = local_path(path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a run folder or a checkpoint folder, there is no such folder")
    if (path / STATE_FILE).is_file():
        return path

    def verified(folder: Path) -> Path:
        verify_checkpoint(folder)
        return folder

    found = newest(candidates([path / "checkpoints", path]), verified)
    if found is None:
        raise FileNotFoundError(f"{path}: expected a run folder or a checkpoint folder, found no checkpoint in it")
    return found


def candidates(places: Iterable[Path]) -> list[tuple[int, Path]]:
    """(step, folder) of every folder with a checkpoint's name, newest first."""
    found = []
    for place in places:
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            for folder in place.iterdir():
                match = FOLDER.fullmatch(folder.name)
                if match and folder.is_dir():
                    found.append((int(match[1]), folder))
    # Of the same step, a folder with its final name comes before one that was being replaced.
    return sorted(found, key=lambda item: (-item[0], item[1].name.startswith("."), str(item[1])))


def content_digest(body: dict[str, Any]) -> str:
    """Checksum of the content of state.json, which is stored in the file itself."""
    return hashlib.sha256(json.dumps(body, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_state(path: Path) -> dict[str, Any]:
    """state.json, its own checksum verified; `files` as `WrittenFile`s."""
    try:
        body = json.loads((path / STATE_FILE).read_bytes())
        written = body.pop("sha256")
        known = body["format"] == FORMAT
    except FileNotFoundError:
        raise ValueError(f"{path}: {STATE_FILE} is missing") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{path}: {STATE_FILE} is torn or corrupted: {error!r}") from error
    if not known or written != content_digest(body):
        raise ValueError(f"{path}: {STATE_FILE} is corrupted: its checksum does not match its content")
    if body["version"] not in range(1, VERSION + 1):
        raise CheckpointError(
            f"{path}: written in checkpoint format {body['version']!r}, this version reads 1 to {VERSION}: "
            "pip install --upgrade sparse-transcoders reads newer ones"
        )
    try:
        body["files"] = {name: WrittenFile(**body["files"][name]) for name in (MODEL_FILE, TRAINER_FILE)}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path}: {STATE_FILE} does not name its files: {error!r}") from error
    return dict(body)


def newest(found: list[tuple[int, Path]], read: Callable[[Path], Any]) -> Any:
    """The result of `read` for the first of `found` that it can read; None if `found` is empty. A folder that it refuses
    (ValueError, OSError) is skipped with a warning; CheckpointError if it refuses them all."""
    problems = []
    for _, folder in found:
        try:
            return read(folder)
        except (ValueError, OSError) as error:
            problems.append(str(error))
            warnings.warn(f"checkpoint {folder} is not usable, trying the one before it: {error}", stacklevel=3)
    if problems:
        raise CheckpointError(
            f"none of {len(problems)} checkpoints can be used: {'; '.join(problems)}. "
            "Start again with another --out, or restore one of them"
        )
    return None
