"""Which implementation runs an op: auto | triton | cpp | torch, chosen per call from the tensors' device."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from collections.abc import Iterator
from contextlib import contextmanager
from threading import local
from typing import Any

import torch

NAMES = ("auto", "triton", "cpp", "torch")
FASTEST_FIRST = {"cuda": ("triton", "torch"), "cpu": ("cpp", "torch")}
"""What `auto` tries, in order; other devices run on `torch`. `triton` answers for a GPU once its kernels have been checked
natively there (`gpu_selftest`); asked for by name it runs unchecked."""


class _Chosen(local):
    """A thread's own choice. An attribute, because torch.compile guards on what it reads: code compiled under one choice is
    compiled again under another. Set for each thread: of a class attribute behind it the compiler would read that one only."""

    def __init__(self) -> None:
        self.name: str | None = None


_chosen = _Chosen()


def _check_name(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where}: expected one of {', '.join(NAMES)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside the `with` block on one backend; overrides the TRANSCODER_BACKEND variable.

    The choice is the thread's own. Another thread, one started inside the block too, sees TRANSCODER_BACKEND or `auto` until
    it chooses for itself; coroutines that take turns on one thread share its choice.

    A gradient runs on the backend of its forward, wherever autograd runs it: for CPU tensors in the thread that calls
    `backward`, for CUDA tensors in autograd's own threads, which never saw a `with` block. What activation checkpointing runs
    again there is a forward of such a thread: choose by TRANSCODER_BACKEND where that matters.

    Args:
        name: `auto` (by the tensors' device), `triton`, `cpp` or `torch`. An explicit choice never falls back: an op that
            the backend cannot run raises.
    """
    before, _chosen.name = _chosen.name, _check_name(name, "use_backend")
    try:
        yield
    finally:
        _chosen.name = before


def requested_backend() -> str:
    """The name in force: the innermost `use_backend`, else TRANSCODER_BACKEND, else `auto`."""
    if _chosen.name is not None:
        return _chosen.name
    return _check_name(os.environ.get("TRANSCODER_BACKEND", "auto"), "environment variable TRANSCODER_BACKEND")


@functools.cache
def backend_module(family: str, name: str) -> Any:
    """`transcoder.kernels.<family>.<name>_backend`, or None where this version has none."""
    module = f"transcoder.kernels.{family}.{name}_backend"
    return importlib.import_module(module) if importlib.util.find_spec(module) else None


def has_backend(name: str, family: str) -> bool:
    """Whether this version carries `name` for an op family (`encode`, `decode`, `correlation`) and this machine can run it."""
    module = backend_module(family, name)
    usable = getattr(module, "usable", None)
    return module is not None and (usable is None or bool(usable()))


def may_serve(name: str, family: str, device: torch.device) -> bool:
    """Whether `auto` may choose `name` on `device`: it is here and, for Triton, this kind of GPU was seen to run it right."""
    if not has_backend(name, family):
        return False
    if name != "triton":
        return True
    from transcoder.kernels import gpu_selftest

    return gpu_selftest.proven(family, device)


# torch.compile takes the answers as constants of this machine instead of following the import system.
# (torch.compiler.assume_constant_result sets this mark too, after importing the compiler, which takes a second.)
has_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
may_serve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def active_backend(device: torch.device | str, family: str = "encode") -> str:
    """The backend that an op of `family` on `device` would run on now: never `auto`.

    Raises: RuntimeError where a backend was asked for by name and is not here: an explicit choice never falls back.
    """
    name = requested_backend()
    if name == "auto":
        device = torch.device(device)
        order = FASTEST_FIRST.get(device.type, ("torch",))
        return next(choice for choice in order if may_serve(choice, family, device))
    if not has_backend(name, family):
        here = [choice for choice in NAMES[1:] if has_backend(choice, family)]
        raise RuntimeError(
            f"backend {name!r} was asked for by name but is not here for {family} (available: {', '.join(here)}); "
            "use 'auto' or one of those"
        )
    return name


def implementation(family: str, device: torch.device) -> Any:
    """The module that runs an op family on `device`: `transcoder.kernels.<family>.<backend>_backend`."""
    return backend_module(family, active_backend(device, family))
