"""Reference rates of this machine. `machine_rates`: one pair of rates a file, by which two result files are compared.
`Yardsticks`: for one row, timed in the rounds of the row: a copy, PyTorch's fp32 product of the encoder's operands, and the
fastest product measured on the machine.

The floor under an exact computation is the longer of two times: to copy as many bytes as any implementation must move, and to
do as many operations as it must at the rate of the fastest product. That may be one in bf16: an exact selection may propose in
bf16 and decide in fp32. PyTorch's fp32 product is no floor, since an op that keeps only selected entries need not write the
others.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from bench import machine
from bench.cases import Case, Floor
from bench.interleaved_timing import Variant
from bench.statistics import summary

COPY, PRODUCT, FASTEST = "copy", "fp32 product", "fastest product"
COPY_BYTES = 256 << 20
"""Longest copy that is timed; times of longer ones are extrapolated."""
COLUMNS = 32768
"""Latents of the fp32 product that is timed at most."""
SIDES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}
DTYPES = (torch.float32, torch.bfloat16)
TRIES = 3

Seconds = Mapping[str, Mapping[str, list[float]]]


class Yardsticks:
    """The reference rates of one row."""

    def __init__(self, case: Case, floors: Mapping[str, Floor]) -> None:
        self._floors, self._size = floors, case.size
        moved = min(max(floor.bytes for floor in floors.values()), COPY_BYTES)
        source, target = torch.empty(2, max(1, int(moved) // 8), device=case.device).zero_().unbind()
        self._copied = 8 * source.numel()
        W = case.W_enc[:COLUMNS]
        there = case.pool[0] @ W.T
        self._done = 2 * there.numel() * case.size.d
        self.fastest, square = fastest_product(case.device)
        self._square = 2 * square.shape[0] ** 3
        result = torch.empty_like(square)
        self.variants = [
            Variant(COPY, lambda i: target.copy_(source)),
            Variant(PRODUCT, lambda i: torch.mm(case.x(i), W.T, out=there)),
            Variant(FASTEST, lambda i: torch.mm(square, square, out=result)),
        ]

    def rates(self, seconds: Seconds) -> dict[str, Any]:
        """Bytes a second of the copy (read and written), operations a second of both products."""
        copy, product, fastest = (summary(seconds[name]["forward"])["median"] for name in (COPY, PRODUCT, FASTEST))
        return {
            "copy_bytes_per_second": self._copied / copy,
            "product_operations_per_second": self._done / product,
            # The row's own operands may suit the machine better.
            "fastest_operations_per_second": max(self._square / fastest, self._done / product),
            "fastest": self.fastest,
        }

    def product_seconds(self, seconds: Seconds) -> float:
        """Seconds of PyTorch's fp32 product x @ W_enc.T, into existing memory."""
        size = self._size
        return 2 * size.rows * size.d * size.d_sae / float(self.rates(seconds)["product_operations_per_second"])

    def floors(self, seconds: Seconds) -> dict[str, dict[str, float]]:
        """{direction: bytes, operations, and the least seconds that this machine needs for them}."""
        rates, found = self.rates(seconds), {}
        for direction, floor in self._floors.items():
            copy = floor.bytes / rates["copy_bytes_per_second"]
            product = floor.operations / rates["fastest_operations_per_second"]
            found[direction] = {
                **floor.to_dict(),
                "copy_seconds": copy,
                "product_seconds": product,
                "seconds": max(copy, product),
            }
        return found


_found: dict[str, tuple[str, torch.Tensor]] = {}


def fastest_product(device: torch.device) -> tuple[str, torch.Tensor]:
    """(description, operand) of the square product with the most operations a second. Searched for once."""
    if device.type not in _found:
        best = 0.0
        for dtype, side in itertools.product(DTYPES, SIDES[device.type]):
            square = torch.rand(side, side, generator=torch.Generator().manual_seed(0)).to(device, dtype)
            rate = 2 * side**3 / min(_seconds(square) for _ in range(TRIES))
            if rate > best:
                best = rate
                _found[device.type] = f"{side} x {side} in {str(dtype).removeprefix('torch.')}", square
            if rate < best / 4:
                # bf16 without instructions for it takes seconds, and longer with every size.
                break
    return _found[device.type]


def _seconds(square: torch.Tensor) -> float:
    _wait()
    start = time.perf_counter()
    torch.mm(square, square)
    _wait()
    return time.perf_counter() - start


TIMED = 9
SIDE = {"cpu": 1024, "cuda": 8192}


def machine_rates() -> dict[str, float]:
    """{"copy_bytes_per_second", "product_operations_per_second"}: medians of a copy of four caches (read and written) and of a
    square fp32 product. About 0.3 s on a CPU."""
    device = machine.device()
    source, target = torch.ones(2, machine.cache_bytes() // 2, device=device).unbind()
    side = SIDE[device.type]
    left, right = torch.ones(2, side, side, device=device).unbind()
    result = torch.empty_like(left)
    return {
        "copy_bytes_per_second": 8 * source.numel() / _median_seconds(lambda: target.copy_(source)),
        "product_operations_per_second": 2 * side**3 / _median_seconds(lambda: torch.mm(left, right, out=result)),
    }


def _median_seconds(call: Callable[[], object]) -> float:
    taken = []
    for _ in range(TIMED + 1):
        _wait()
        start = time.perf_counter()
        call()
        _wait()
        taken.append(time.perf_counter() - start)
    return sorted(taken[1:])[TIMED // 2]


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
