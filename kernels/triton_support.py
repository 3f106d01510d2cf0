"""Whether Triton kernels can run here, and on which tensors."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch


@functools.cache
def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels (TRITON_INTERPRET=1, set before triton is first imported)."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def installed() -> bool:
    """Whether triton is there to import."""
    return importlib.util.find_spec("triton") is not None


def usable() -> bool:
    """Whether triton is installed and has a GPU, or its interpreter, to run on."""
    return installed() and (interpreted() or torch.cuda.is_available())


def check_device(op: str, device: torch.device) -> None:
    """Backend `triton` was asked for by name with tensors that it cannot reach: say so instead of crashing in a launch."""
    if device.type != "cuda" and not interpreted():
        raise RuntimeError(f"{op}: backend 'triton' runs on CUDA tensors, got {device}; use 'auto' or move the tensors")


def cdiv(a: int, b: int) -> int:
    return -(-a // b)
