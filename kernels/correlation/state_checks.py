"""What the parts of a saved state must be. All of them are looked at before any is loaded, so that a state that does not fit
leaves an object as it was."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.correlation.inputs import NAME


def refuse(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{NAME}.load_state_dict: {name}: expected {expected}, got {got}")


def check_fields(name: str, state: object, needed: Collection[str], optional: Collection[str] = ()) -> None:
    """`state` is a dict with all the `needed` fields and no others than these and the `optional` ones."""
    if not isinstance(state, Mapping):
        raise refuse(name, "a dict", type(state).__name__)
    for field in needed:
        if field not in state:
            raise ValueError(f"{NAME}.load_state_dict: {name}: expected a field {field!r}, which is missing")
    for field in state:
        if field not in needed and field not in optional:
            known = ", ".join(sorted({*needed, *optional}))
            raise ValueError(f"{NAME}.load_state_dict: {name}: unknown field {field!r} (known: {known})")


def check_tensor(name: str, value: object, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """`value` is a tensor of one of `dtypes` and of `shape`, None leaving a size free."""
    if not isinstance(value, Tensor):
        raise refuse(name, "a tensor", type(value).__name__)
    fits = value.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
    if not fits:
        raise refuse(name, f"shape [{', '.join('*' if n is None else str(n) for n in shape)}]", list(value.shape))
    if value.dtype not in dtypes:
        raise refuse(name, " or ".join(str(d) for d in dtypes), value.dtype)


def check_count(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise refuse(name, "a whole number >= 0", repr(value))
