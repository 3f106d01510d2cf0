"""Sizes for the device at hand, one timer for all rows, and the table of ratios at the end.

Every row is timed in one session with the bare encoder GEMM of the same size, so ratios mean something where absolute times
do not. A row's result is checked against its reference before it is timed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@dataclass(frozen=True)
class Size:
    rows: int
    d: int
    d_sae: int
    k: int

    @property
    def widths(self) -> list[int]:
        return [self.d_sae // 8, self.d_sae // 2, 7 * self.d_sae // 8, self.d_sae]

    def __str__(self) -> str:
        return f"B{self.rows}-d{self.d}-N{self.d_sae}-k{self.k}"


SIZES = (
    [Size(1024, 2304, 18432, 48), Size(4096, 2304, 18432, 48), Size(4096, 2304, 131072, 64)]
    if DEVICE.type == "cuda"
    else [Size(1024, 128, 2048, 16), Size(1024, 512, 8192, 32)]
)

_rows: list[tuple[str, str, float, float, float, int]] = []
_gemm: dict[Size, tuple[float, float]] = {}


@pytest.fixture(params=SIZES, ids=str)
def size(request: pytest.FixtureRequest) -> Size:
    return request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE


def seconds(call: Callable[[], object]) -> float:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def gemm_seconds(size: Size) -> tuple[float, float]:
    """Median times of x @ W.T alone, fp32, once a size and session: as written, and into memory that is there already.

    The first touches of a fresh [B, d_sae] were measured at as long as the product itself (2 threads, 32 MiB): a ratio to the
    first says what a user of the plain expression gains, a ratio to the second how far from the arithmetic's floor an op is.
    """
    if size not in _gemm:
        x, W = torch.randn(size.rows, size.d, device=DEVICE), torch.randn(size.d_sae, size.d, device=DEVICE)
        there = x @ W.T
        times = [(seconds(lambda: x @ W.T), seconds(lambda: torch.mm(x, W.T, out=there))) for _ in range(9)]
        fresh, warm = (statistics.median(column) for column in zip(*times, strict=True))
        _gemm[size] = fresh, warm
    return _gemm[size]


@pytest.fixture
def timed(benchmark, request: pytest.FixtureRequest, size: Size) -> Iterator[Callable[..., None]]:  # type: ignore[no-untyped-def]
    """timed(call, bytes_moved): benchmark `call`, note its ratio to the bare GEMM and the bytes it must at least move."""

    def run(call: Callable[[], object], bytes_moved: int) -> None:
        gemm, warm = gemm_seconds(size)

        def synchronised() -> None:
            call()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(synchronised, rounds=9, warmup_rounds=2)
        median = benchmark.stats.stats.median
        benchmark.extra_info.update(ratio_to_gemm=median / gemm, bytes=bytes_moved, gemm_seconds=gemm)
        benchmark.extra_info.update(ratio_to_warm_gemm=median / warm, warm_gemm_seconds=warm)
        _rows.append((request.node.name, str(size), median, median / gemm, median / warm, bytes_moved))

    return run


def pytest_terminal_summary(terminalreporter) -> None:  # type: ignore[no-untyped-def]
    if not _rows:
        return
    write = terminalreporter.write_line
    write("")
    write(
        f"ratios to the bare fp32 encoder GEMM of the same size, same session, {DEVICE}, {torch.get_num_threads()} threads"
    )
    for size, (fresh, warm) in _gemm.items():
        write(f"  {size!s:<62} x @ W.T {1e3 * fresh:9.3f} ms, into memory that is there already {1e3 * warm:9.3f} ms")
    for name, _, median, ratio, to_warm, moved in _rows:
        write(
            f"  {name:<62} {1e3 * median:9.3f} ms  {ratio:7.2f} x GEMM  {to_warm:7.2f} x warm GEMM  "
            f"at least {moved / 1e6:9.1f} MB moved"
        )
