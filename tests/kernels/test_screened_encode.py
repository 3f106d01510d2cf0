"""topk by screening in bf16 (csrc/screened.cpp) against the unscreened op, where fp32 sums are exact in any order."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import extension, topk_encode, use_backend
from transcoder.kernels.encode import cpp_backend

pytestmark = pytest.mark.skipif(not extension.usable(), reason="no compiler")


def whole(g: torch.Generator, low: int, high: int, *shape: int) -> Tensor:
    return torch.randint(low, high + 1, shape, generator=g).float()


def assert_same(x: Tensor, W: Tensor, b: Tensor, k: int) -> None:
    for screened, plain in zip(
        torch.ops.transcoder_cpp.topk_screened(x, W, b, k), torch.ops.transcoder_cpp.topk(x, W, b, k), strict=True
    ):
        assert torch.equal(screened.nan_to_num(nan=7.5), plain.nan_to_num(nan=7.5))


@given(
    rows=st.sampled_from([1, 2, 31, 257, 600]),
    d=st.sampled_from([1, 3, 16, 40]),
    d_sae=st.sampled_from([1, 15, 64, 130, 513, 1100]),
    k=st.sampled_from([1, 2, 7, 40, 500]),
    bits=st.sampled_from([1, 8, 11]),
    bias=st.sampled_from([0, 3, 100_000]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_ties_and_near_ties(rows: int, d: int, d_sae: int, k: int, bits: int, bias: int, seed: int) -> None:
    """Encoders of up to 12 bits: bf16 keeps 8, so the bound decides what is looked at again."""
    g = torch.Generator().manual_seed(seed)
    x, W, b = whole(g, -2, 2, rows, d), whole(g, -(2**bits), 2**bits, d_sae, d), whole(g, -bias, bias, d_sae)
    assert_same(x, W, b, min(k, d_sae))


def beneath_bf16(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Encoder rows that are one row in bf16 and differ in what it drops: every latent stays in question."""
    W = 4096 + whole(g, -7, 7, 900, 16)
    return whole(g, 0, 1, 70, 16), W, torch.zeros(900)


def cancelling(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Large products that cancel: the bound is far above what is left."""
    half = whole(g, -2047, 2047, 900, 20)
    W = torch.cat([half, whole(g, -3, 3, 900, 20) - half], 1)
    x = whole(g, -2, 2, 70, 20)
    return torch.cat([x, x], 1), W, torch.zeros(900)


def cancelling_tokens(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The same where bf16 holds the encoder and rounds the tokens."""
    half, w = whole(g, -2047, 2047, 70, 20), whole(g, -2, 2, 900, 20)
    return torch.cat([half, whole(g, -3, 3, 70, 20) - half], 1), torch.cat([w, w], 1), torch.zeros(900)


def large_bias(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 holds every number; the product is rounded at the size of the bias, which then takes most of it away."""
    W, level = whole(g, -9, 9, 900, 16), 4096 * whole(g, 1, 8, 900)
    W[:, 0] = level
    x = whole(g, -1, 1, 70, 16)
    x[:, 0] = 1
    return x, W, -level


def rounded_result(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 holds every number; products near 4096 come in steps of 32, biases decide."""
    x, W, _ = large_bias(g)
    W[:, 0] = 4096
    return x, W, whole(g, -9, 9, 900)


def one_long_row(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """One encoder row a thousand times longer widens the bound for all."""
    W = whole(g, -200, 200, 900, 16)
    W[77] *= 1000
    return whole(g, -2, 2, 70, 16), W, torch.zeros(900)


def none_positive(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, _ = beneath_bf16(g)
    return x, -W, torch.full((900,), -1.0)


def few_positive(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, _ = beneath_bf16(g)
    return x, W, torch.where(torch.arange(900) % 300 == 7, 0.0, -1e6)


def below_the_smallest_normal(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """bf16 units take such numbers for zero."""
    return whole(g, 0, 1, 70, 4) * 2.0**-70, whole(g, -9, 9, 900, 4) * 2.0**-70, torch.zeros(900)


def not_numbers(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = whole(g, -2, 2, 70, 16), whole(g, -200, 200, 900, 16), torch.zeros(900)
    x[3, 1], x[5, 2], x[9, 0] = torch.nan, torch.inf, 3e38
    return x, W, b


def encoder_with_nan(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = whole(g, -2, 2, 70, 16), whole(g, -200, 200, 900, 16), torch.zeros(900)
    W[800, 3] = torch.nan
    return x, W, b


def nan_behind_what_rounds(g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """The largest rounding errors stand before the NaN, none after it."""
    W = torch.cat([4096 + whole(g, -7, 7, 500, 16), whole(g, -9, 9, 400, 16)])
    W[500, 3] = torch.nan
    return whole(g, 0, 1, 70, 16), W, torch.zeros(900)


CASES = [
    beneath_bf16, cancelling, cancelling_tokens, large_bias, rounded_result, one_long_row, none_positive, few_positive,
    below_the_smallest_normal, not_numbers, encoder_with_nan, nan_behind_what_rounds,
]  # fmt: skip


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("k", [1, 30, 899])
def test_adversaries(case: Callable[[torch.Generator], tuple[Tensor, Tensor, Tensor]], k: int) -> None:
    x, W, b = case(torch.Generator().manual_seed(0))
    if case is not_numbers:
        # Infinity times zero and beyond fp32's range sums depend on their order; a NaN has no sign to agree on.
        values, ids = torch.ops.transcoder_cpp.topk_screened(x, W, b, k)
        assert bool(values[3].isnan().all())
        keep = torch.tensor([i not in (3, 5, 9) for i in range(70)])
        plain = torch.ops.transcoder_cpp.topk(x, W, b, k)
        assert torch.equal(values[keep], plain[0][keep])
        assert torch.equal(ids[keep], plain[1][keep])
    else:
        assert_same(x, W, b, k)


def test_values_are_fp32_dot_products_and_the_choice_is_theirs() -> None:
    """On numbers that round: within the rounding of 300 terms of float64, and no entry left out is larger than one kept."""
    g = torch.Generator().manual_seed(1)
    x, W, b = torch.randn(130, 300, generator=g), torch.randn(2000, 300, generator=g), torch.randn(2000, generator=g)
    values, ids = torch.ops.transcoder_cpp.topk_screened(x, W, b, 20)
    exact = x.double() @ W.double().T + b.double()
    error = 300**0.5 * torch.finfo(torch.float32).eps * float(exact.abs().max())
    assert float((values.double() - exact.gather(1, ids)).abs().max()) < error
    left = exact.scatter(1, ids, -torch.inf).amax(1)
    assert bool((left <= values.double().amin(1) + 2 * error).all())
    assert bool((ids.diff(dim=1) > 0).all())


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [3, 700, 1500])
def test_the_number_of_threads_never_shows(rows: int, threads: None) -> None:
    g = torch.Generator().manual_seed(1)
    x, W, b = torch.randn(rows, 60, generator=g), torch.randn(1030, 60, generator=g), torch.randn(1030, generator=g)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        found.append(torch.ops.transcoder_cpp.topk_screened(x, W, b, 9))
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


def test_it_is_opt_in_and_for_fp32_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(1)
    x, W, b = (torch.randn(*shape, generator=g) for shape in ((40, 64), (300, 64), (300,)))
    monkeypatch.delenv("TRANSCODER_SCREEN", raising=False)
    assert not cpp_backend.screens(x, W)
    monkeypatch.setenv("TRANSCODER_SCREEN", "fp8")
    with pytest.raises(ValueError, match="TRANSCODER_SCREEN: expected 'bf16' or nothing, got 'fp8'"):
        cpp_backend.screens(x, W)
    monkeypatch.setenv("TRANSCODER_SCREEN", "bf16")
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    assert not cpp_backend.screens(x, W)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    assert cpp_backend.screens(x, W)
    assert not cpp_backend.screens(x.double(), W.double())
    assert not cpp_backend.screens(x.bfloat16(), W.bfloat16())
    W.requires_grad_()
    with use_backend("cpp"):
        codes = topk_encode(x, W, b, 5)
    values, ids = torch.ops.transcoder_cpp.topk_screened(x, W.detach(), b, 5)
    assert torch.equal(codes.values.detach().view(40, 5), values)
    assert torch.equal(codes.indices.view(40, 5), ids)
    codes.values.sum().backward()
    assert W.grad is not None
