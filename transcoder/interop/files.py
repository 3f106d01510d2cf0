"""Reading foreign files safely, and writing a folder whole or not at all."""

from __future__ import annotations

import contextlib
import json
import pickle
import re
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.files import file_digest, lfs_hint, read_json_object, replacing_folder
from transcoder.interop.conversion_record import RECORD_FILE, Conversion
from transcoder.tensor_file import read_tensors, write_tensors


def existing(where: str, path: Path, what: str) -> Path:
    if not path.is_file():
        raise FileNotFoundError(f"{where}: expected {what} at {path}, found none")
    return path


def locate(where: str, path: Path, names: Sequence[str]) -> Path:
    """The file of one of these `names` (patterns; of several the one with the highest number): `path` itself where it is a
    file, else in that folder, or in the only folder below it that has one.

    Raises:
        FileNotFoundError: there is none.   ValueError: several folders below have one; they are named.
    """
    if path.is_file():
        return path
    for name in names:
        here = [file for file in path.glob(name) if file.is_file()]
        if here:
            return max(here, key=lambda file: (len(file.name), file.name))
    # As deep as layer_L/width_N/average_l0_N below a folder of repositories.
    found = {file.parent for depth in range(1, 5) for name in names for file in path.glob("*/" * depth + name)}
    found = {folder for folder in found if found.isdisjoint(folder.parents)}
    if len(found) == 1:
        return locate(where, found.pop(), names)
    what = " or ".join(names)
    if not found:
        raise FileNotFoundError(f"{where}: expected {what} in {path}, found none")
    raise ValueError(f"{where}: {path} has no {what} itself, but {listed(found, path)} have: give one of these folders")


def listed(paths: Iterable[Path], below: Path) -> str:
    """Up to 12 of the paths, in the order of the numbers in them, relative to `below`."""
    names = [str(path.relative_to(below)) for path in paths]
    names.sort(key=lambda name: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)])
    return ", ".join(names[:12]) + f" and {len(names) - 12} more" * (len(names) > 12)


def read_json(where: str, path: Path) -> dict[str, Any]:
    """A JSON object.

    Raises:
        FileNotFoundError: no such file.   ValueError: it is no JSON object.
    """
    return read_json_object(existing(where, path, path.name), where)


def read_safetensors(where: str, path: Path) -> dict[str, Tensor]:
    existing(where, path, path.name)
    try:
        return read_tensors(path)
    except ValueError as error:
        todo = lfs_hint(path) or ". A torn download? Fetch it again"
        raise ValueError(f"{where}: {path} cannot be read: {error}{todo}") from error


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


def read_state(where: str, path: Path, allow_pickle: bool = False) -> dict[str, Any]:
    """The tensors of a .safetensors file, or of a `torch.save` file as `read_pickle` has them."""
    return read_safetensors(where, path) if path.suffix == ".safetensors" else read_pickle(where, path, allow_pickle)


def unwrapped(state: dict[str, Any]) -> dict[str, Any]:
    """The state dict inside what a training script saved next to its optimizer."""
    for key in ("model_state_dict", "state_dict", "ae", "sae", "model"):
        if isinstance(inner := state.get(key), Mapping):
            return dict(inner)
    return state


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
