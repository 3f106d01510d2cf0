"""Segment sums and dot products of backend `triton` against plain float64 loops."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


def problem(
    lengths: list[int], table_rows: int, columns: int, seed: int = 0, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    ptr = torch.tensor([0, *lengths]).cumsum(0)
    n = int(ptr[-1])
    table = torch.randn(table_rows, columns, generator=g, dtype=torch.float64).to(dtype)
    weights = torch.randn(n, generator=g, dtype=torch.float64).to(dtype)
    return table, torch.randint(0, max(1, table_rows), (n,), generator=g), ptr, weights


def expected_sums(table: Tensor, ids: Tensor, ptr: Tensor, weights: Tensor) -> Tensor:
    out = torch.zeros(ptr.numel() - 1, table.shape[1], dtype=torch.float64)
    for m in range(ptr.numel() - 1):
        for j in range(int(ptr[m]), int(ptr[m + 1])):
            out[m] += weights[j].double() * table[ids[j]].double()
    return out


LENGTHS = {
    "none": [],
    "one empty": [0],
    "one": [1],
    "odd": [3, 0, 0, 9, 1, 17, 0],
    "exactly split": [128, 128],
    "hot": [5, 0, 700, 2, 129, 130, 127, 3, 0],
    "hot at both ends": [300, 1, 256],
    "one short of a block": [127, 129, 0, 383],
}


@pytest.mark.interpreted
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("columns", [1, 33])
def test_weighted_row_sum(lengths: list[int], columns: int, triton_device: torch.device, close: Callable) -> None:
    from transcoder.kernels.segments_triton import weighted_row_sum

    parts = problem(lengths, 11, columns)
    moved = [t.to(triton_device) for t in parts]
    got = weighted_row_sum(*moved)
    close(got.cpu(), expected_sums(*parts), max([1, *lengths]), scale=5)
    assert torch.equal(got, weighted_row_sum(*moved))


@pytest.mark.interpreted
@pytest.mark.parametrize("columns", [255, 257, 2304, 2311])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_wide_rows_in_tiles(columns: int, dtype: torch.dtype, triton_device: torch.device, close: Callable) -> None:
    from transcoder.kernels.segments_triton import row_dots, weighted_row_sum

    table, ids, ptr, weights = problem([2, 9], 5, columns, dtype=dtype)
    moved = [t.to(triton_device) for t in (table, ids, ptr, weights)]
    bias = torch.randn(columns, generator=torch.Generator().manual_seed(1), dtype=dtype)
    got = weighted_row_sum(*moved, bias=bias.to(triton_device))
    assert got.dtype == dtype
    close(got.cpu(), expected_sums(table, ids, ptr, weights) + bias.double(), 9, scale=5)
    left = torch.randn(2, columns, generator=torch.Generator().manual_seed(2), dtype=dtype)
    rows = torch.repeat_interleave(torch.arange(2), ptr.diff())
    dots = row_dots(left.to(triton_device), moved[0], moved[1], moved[2])
    assert dots.dtype == dtype
    close(dots.cpu(), (left[rows].double() * table[ids].double()).sum(1), columns, scale=5)


@pytest.mark.interpreted
def test_strided_tables_outputs_and_inner_segments(triton_device: torch.device, close: Callable) -> None:
    from transcoder.kernels.segments_triton import row_dots, weighted_row_sum

    table, ids, ptr, weights = problem([4, 140, 0, 3], 6, 10)
    want = expected_sums(table, ids, ptr, weights)
    moved = [t.to(triton_device) for t in (table, ids, ptr, weights)]
    columns_first = moved[0].T.contiguous().T
    every_other = torch.stack([moved[3], torch.full_like(moved[3], torch.nan)], 1)[:, 0]
    out = torch.full((4, 21), torch.nan, dtype=torch.float64, device=triton_device)
    weighted_row_sum(columns_first, moved[1], moved[2], every_other, out=out[:, 1::2])
    close(out[:, 1::2].cpu(), want, 140, scale=5)
    assert bool(out[:, ::2].isnan().all())
    inner = weighted_row_sum(moved[0], moved[1], moved[2][1:4], moved[3])
    close(inner.cpu(), want[1:3], 140, scale=5)
    dots = row_dots(out[:, 1::2], columns_first, moved[1], moved[2])
    rows = torch.repeat_interleave(torch.arange(4), ptr.diff())
    close(dots.cpu(), (want[rows] * table[ids]).sum(1), 140, scale=100)


@pytest.mark.interpreted
@pytest.mark.parametrize("lengths", LENGTHS.values(), ids=LENGTHS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_segment_sum(lengths: list[int], dtype: torch.dtype, triton_device: torch.device, close: Callable) -> None:
    from transcoder.kernels.segments_triton import segment_sum

    _, _, ptr, values = problem(lengths, 1, 1, dtype=dtype)
    want = [float(values[int(a) : int(b)].double().sum()) for a, b in itertools.pairwise(ptr)]
    got = segment_sum(values.to(triton_device), ptr.to(triton_device))
    close(got.cpu(), torch.tensor(want, dtype=torch.float64), max([1, *lengths]), scale=5)


@pytest.mark.interpreted
def test_nan_and_inf_reach_their_own_segment_only(triton_device: torch.device) -> None:
    from transcoder.kernels.segments_triton import row_dots, weighted_row_sum

    table, ids, ptr, weights = (t.to(triton_device) for t in problem([3, 200, 2], 9, 5))
    ids = ids.clone()
    ids[ids == 8] = 0
    ids[50] = 8
    table = table.clone()
    table[8, 2] = torch.nan
    got = weighted_row_sum(table, ids, ptr, weights)
    assert got.isnan().nonzero().tolist() == [[1, 2]]
    dots = row_dots(got, table, ids, ptr)
    assert bool(dots[3:203].isnan().all())
    assert not bool(dots[:3].isnan().any() | dots[203:].isnan().any())
