"""Which implementation runs an op: auto | triton | cpp | torch, chosen per call from the tensors' device."""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

NAMES = ("auto", "triton", "cpp", "torch")
FASTEST_FIRST = {"cuda": ("torch",), "cpu": ("cpp", "torch")}
"""What `auto` tries, in order; other devices run on `torch`. `triton` joins `auto` for cuda once its native check has been
green on a device: until then it runs where it is asked for by name."""

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


def has_backend(name: str, family: str) -> bool:
    """Whether this version carries `name` for an op family (`encode`, `decode`, `correlation`) and this machine can run it."""
    module = f"transcoder.kernels.{family}.{name}_backend"
    if importlib.util.find_spec(module) is None:
        return False
    usable = getattr(importlib.import_module(module), "usable", None)
    return usable is None or bool(usable())


def active_backend(device: torch.device | str, family: str = "encode") -> str:
    """The backend that an op of `family` on `device` would run on now: never `auto`.

    Raises: RuntimeError where a backend was asked for by name and is not here: an explicit choice never falls back.
    """
    name = requested_backend()
    if name == "auto":
        order = FASTEST_FIRST.get(torch.device(device).type, ("torch",))
        return next(choice for choice in order if has_backend(choice, family))
    if not has_backend(name, family):
        here = [choice for choice in NAMES[1:] if has_backend(choice, family)]
        raise RuntimeError(
            f"backend {name!r} was asked for by name but is not here for {family} (available: {', '.join(here)}); "
            "use 'auto' or one of those"
        )
    return name


def implementation(family: str, device: torch.device) -> Any:
    """The module that runs an op family on `device`: `transcoder.kernels.<family>.<backend>_backend`."""
    return importlib.import_module(f"transcoder.kernels.{family}.{active_backend(device, family)}_backend")
