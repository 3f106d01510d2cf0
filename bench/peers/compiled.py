"""The same dense PyTorch through torch.compile."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable

import torch
from torch import Tensor

from bench.cases import Case
from bench.interleaved_timing import Variant
from bench.peers import eager

NAME = "torch.compile"


@functools.cache
def missing() -> str | None:
    if not torch.cuda.is_available() and shutil.which("g++") is None:
        return "torch.compile needs a C++ compiler, and g++ is not here"
    return None


def _compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    # Static shapes: code for dynamic ones is slower.
    # Rows of other sizes and settings count against one limit of compilations of the same code.
    torch._dynamo.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)


def encode(case: Case) -> list[Variant]:
    return eager.encode(case, NAME, _compiled)


def nested_loss(case: Case) -> list[Variant]:
    return eager.nested_loss(case, NAME, _compiled)


def step(case: Case) -> list[Variant]:
    return eager.step(case, NAME, _compiled)
