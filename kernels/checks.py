"""Input checks shared by all ops: shape, dtype, device, finiteness."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from transcoder.kernels.sparse_codes import SparseCodes

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
Checks = Literal["fast", "full"]


def check_mode(op: str, checks: str) -> None:
    if checks not in ("fast", "full"):
        raise ValueError(f"{op}: checks: expected 'fast' or 'full', got {checks!r}")


def check_float_matrix(op: str, name: str, value: Tensor, columns: int | None = None, rows: int | None = None) -> None:
    """value is [rows, columns] of a floating dtype; None leaves a size free."""
    _check_tensor(op, name, value)
    bad = value.dim() != 2 or (columns is not None and value.shape[1] != columns)
    if bad or (rows is not None and value.shape[0] != rows):
        # Formatted only on error: formatting makes a dynamic size a constant of a compiled graph.
        shape = f"[{'*' if rows is None else rows}, {'*' if columns is None else columns}]"
        raise ValueError(f"{op}: {name}: expected shape {shape}, got {list(value.shape)}")
    _check_float(op, name, value)


def check_float_vector(op: str, name: str, value: Tensor, length: int) -> None:
    _check_tensor(op, name, value)
    if value.dim() != 1 or value.shape[0] != length:
        raise ValueError(f"{op}: {name}: expected shape [{length}], got {list(value.shape)}")
    _check_float(op, name, value)


def check_codes(op: str, codes: SparseCodes) -> None:
    """Check the type of `codes` and, on the CPU, their pattern. On a GPU the check would make the host wait."""
    if not isinstance(codes, SparseCodes):
        raise TypeError(f"{op}: codes: expected SparseCodes, got {type(codes).__name__}")
    if codes.device.type == "cpu":
        codes.validate(f"{op}: codes")


def check_one_device(op: str, **tensors: Tensor) -> None:
    devices = {name: t.device for name, t in tensors.items()}
    if len(set(devices.values())) > 1:
        raise ValueError(
            f"{op}: expected all tensors on one device, got {', '.join(f'{n} on {d}' for n, d in devices.items())}"
        )


def check_k(op: str, k: int, d_sae: int) -> None:
    if not isinstance(k, int) or isinstance(k, bool):
        raise TypeError(f"{op}: k: expected an int, got {type(k).__name__}")
    if not 1 <= k <= d_sae:
        raise ValueError(f"{op}: k: expected between 1 and d_sae = {d_sae}, got {k}")


def check_widths(op: str, widths: Sequence[int], d_sae: int) -> None:
    increasing = len(widths) > 0 and widths[0] >= 1 and all(a < b for a, b in itertools.pairwise(widths))
    if not increasing:
        raise ValueError(f"{op}: widths: expected cumulative, strictly increasing, positive widths, got {list(widths)}")
    if widths[-1] > d_sae:
        raise ValueError(f"{op}: widths: expected none beyond d_sae = {d_sae}, got {list(widths)}")


def check_finite_rows(op: str, name: str, value: Tensor) -> None:
    """Raise ValueError naming the first row that holds a NaN or an Inf. Reads the device: only for checks='full'."""
    bad = ~torch.isfinite(value).reshape(value.shape[0], -1).all(1)
    if bool(bad.any()):
        rows = bad.nonzero().flatten()
        raise ValueError(f"{op}: {name}: NaN or Inf in {rows.numel()} rows, the first is row {int(rows[0])}")


def _check_tensor(op: str, name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{op}: {name}: expected a tensor, got {type(value).__name__}")


def _check_float(op: str, name: str, value: Tensor) -> None:
    if value.dtype not in FLOATS:
        raise TypeError(f"{op}: {name}: expected float32, float64, bfloat16 or float16, got {value.dtype}")
