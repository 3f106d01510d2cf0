"""The order that selection goes by, NaN and infinities included, on every path against the reference."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import SparseCodes, batch_topk_encode, extension, threshold_encode, topk_encode, use_backend
from transcoder.kernels.encode import torch_backend
from transcoder.kernels.encode.reference import largest_first

NAN, INF = float("nan"), float("inf")
BACKENDS = ["torch", *(["cpp"] if extension.usable() else [])]
NUMBERS = st.sampled_from([NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0, -1.0])
"""Few, so that ties are everywhere."""


def rows_of_numbers(rows: int, d_sae: int) -> st.SearchStrategy[list[list[float]]]:
    return st.lists(st.lists(NUMBERS, min_size=d_sae, max_size=d_sae), min_size=rows, max_size=rows)


@st.composite
def activations(draw: st.DrawFn) -> Tensor:
    rows, d_sae = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    return torch.tensor(draw(rows_of_numbers(rows, d_sae)), dtype=torch.float32).clamp_min(0)


def expected(values: list[float], k: int) -> list[int]:
    """The definition again, in plain Python: NaN, then falling, ties to the lowest place."""
    return sorted(sorted(range(len(values)), key=lambda n: (not math.isnan(values[n]), -values[n], n))[:k])


@settings(max_examples=200, deadline=None)
@given(z=activations())
def test_the_reference_puts_nan_first_then_infinity_then_the_lowest_id(z: Tensor) -> None:
    for row in z:
        order = largest_first(row).tolist()
        assert [sorted(order[:k]) for k in range(len(order) + 1)] == [
            expected(row.tolist(), k) for k in range(len(order) + 1)
        ]
    assert torch.equal(largest_first(z), torch.stack([largest_first(row) for row in z]))


@settings(max_examples=300, deadline=None)
@given(z=activations(), share=st.floats(0, 1))
def test_a_row_is_chosen_from_alike_with_and_without_host_reads(z: Tensor, share: float) -> None:
    k = max(1, round(share * z.shape[1]))
    want = [expected(row.tolist(), k) for row in z]
    assert torch_backend._topk_ids(z, k).tolist() == want
    assert torch_backend._topk_ids_static(z, k).tolist() == want


@settings(max_examples=300, deadline=None)
@given(z=activations(), share=st.floats(0, 1))
def test_a_pool_is_chosen_from_alike_with_and_without_host_reads(z: Tensor, share: float) -> None:
    rows, d_sae = z.shape
    wanted = rows * max(1, round(share * d_sae))
    want = expected(z.flatten().tolist(), wanted)
    chunks = [(n, n + 1, row[None]) for n, row in enumerate(z)]
    _, flat = torch_backend._largest(z.flatten(), torch.arange(z.numel()), wanted)
    assert flat.tolist() == want
    _, flat = torch_backend._collect_static(iter(chunks), wanted, d_sae)
    assert flat.tolist() == want
    _, flat = torch_backend._pad(*torch_backend._collect_above(chunks, wanted, d_sae, z, 0.0), wanted)
    assert flat.tolist() == want


@st.composite
def encoders(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    """x, W, b of exact small products: infinite x makes rows of inf, -inf and NaN; a bias makes columns of them."""
    rows, d_sae = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 7, 70, 700]))
    seed = draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    x = torch.tensor(draw(st.lists(st.tuples(NUMBERS, NUMBERS), min_size=rows, max_size=rows)))
    W = torch.randint(-1, 2, (d_sae, 2), generator=g).float()
    b = torch.tensor([0.0, 0.0, 0.0, 1.0, -1.0, NAN, INF, -INF])[
        torch.randint(0, draw(st.sampled_from([3, 5, 8])), (d_sae,), generator=g)
    ]
    return x, W, b


def same(got: Tensor, want: Tensor) -> bool:
    return torch.equal(got.isnan(), want.isnan()) and torch.equal(got.nan_to_num(nan=7.5), want.nan_to_num(nan=7.5))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("chunk", [1, 1 << 20])
@settings(max_examples=150, deadline=None)
@given(inputs=encoders(), share=st.floats(0, 1))
def test_every_backend_chooses_the_references_entries(
    backend: str, chunk: int, inputs: tuple[Tensor, ...], share: float
) -> None:
    x, W, b = inputs
    z = torch.relu(x @ W.T + b)
    rows, d_sae = z.shape
    k = max(1, round(share * d_sae))

    def entries(codes: SparseCodes) -> Tensor:
        return codes.rows() * d_sae + codes.indices

    with use_backend(backend), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch_backend, "MIN_CHUNK_ROWS", 1)
        patch.setitem(torch_backend.CHUNK_ELEMENTS, "cpu", chunk)
        codes = topk_encode(x, W, b, k)
        want = largest_first(z)[:, :k].sort(1).values
        assert torch.equal(codes.indices.view(rows, k), want)
        assert same(codes.values.view(rows, k), z.gather(1, want))
        codes = batch_topk_encode(x, W, b, k)
        want = largest_first(z.flatten())[: rows * k].sort().values
        assert torch.equal(entries(codes), want)
        assert same(codes.values, z.flatten()[want])
        codes = threshold_encode(x, W, b, 0.0)
        want = (x @ W.T + b > 0).flatten().nonzero().squeeze(1)
        assert torch.equal(entries(codes), want)
        assert same(codes.values, z.flatten()[want])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_default_device_is_not_the_inputs_device(backend: str) -> None:
    g = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(*shape, generator=g) for shape in ((40, 6), (50, 6), (50,)))
    # Few positives, and rows that mislead the guess: every path of BatchTopK.
    for change in (0.0, -9.0):
        for op in (topk_encode, batch_topk_encode, threshold_encode):
            with use_backend(backend):
                want = op(x, W, b + change, 3)
                with torch.device("meta"):
                    codes = op(x, W, b + change, 3)
            assert torch.equal(codes.indices, want.indices)
            assert torch.equal(codes.values, want.values)
