"""Which implementation runs an op: auto | triton | cpp | torch, chosen per call from the tensors' device."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

NAMES = ("auto", "triton", "cpp", "torch")
AVAILABLE = ("torch",)
"""Implementations this version carries. `auto` picks the fastest of them that serves the device."""

_chosen: ContextVar[str | None] = ContextVar("transcoder_backend", default=None)


def _check_name(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on one backend; overrides the TRANSCODER_BACKEND variable.

    Args:
        name: `auto` (by the tensors' device), `triton`, `cpp` or `torch`. An explicit choice never falls back: an op that
            the backend cannot run raises.
    """
    token = _chosen.set(_check_name(name, "use_backend"))
    try:
        yield
    finally:
        _chosen.reset(token)


def requested_backend() -> str:
    """The name in force: the innermost `use_backend`, else TRANSCODER_BACKEND, else `auto`."""
    chosen = _chosen.get()
    if chosen is not None:
        return chosen
    return _check_name(os.environ.get("TRANSCODER_BACKEND", "auto"), "environment variable TRANSCODER_BACKEND")


def active_backend(device: torch.device | str) -> str:
    """The backend that an op on `device` would run on now: never `auto`. RuntimeError if the explicit one is not here."""
    name = requested_backend()
    if name == "auto":
        return "torch"
    if name not in AVAILABLE:
        raise RuntimeError(
            f"backend {name!r} was asked for by name but is not in this version (available: {', '.join(AVAILABLE)}); "
            "use 'auto' or 'torch'"
        )
    return name
