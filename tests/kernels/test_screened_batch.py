"""batch_topk and threshold encoding by screening in bf16 (csrc/screened.cpp) against the unscreened ops, where fp32 sums are
exact in any order. With the adversaries of tests/kernels/test_screened_encode.py."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tests.kernels.test_screened_encode import CASES, whole
from transcoder.kernels import batch_topk_encode, extension, threshold_encode, use_backend
from transcoder.kernels.encode import cpp_backend

pytestmark = pytest.mark.skipif(not extension.usable(), reason="no compiler")
OPS = torch.ops.transcoder_cpp


def assert_same(screened: tuple[Tensor, ...], plain: tuple[Tensor, ...]) -> None:
    for mine, theirs in zip(screened, plain, strict=True):
        assert torch.equal(mine.nan_to_num(nan=7.5), theirs.nan_to_num(nan=7.5))


@given(
    rows=st.sampled_from([1, 2, 31, 257, 600]),
    d=st.sampled_from([1, 3, 16, 40]),
    d_sae=st.sampled_from([15, 64, 130, 513, 1100]),
    k=st.sampled_from([1, 2, 7, 40]),
    bits=st.sampled_from([1, 8, 11]),
    bias=st.sampled_from([0, 3, 100_000]),
    level=st.sampled_from([-50, 0, 1, 20, 300]),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_ties_and_near_ties(rows: int, d: int, d_sae: int, k: int, bits: int, bias: int, level: int, seed: int) -> None:
    """Encoders of up to 12 bits: bf16 keeps 8, so the bound decides what is looked at again."""
    g = torch.Generator().manual_seed(seed)
    x, W, b = whole(g, -2, 2, rows, d), whole(g, -(2**bits), 2**bits, d_sae, d), whole(g, -bias, bias, d_sae)
    k = min(k, d_sae)
    assert_same(OPS.batch_topk_screened(x, W, b, k), OPS.batch_topk(x, W, b, k))
    limits = level + whole(g, -5, 5, d_sae)
    assert_same(OPS.above_screened(x, W, b, limits), OPS.above(x, W, b, limits))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 30, 899])
def test_adversaries(case: Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]], k: int) -> None:
    x, W, b = case(torch.Generator().manual_seed(0))
    assert_same(OPS.batch_topk_screened(x, W, b, k), OPS.batch_topk(x, W, b, k))
    for level in (0.0, float(OPS.batch_topk(x, W, b, k)[0].nan_to_num(0, 0).amin())):
        limits = torch.full((W.shape[0],), level)
        assert_same(OPS.above_screened(x, W, b, limits), OPS.above(x, W, b, limits))


def numbers(rows: int, d: int, d_sae: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    return torch.randn(rows, d, generator=g), torch.randn(d_sae, d, generator=g), torch.randn(d_sae, generator=g)


def test_values_are_fp32_dot_products_and_the_choice_is_theirs() -> None:
    """On numbers that round, against float64: within the rounding of 300 terms, and no entry left out is larger than one kept.
    The values are those of topk_screened, bit for bit: this is the screened path, not the other."""
    x, W, b = numbers(130, 300, 2000)
    values, ids, ptr = OPS.batch_topk_screened(x, W, b, 20)
    exact = x.double() @ W.double().T + b.double()
    error = 300**0.5 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    rows = torch.repeat_interleave(torch.arange(130), ptr.diff())
    assert float((values.double() - exact[rows, ids]).abs().max()) < error
    left = exact.clone()
    left[rows, ids] = -torch.inf
    assert float(left.max()) <= float(values.double().min()) + 2 * error
    assert bool(((rows * 2000 + ids).diff() > 0).all())
    by_row, by_row_ids = OPS.topk_screened(x, W, b, 60)
    table = torch.full((130, 2000), torch.nan).scatter(1, by_row_ids, by_row)
    both = ~table[rows, ids].isnan()
    assert int(both.sum()) > 2000
    assert torch.equal(table[rows, ids][both], values[both])
    limits = torch.full((2000,), float(values.min()))
    above = OPS.above_screened(x, W, b, limits)
    keep = values > values.min()
    assert torch.equal(above[0], values[keep])
    assert torch.equal(above[1], ids[keep])


def test_a_guess_that_is_too_high_is_seen() -> None:
    """What the guess is drawn from, 128 evenly spread rows, is far above all others."""
    x, W, b = numbers(1280, 24, 640)
    x[::10] *= 50
    want = OPS.batch_topk(x, W, b, 16)
    got = OPS.batch_topk_screened(x, W, b, 16)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-4)
    assert int((got[2].diff() == 0).sum()) == int((want[2].diff() == 0).sum())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.slow
@pytest.mark.parametrize("rows", [3, 700, 1500])
def test_the_number_of_threads_never_shows(rows: int, threads: None) -> None:
    x, W, b = numbers(rows, 60, 1030)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append([*OPS.batch_topk_screened(x, W, b, 9), *OPS.above_screened(x, W, b, torch.full((1030,), 15.0))])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_the_public_ops_use_it_where_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = numbers(40, 64, 300)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for asked in ("", "bf16"):
        monkeypatch.setenv("TRANSCODER_SCREEN", asked)
        assert cpp_backend.screens(x, W) == bool(asked)
        with use_backend("cpp"):
            batch, above = batch_topk_encode(x, W, b, 5), threshold_encode(x, W, b, 12.0)
        limits = torch.full((300,), 12.0)
        names = ("batch_topk_screened", "above_screened") if asked else ("batch_topk", "above")
        for codes, want in zip(
            (batch, above), (getattr(OPS, names[0])(x, W, b, 5), getattr(OPS, names[1])(x, W, b, limits)), strict=True
        ):
            assert torch.equal(codes.values, want[0])
            assert torch.equal(codes.indices, want[1])
            assert torch.equal(codes.row_ptr, want[2])


@pytest.mark.parametrize("op", ["batch_topk", "batch_topk_screened"])
@pytest.mark.parametrize(("d_sae", "hot", "k"), [(8192, 64, 16), (4096, 512, 16), (65536, 0, 2), (300, 10, 4)])
def test_the_gate_is_guessed_right_where_the_first_latents_fire_most(op: str, d_sae: int, hot: int, k: int) -> None:
    """As those of a Matryoshka dictionary do; and in wide dictionaries, where a sample holds few of what is wanted."""
    g = torch.Generator().manual_seed(7)
    W, b = torch.randn(d_sae, 16, generator=g), torch.zeros(d_sae)
    W[:hot] *= 2.5
    before = OPS.looked_again()
    for _ in range(6):
        values, ids, _ = getattr(OPS, op)(torch.randn(192, 16, generator=g), W, b, k)
        assert values.numel() == 192 * k
        if hot:
            assert float((ids < hot).float().mean()) > 2 * hot / d_sae
    assert OPS.looked_again() == before


@pytest.mark.parametrize("op", ["batch_topk", "batch_topk_screened"])
def test_a_guess_that_is_too_high_costs_another_look_and_nothing_else(op: str) -> None:
    """The rows that are sampled fire far stronger than the others."""
    g = torch.Generator().manual_seed(8)
    x, W, b = torch.randn(1024, 16, generator=g), torch.randn(1100, 16, generator=g), torch.zeros(1100)
    x[::8] *= 50
    x, W = x.round(), (8 * W).round()  # sums that are exact in any order
    before = OPS.looked_again()
    values, ids, row_ptr = getattr(OPS, op)(x, W, b, 200)
    assert OPS.looked_again() > before
    pre = (x @ W.T).relu()
    cut = pre.flatten().topk(1024 * 200).values[-1]
    assert float(values.min()) == float(cut)
    rows = torch.repeat_interleave(torch.arange(1024), row_ptr.diff())
    assert torch.equal(values, pre[rows, ids])
