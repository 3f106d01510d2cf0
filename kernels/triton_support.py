"""Whether Triton kernels can run here, and on which tensors."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1, set before triton is first imported)."""
    asked = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
    if asked and installed():
        _mend_interpreter()
    return asked


def _mend_interpreter() -> None:
    """Triton 3.6 (torch 2.11's) interprets a loop's bound as an array of one element, which NumPy no longer takes for a number
    from 2.4 on. Later versions do what this does."""
    import triton
    from triton.runtime import interpreter

    if not triton.__version__.startswith("3.6."):
        return
    patch = interpreter._patch_lang_tensor

    def with_an_index(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = with_an_index


@functools.cache
def installed() -> bool:
    """Whether triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def usable() -> bool:
    """Whether triton is installed and has a GPU, or its interpreter, to run on."""
    return installed() and (interpreted() or torch.cuda.is_available())


def check_device(op: str, device: torch.device) -> None:
    """Raise RuntimeError for tensors on a device that Triton cannot reach, instead of crashing in a launch."""
    if device.type != "cuda" and not interpreted():
        raise RuntimeError(f"{op}: backend 'triton' runs on CUDA tensors, got {device}; use 'auto' or move the tensors")


def on_device(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one inside the block: Triton launches on the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def on_its_device(launcher: Callable[P, R]) -> Callable[P, R]:
    """The launcher, run on the device of its first argument."""

    @functools.wraps(launcher)
    def run(*given: P.args, **named: P.kwargs) -> R:
        first: Any = given[0] if given else next(iter(named.values()))
        with on_device(first.device):
            return launcher(*given, **named)

    return run


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
