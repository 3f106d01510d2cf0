"""Reading foreign files safely, and writing a folder whole or not at all."""

from __future__ import annotations

import contextlib
import json
import pickle
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.files import file_digest, replacing_folder
from transcoder.interop.conversion_record import RECORD_FILE, Conversion
from transcoder.tensor_file import read_tensors, write_tensors


def existing(where: str, path: Path, what: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{where}: expected {what} at {path}, found none")
    return path


def read_json(where: str, path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.   ValueError: it is no JSON object.
    """
    existing(where, path, path.name)
    try:
        values = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: {path}: expected a JSON object: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {path}: expected a JSON object, got {type(values).__name__}")
    return values


def read_safetensors(where: str, path: Path) -> dict[str, Tensor]:
    existing(where, path, path.name)
    try:
        return read_tensors(path)
    except ValueError as error:
        raise ValueError(f"{where}: {path} cannot be read: {error}. A torn download? Fetch it again") from error


def read_pickle(where: str, path: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """The state dict of a `torch.save` file. Nothing in it can run code unless `allow_pickle` is set.

    Raises:
        FileNotFoundError: no such file.   ValueError: torn, no state dict, or a full pickle without `allow_pickle`.
    """
    existing(where, path, path.name)
    try:
        values = torch.load(path, map_location="cpu", weights_only=not allow_pickle)
    except pickle.UnpicklingError as error:
        if "weights_only" not in str(error) and "Weights only" not in str(error):
            raise ValueError(f"{where}: {path} is not a file that torch.save wrote, or a torn one: {error}") from error
        raise ValueError(
            f"{where}: {path} holds Python objects besides tensors, and loading them can run any code. Expected a state dict "
            "(torch.save(model.state_dict())). If you trust its author: allow_pickle=True (--allow-pickle)"
        ) from error
    except (RuntimeError, EOFError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where}: {path} is not a file that torch.save wrote, or a torn one: {error}") from error
    if isinstance(values, torch.nn.Module):
        values = values.state_dict()
    if not isinstance(values, Mapping):
        raise ValueError(f"{where}: {path}: expected a state dict, got {type(values).__name__}")
    return dict(values)


@contextlib.contextmanager
def new_folder(where: str, out: Path, record: Conversion) -> Iterator[Path]:
    """A folder to write into that becomes `out`, with its conversion.json, when the block ends; nothing is left on an error.

    Raises:
        FileExistsError: `out` is a file or a folder with something in it.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        what = "is a file" if not out.is_dir() else "is not empty"
        raise FileExistsError(f"{where}: {out} {what}; choose another place to write to (--out)")
    with replacing_folder(out) as folder:
        yield folder
        record.files = {
            str(path.relative_to(folder)): file_digest(path).sha256
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        }
        (folder / RECORD_FILE).write_bytes(record.to_json().encode())


def write_safetensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with open(path, "wb") as file:
        write_tensors(file, tensors)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_bytes(json.dumps(values, indent=1).encode())


def write_state_dict(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """What `torch.save(module.state_dict())` writes: tensors only, so `torch.load(weights_only=True)` reads it."""
    # A view would drag its whole storage into the file.
    torch.save({name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, path)
