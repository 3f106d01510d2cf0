"""Backend `cpp` against backend `torch`, across thread counts and instruction sets. Without a compiler the comparison is
torch with itself."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import (
    SparseCodes,
    batch_topk_encode,
    extension,
    nested_loss,
    sparse_decode,
    threshold_encode,
    topk_encode,
    use_backend,
)

CPP = "cpp" if extension.usable() else "torch"
ENCODE = {"topk": topk_encode, "batch_topk": batch_topk_encode, "threshold": threshold_encode}


def inputs(rows: int, d: int, d_sae: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """Small whole numbers: every product and sum is exact, so ties are everywhere and results must agree to the bit."""
    g = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randint(-2, 3, shape, generator=g).to(dtype) for shape in ((rows, d), (d_sae, d), (d_sae,), (rows, d))
    )


def both(run) -> tuple[list[Tensor], list[Tensor]]:  # type: ignore[no-untyped-def]
    found = []
    for name in (CPP, "torch"):
        with use_backend(name):
            found.append(run())
    return found[0], found[1]


def assert_same(left: list[Tensor], right: list[Tensor]) -> None:
    for a, b in zip(left, right, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a.nan_to_num(nan=7.5), b.nan_to_num(nan=7.5))


def assert_near(a: Tensor, b: Tensor) -> None:
    """Whole numbers to the bit; sums of up to 1030 terms by 8 standard deviations of their rounding, sqrt(1030) ulps of the
    largest."""
    if not a.is_floating_point():
        assert torch.equal(a, b)
    else:
        bound = 8 * torch.finfo(a.dtype).eps * 1030**0.5 * float(b.abs().max())
        torch.testing.assert_close(a, b, rtol=0, atol=bound)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ENCODE)
@given(
    rows=st.sampled_from([1, 2, 31, 257, 600]),
    d=st.integers(0, 5),
    d_sae=st.sampled_from([1, 15, 64, 65, 130, 512, 513, 1100]),
    k=st.sampled_from([1, 2, 7, 40, 500, 1100]),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_encode_is_the_torch_backends_to_the_bit(
    name: str, dtype: torch.dtype, rows: int, d: int, d_sae: int, k: int, seed: int
) -> None:
    x, W, b, _ = inputs(rows, d, d_sae, dtype, seed)

    def run() -> list[Tensor]:
        codes = ENCODE[name](x, W, b, 2.0 if name == "threshold" else min(k, d_sae))
        return [codes.values, codes.indices, codes.row_ptr]

    assert_same(*both(run))


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_nan_and_infinity_are_ranked_first(name: str) -> None:
    x, W, b, _ = inputs(300, 4, 700)
    W[:, 2] = 1
    x[3, 1], x[299, 0], x[40, 2] = float("nan"), -float("nan"), float("inf")
    with use_backend(CPP):
        codes = ENCODE[name](x, W, b, 5)
    assert codes.nnz == 1500
    rows = codes.rows()
    for row in (3, 299):
        own = codes.values[rows == row]
        assert own.numel() >= 5
        assert bool(own.isnan().all())
    assert bool((codes.values[rows == 40] == torch.inf).all())


def step(d_out: int = 37, dtype: torch.dtype = torch.float32, rows: int = 300, d_sae: int = 1030) -> list[Tensor]:
    """Everything there is, on numbers that round."""
    g = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=dtype).requires_grad_()

    x, W_enc, b_enc, W_dec, b_dec, y = (
        draw(rows, 48), draw(d_sae, 48), draw(d_sae), draw(d_sae, d_out), draw(d_out), draw(rows, d_out)
    )  # fmt: skip
    found: list[Tensor] = []
    for codes in (topk_encode(x, W_enc, b_enc, 9), batch_topk_encode(x, W_enc, b_enc, 9)):
        nested = nested_loss(
            codes, W_dec, b_dec, y, (10, 500, 1000), (1, 2, 3), token_weights=torch.rand(rows, generator=g)
        )
        value = nested.value + sparse_decode(codes, W_dec, b_dec).sin().mean()
        grads = torch.autograd.grad(value, (x, W_enc, b_enc, W_dec, b_dec, y))
        found += [
            codes.values.detach(),
            codes.indices,
            codes.row_ptr,
            nested.per_prefix.detach(),
            nested.residual,
            *grads,
        ]
    with torch.no_grad():
        codes = threshold_encode(x, W_enc, b_enc, 10.0)
        found += [codes.values, codes.indices, codes.row_ptr, *codes.by_latent()]
    return found


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("rows", [3, 300, 700])
def test_the_number_of_threads_never_shows(rows: int, threads: None) -> None:
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        with use_backend(CPP):
            found.append(step(rows=rows))
    if CPP == "cpp":
        assert_same(found[0], found[1])
        assert_same(found[0], found[2])


@pytest.mark.parametrize("d_out", [1, 16, 37, 64, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_whole_step_agrees_with_torch(d_out: int, dtype: torch.dtype) -> None:
    ours, theirs = both(lambda: step(d_out, dtype))
    for a, b in zip(ours, theirs, strict=True):
        assert_near(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_values_and_weights(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(1)
    codes = SparseCodes.from_dense(torch.rand(20, 30, generator=g).to(dtype))
    W, b = torch.randn(30, 8, generator=g).to(dtype), torch.randn(8, generator=g).to(dtype)
    with use_backend(CPP):
        got = sparse_decode(codes, W, b)
    assert got.dtype == dtype
    exact = codes.to_dense().double() @ W.double() + b.double()
    torch.testing.assert_close(got.double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)


def test_indices_out_of_range_are_refused() -> None:
    codes = SparseCodes(torch.ones(2), torch.tensor([0, 9]), torch.tensor([0, 2]), (1, 4))
    with use_backend(CPP), pytest.raises((IndexError, RuntimeError)):
        sparse_decode(codes, torch.ones(4, 3), torch.zeros(3))


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set on this architecture")
@pytest.mark.parametrize("name", ["base", "avx2"])
def test_narrower_instruction_sets_agree(name: str, tmp_path: Path) -> None:
    """A CPU without AVX-512 must see the same selections, and sums that differ by rounding alone."""
    code = f"""
import sys, torch
sys.path.insert(0, {os.path.dirname(__file__)!r})
from test_cpp_backend import step
torch.save(step(), sys.argv[1])
print(torch.ops.transcoder_cpp.instruction_set())
"""
    if CPP == "torch":
        return
    path = tmp_path / "found.pt"
    environment = {**os.environ, "TRANSCODER_CPU": name}
    done = subprocess.run(
        [sys.executable, "-c", code, str(path)], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("base", name)
    for a, b in zip(torch.load(path), step(), strict=True):
        assert_near(a, b)
