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
"""Backends that `auto` tries on each device type, in order; other devices use `torch`. `auto` uses `triton` on a GPU only after
its kernels have passed their checks there (`gpu_selftest`); requested by name, `triton` runs unchecked."""


class _Chosen(local):
    """The backend that this thread requests. torch.compile guards on the attribute, so code is recompiled when it changes.
    `__init__` sets it in every thread: a default in the class would be the only value that the compiler reads."""

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

    The choice applies to the current thread. Other threads, including those started inside the block, use TRANSCODER_BACKEND or
    `auto`; coroutines on one thread share its choice.

    A gradient runs on the backend of its forward pass, in any thread. Activation checkpointing repeats the forward pass of CUDA
    tensors in autograd's own threads, to which the block does not apply: set TRANSCODER_BACKEND there.

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
    """The requested name: that of the innermost `use_backend`, else TRANSCODER_BACKEND, else `auto`."""
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


def may_serve(name: str, family: str, device: torch.device, dtype: torch.dtype | None = None) -> bool:
    """Whether `auto` may choose `name` on `device` for inputs of `dtype`: it is available, takes the dtype (a backend that does
    not take every one lists its `DTYPES`) and, for Triton, has passed its checks on this kind of GPU."""
    if not has_backend(name, family):
        return False
    taken = getattr(backend_module(family, name), "DTYPES", None)
    if dtype is not None and taken is not None and dtype not in taken:
        return False
    if name != "triton":
        return True
    from transcoder.kernels import gpu_selftest

    return gpu_selftest.proven(family, device)


# torch.compile takes the answers as constants of this machine instead of following the import system.
# (torch.compiler.assume_constant_result sets this mark too, after importing the compiler, which takes a second.)
has_backend._dynamo_marked_constant = True  # type: ignore[attr-defined]
may_serve._dynamo_marked_constant = True  # type: ignore[attr-defined]


def active_backend(device: torch.device | str, family: str = "encode", dtype: torch.dtype | None = None) -> str:
    """The backend that an op of `family` on `device` would run on now: never `auto`. `dtype` is the inputs'; None: any that
    every backend takes.

    Raises: RuntimeError if a backend was requested by name and is not available: an explicit choice never falls back.
    """
    name = requested_backend()
    if name == "auto":
        device = torch.device(device)
        order = FASTEST_FIRST.get(device.type, ("torch",))
        return next(choice for choice in order if may_serve(choice, family, device, dtype))
    if not has_backend(name, family):
        here = [choice for choice in NAMES[1:] if has_backend(choice, family)]
        raise RuntimeError(
            f"backend {name!r} was requested by name but is not available for {family} (available: {', '.join(here)}); "
            "use 'auto' or one of those"
        )
    return name


def why_slower(device: torch.device) -> str | None:
    """One line that names the slower backend on which ops on `device` run, with the reason; None if all run on the fastest.
    Compiles or checks a backend that has not been tried yet."""
    fastest = FASTEST_FIRST.get(device.type, ("torch",))[0]
    chosen = {family: active_backend(device, family) for family in ("encode", "decode", "correlation", "adam")}
    slower = [family for family, name in chosen.items() if name != fastest]
    if not slower:
        return None
    if requested_backend() != "auto":
        reason = "use_backend or TRANSCODER_BACKEND asks for it"
    elif fastest == "cpp":
        from transcoder.kernels import extension

        reason = f"C++ extension: {extension.available_reason()}"
    elif has_backend(fastest, slower[0]):
        from transcoder.kernels import gpu_selftest

        reason = "; ".join(gpu_selftest.why_not(family, device) for family in slower)
    else:
        reason = f"{fastest} is not installed, or cannot be imported"
    return (
        f"{', '.join(slower)} on backend {chosen[slower[0]]}, which is slower than {fastest} on {device.type}: {reason}"
    )


def implementation(family: str, device: torch.device) -> Any:
    """The module that runs an op family on `device`: `transcoder.kernels.<family>.<backend>_backend`."""
    return backend_module(family, active_backend(device, family))
