"""The folder of a saved transcoder: reading and writing weights and config. Errors name the file."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.checkpoint_folder import candidates
from transcoder.files import lfs_hint, local_path, read_json_object, replacing_all
from transcoder.settings import brief
from transcoder.tensor_file import write_tensors

WEIGHTS_FILE = "transcoder.safetensors"
CONFIG_FILE = "config.json"
CHECKPOINT_STATE_FILE = "state.json"
FORMAT, VERSION = "transcoder", 1
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def local_folder(name: str | Path, revision: str | None = None) -> Path:
    """The folder of a saved transcoder: `name` itself, or the files of the hub's `org/name`, fetched into the hub's cache.

    A string `org/name` means the hub if neither that folder nor its parent `org` exists, and always if `revision` is given.

    Raises:
        FileNotFoundError: the hub has no such repository or revision, or cannot be reached and the cache has none.
    """
    path = local_path(name)
    if path.name == WEIGHTS_FILE and path.is_file():
        path = path.parent
    hub = isinstance(name, str) and _HUB_NAME.fullmatch(name) is not None
    if revision is not None and not hub:
        raise ValueError(f"revision: expected a hub name org/name with it, got {str(name)!r}")
    if not hub or (revision is None and (path.is_dir() or path.parent.is_dir())):
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise FileNotFoundError(f"{name}: no such folder here; for the hub: pip install huggingface_hub") from error
    try:
        return Path(snapshot_download(str(name), revision=revision, allow_patterns=[WEIGHTS_FILE, CONFIG_FILE]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"{name}: no such folder here, and the hub did not give it: {brief(error)}") from error


def write_pair(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write weights and config; a failed write leaves the old pair and nothing else.

    Raises:
        OSError: the folder cannot be made or written.
    """
    with replacing_all(folder / WEIGHTS_FILE, folder / CONFIG_FILE) as (weights, text):
        write_tensors(weights, tensors)
        text.write(json.dumps({"format": FORMAT, "version": VERSION, **config}, indent=2).encode())


def read_config(folder: Path) -> tuple[Path, dict[str, Any]]:
    """(file, its transcoder config) from config.json, or from the state of a run's checkpoint.

    Raises:
        FileNotFoundError: neither is there.  ValueError: it is not a JSON object of the expected form.
    """
    path = folder / CONFIG_FILE
    if path.is_file():
        values = read_json_object(path)
        if values.pop("format", None) != FORMAT or values.pop("version", None) != VERSION:
            raise ValueError(
                f"{path}: not a transcoder config of version {VERSION}; of another library: transcoder import FORMAT PATH"
            )
        return path, values
    path = folder / CHECKPOINT_STATE_FILE
    if path.is_file():
        summary = read_json_object(path).get("summary")
        found = summary.get("transcoder") if isinstance(summary, dict) else None
        if not isinstance(found, dict):
            raise ValueError(f"{path}: expected a checkpoint's state with summary.transcoder, an object; found none")
        return path, found
    checkpoints = candidates([folder / "checkpoints", folder])
    foreign = "; weights of another library: transcoder import FORMAT PATH --out DIR" if any(folder.glob("*")) else ""
    hint = (
        f"; it is a run's folder: give a checkpoint of it, the newest is {checkpoints[0][1]}"
        if checkpoints
        else foreign
    )
    raise FileNotFoundError(f"expected {CONFIG_FILE} or a checkpoint's {CHECKPOINT_STATE_FILE} in {folder}{hint}")


def read_weights(folder: Path, expected: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> dict[str, Tensor]:
    """The tensors of the weight file, on the CPU; `expected` is {name: (shape, dtype)}.

    A floating tensor may have any floating dtype; other tensors must have exactly the expected dtype.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is torn, no safetensors file, or holds other names, shapes or kinds.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    path = folder / WEIGHTS_FILE
    if not path.is_file():
        raise FileNotFoundError(f"expected {WEIGHTS_FILE} in {folder}, found none")
    try:
        tensors = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{path}: not a safetensors file, or a torn one: {brief(error)}{lfs_hint(path)}") from error
    check_tensors(str(path), tensors, {name: shape for name, (shape, _) in expected.items()})
    for name, (_, dtype) in expected.items():
        tensor = tensors[name]
        if not (tensor.dtype == dtype or (tensor.is_floating_point() and dtype.is_floating_point)):
            wanted = "a floating dtype" if dtype.is_floating_point else str(dtype).removeprefix("torch.")
            raise ValueError(f"{path}: {name}: expected {wanted}, got {str(tensor.dtype).removeprefix('torch.')}")
    return tensors


def check_tensors(where: str, tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """ValueError unless `tensors` has exactly these names and shapes."""
    missing, others = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or others:
        raise ValueError(
            f"{where}: expected the tensors of a transcoder of this config; missing: {', '.join(missing) or 'none'}, "
            f"not expected: {', '.join(others) or 'none'}"
        )
    for name, shape in expected.items():
        if tuple(tensors[name].shape) != shape:
            raise ValueError(f"{where}: {name}: expected shape {list(shape)}, got {list(tensors[name].shape)}")
