"""Safetensors files, written one tensor at a time with a checksum, read back from verified bytes.

The format is written here because the safetensors library hides the errno of a failed write, wants every
tensor in host memory at once, and refuses tensors that share storage; reading goes through the library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from transcoder.files import WrittenFile

_DTYPES = {
    torch.bool: "BOOL",
    torch.uint8: "U8",
    torch.int8: "I8",
    torch.int16: "I16",
    torch.uint16: "U16",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int32: "I32",
    torch.uint32: "U32",
    torch.float32: "F32",
    torch.int64: "I64",
    torch.uint64: "U64",
    torch.float64: "F64",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}
_CHUNK = 1 << 24


def tensor_bytes(tensors: Mapping[str, Tensor]) -> int:
    """Bytes of the file that `write_tensors` would write, header included."""
    header, data = _header(tensors)
    return len(header) + data


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> WrittenFile:
    """Write the content of a safetensors file. Tensors may be strided, shared, empty, 0-dim, on any device.

    Raises:
        TypeError: a tensor of a dtype that the format does not hold.
        OSError: with the errno of the write that failed.
    """
    header, _ = _header(tensors)
    digest, count = hashlib.sha256(), 0
    for piece in chain([memoryview(header)], (_raw(tensors[name]) for name in _order(tensors))):
        for start in range(0, len(piece), _CHUNK):
            part = piece[start : start + _CHUNK]
            file.write(part)
            digest.update(part)
            count += len(part)
    return WrittenFile(count, digest.hexdigest())


def read_tensors(path: Path, expected: WrittenFile | None = None) -> dict[str, Tensor]:
    """All tensors of a safetensors file, on the CPU, in memory of their own (the file may be deleted then).

    Raises:
        ValueError: size or checksum differ from `expected`, or the content is not safetensors.
        OSError: the file cannot be read.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load

    data = path.read_bytes()
    if expected is not None and (found := WrittenFile(len(data), hashlib.sha256(data).hexdigest())) != expected:
        raise ValueError(f"{path.name}: expected {expected}, got {found}")
    try:
        # The reader returns tensors in an order that differs between processes.
        return dict(sorted(load(data).items()))
    except SafetensorError as error:
        raise ValueError(f"{path.name}: not a safetensors file: {error}") from error


def _order(tensors: Mapping[str, Tensor]) -> list[str]:
    # Widest elements first keeps every tensor aligned to its own element size, as the library does.
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _header(tensors: Mapping[str, Tensor]) -> tuple[bytes, int]:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in _order(tensors):
        tensor = tensors[name]
        if tensor.dtype not in _DTYPES or name == "__metadata__":
            raise TypeError(f"tensor {name!r}: dtype {tensor.dtype} or this name cannot be held by safetensors")
        end = offset + tensor.numel() * tensor.element_size()
        entries[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offset


def _raw(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    # An empty tensor has no bytes, and a memoryview of it cannot be cast.
    return memoryview(b"") if flat.numel() == 0 else flat.view(torch.uint8).numpy().data
