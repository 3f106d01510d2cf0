"""How fast this machine is at this moment: what two result files are compared by."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from bench import machine

TRIES = 9
SIDE = {"cpu": 1024, "cuda": 8192}


def rates() -> dict[str, float]:
    """{"copy_bytes_per_second", "product_operations_per_second"}: medians of a copy of four caches (read and written) and of a
    square fp32 product. About 0.3 s on a CPU."""
    device = machine.device()
    source, target = torch.ones(2, machine.cache_bytes() // 2, device=device).unbind()
    side = SIDE[device.type]
    left, right = torch.ones(2, side, side, device=device).unbind()
    result = torch.empty_like(left)
    return {
        "copy_bytes_per_second": 8 * source.numel() / _seconds(lambda: target.copy_(source)),
        "product_operations_per_second": 2 * side**3 / _seconds(lambda: torch.mm(left, right, out=result)),
    }


def _seconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(TRIES + 1):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[TRIES // 2]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
