from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import SparseCodes, nested_loss, sparse_decode
from transcoder.kernels.decode import torch_backend
from transcoder.kernels.decode.reference import nested_loss_reference, sparse_decode_reference

pytestmark = pytest.mark.usefixtures("cpu_backend")


def inputs(
    rows: int, d_sae: int, d_out: int, seed: int = 0, dtype: torch.dtype = torch.float64, density: float = 0.3
) -> tuple[SparseCodes, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(rows, d_sae, generator=g, dtype=dtype) * (torch.rand(rows, d_sae, generator=g) < density)
    W = torch.randn(d_sae, d_out, generator=g, dtype=dtype)
    return (
        SparseCodes.from_dense(z),
        W,
        torch.randn(d_out, generator=g, dtype=dtype),
        torch.randn(rows, d_out, generator=g, dtype=dtype),
    )


def to(device: torch.device, codes: SparseCodes, *tensors: Tensor) -> tuple:
    moved = SparseCodes(codes.values.to(device), codes.indices.to(device), codes.row_ptr.to(device), codes.shape)
    return moved, *(t.to(device) for t in tensors)


SHAPES = [(1, 1, 1), (5, 9, 3), (33, 70, 17), (4, 200, 64), (0, 5, 3), (6, 5, 0)]


@pytest.mark.parametrize("shape", SHAPES)
def test_decode_matches_the_float64_reference_with_gradients(
    shape: tuple[int, int, int], device: torch.device, close: Callable[..., None]
) -> None:
    codes, W, b, _ = to(device, *inputs(*shape))
    values, W, b = codes.values.clone().requires_grad_(), W.requires_grad_(), b.requires_grad_()
    z = codes.to_dense().clone().requires_grad_()
    got, want = sparse_decode(codes.with_values(values), W, b), sparse_decode_reference(z, W, b)
    close(got, want, shape[1], scale=5)
    got_grads = torch.autograd.grad(got.sin().sum(), (values, W, b))
    want_grads = torch.autograd.grad(want.sin().sum(), (z, W, b))
    close(got_grads[0], want_grads[0][codes.rows(), codes.indices], shape[2], scale=5)
    close(got_grads[1], want_grads[1], shape[0], scale=5)
    close(got_grads[2], want_grads[2], shape[0], scale=5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((5, 9, 3), [9]),
        ((5, 9, 3), [1, 4, 9]),
        ((33, 70, 17), [10, 11, 50, 70]),
        ((7, 20, 4), [3, 12]),
        ((0, 5, 3), [2, 5]),
    ],
)
def test_nested_loss_matches_the_float64_reference_with_gradients(
    shape: tuple[int, int, int],
    widths: list[int],
    weighted: bool,
    device: torch.device,
    close: Callable[..., None],
) -> None:
    codes, W, b, y = to(device, *inputs(*shape))
    values = codes.values.clone().requires_grad_()
    leaves = [t.requires_grad_() for t in (W, b, y)]
    z = codes.to_dense().clone().requires_grad_()
    weights = [0.5 + i for i in range(len(widths))]
    tokens = torch.linspace(0.5, 1.5, shape[0], dtype=torch.float64, device=device) if weighted else None
    got = nested_loss(codes.with_values(values), *leaves, widths, weights, token_weights=tokens)
    losses, residual = nested_loss_reference(z, *leaves, widths, tokens)
    close(got.residual, residual.detach(), shape[1], scale=5)
    assert not got.residual.requires_grad
    if shape[0] == 0:
        assert got.per_prefix.tolist() == [0.0] * len(widths)
        return
    value = (losses * torch.tensor(weights, dtype=torch.float64, device=device)).sum()
    close(got.per_prefix, losses, shape[0] * shape[2], scale=5)
    close(got.value, value, shape[0] * shape[2], scale=5)
    got_grads = torch.autograd.grad(got.value + got.per_prefix[0].sin(), (values, *leaves))
    want_grads = torch.autograd.grad(value + losses[0].sin(), (z, *leaves))
    close(got_grads[0], want_grads[0][codes.rows(), codes.indices], shape[2], scale=5)
    for actual, expected in zip(got_grads[1:], want_grads[1:], strict=True):
        close(actual, expected, shape[0] * shape[2], scale=5)


@given(
    rows=st.integers(1, 8),
    d_sae=st.integers(1, 15),
    d_out=st.integers(1, 6),
    cuts=st.sets(st.integers(1, 15), max_size=4),
    seed=st.integers(0, 10**6),
    density=st.sampled_from([0.0, 0.2, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_any_widths(rows: int, d_sae: int, d_out: int, cuts: set[int], seed: int, density: float) -> None:
    codes, W, b, y = inputs(rows, d_sae, d_out, seed, density=density)
    widths = sorted({c for c in cuts if c < d_sae} | {d_sae})
    losses, _ = nested_loss_reference(codes.to_dense(), W, b, y, widths)
    torch.testing.assert_close(nested_loss(codes, W, b, y, widths).per_prefix, losses)


def test_the_path_without_host_reads_gives_the_same_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """What accelerators run (masked groups), run here against the compacted groups."""
    codes, W, b, y = inputs(30, 40, 8)
    widths = (7, 20, 40)
    scales = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    masked = [
        torch_backend.Group(
            g.first,
            g.last,
            codes.rows(),
            codes.indices,
            codes.row_ptr,
            None,
            (codes.indices >= g.first) & (codes.indices < g.last),
        )
        for g in torch_backend.groups_of(codes, widths)
    ]
    results = []
    for groups in (None, masked):
        if groups is not None:
            monkeypatch.setattr(torch_backend, "groups_of", lambda *_: masked)
        errors, residual = torch_backend.prefix_errors(codes.values, codes, widths, W, b, y, None)
        grads = torch_backend.prefix_gradients(codes.values, codes, widths, W, residual, scales, None)
        results.append((errors, *grads))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def test_every_prefix_reaches_its_own_latents_only() -> None:
    codes, W, b, y = inputs(12, 10, 4, density=0.8)
    W = W.requires_grad_()
    losses = nested_loss(codes, W, b, y, [3, 10]).per_prefix
    (narrow,) = torch.autograd.grad(losses[0], W, retain_graph=True)
    assert bool((narrow[:3].abs().sum(1) > 0).all())
    assert torch.equal(narrow[3:], torch.zeros_like(narrow[3:]))
    (wide,) = torch.autograd.grad(losses[1], W)
    assert bool((wide.abs().sum(1) > 0).all())


def test_nothing_of_size_nnz_by_d_out_is_stored() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, d_sae, d_out = 64, 32, 128
    codes, W, b, y = inputs(rows, d_sae, d_out, dtype=torch.float32, density=0.9)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    largest = max(largest, t.numel())
            return out

    values = codes.values.requires_grad_()
    with Watch():
        nested_loss(codes.with_values(values), W.requires_grad_(), b, y, [8, 16, 24, 32]).value.backward()
    assert largest <= max(rows * d_out, d_sae * d_out, codes.nnz)


def test_bitwise_reproducible(device: torch.device) -> None:
    def run() -> list[Tensor]:
        codes, W, b, y = to(device, *inputs(50, 64, 24, dtype=torch.float32))
        values, W = codes.values.requires_grad_(), W.requires_grad_()
        loss = nested_loss(codes.with_values(values), W, b, y, [8, 64])
        return [loss.value.detach(), *torch.autograd.grad(loss.value, (values, W))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


def test_sixteen_bit_dictionaries_sum_in_fp32(close: Callable[..., None]) -> None:
    codes, W, b, _ = inputs(9, 30, 16, dtype=torch.float32)
    got = sparse_decode(codes, W.bfloat16().requires_grad_(), b.bfloat16())
    assert got.dtype == torch.float32
    close(
        got,
        sparse_decode_reference(codes.to_dense(), W.bfloat16().float(), b.bfloat16().float()),
        30,
        scale=5,
    )


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"codes": torch.ones(3, 9)}, TypeError, "codes: expected SparseCodes, got Tensor"),
        ({"W_dec": torch.ones(8, 4)}, ValueError, r"W_dec: expected shape \[9, \*\], got \[8, 4\]"),
        ({"b_dec": torch.ones(5)}, ValueError, r"b_dec: expected shape \[4\], got \[5\]"),
        ({"y": torch.ones(3, 5)}, ValueError, r"y: expected shape \[3, 4\], got \[3, 5\]"),
        ({"widths": [3, 3, 9]}, ValueError, "widths: expected cumulative, strictly increasing"),
        ({"widths": [0, 9]}, ValueError, "widths"),
        ({"widths": []}, ValueError, "widths"),
        ({"widths": [3, 10]}, ValueError, "none beyond d_sae = 9"),
        ({"weights": [1.0]}, ValueError, "weights: expected one a prefix, 2, got 1"),
        ({"token_weights": torch.ones(2)}, ValueError, r"token_weights: expected shape \[3\]"),
    ],
)
def test_bad_arguments_are_refused_by_name(change: dict, error: type[Exception], words: str) -> None:
    good = {
        "codes": SparseCodes.from_dense(torch.ones(3, 9)),
        "W_dec": torch.ones(9, 4),
        "b_dec": torch.zeros(4),
        "y": torch.ones(3, 4),
        "widths": [3, 9],
    }
    with pytest.raises(error, match=words):
        nested_loss(**{**good, **change})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_squared_errors_of_sixteen_bit_values_are_summed_in_fp32(dtype: torch.dtype) -> None:
    """256 errors of about 100 a token: their squares sum to 40 times what fp16 can hold, gradients of means to far less."""
    g = torch.Generator().manual_seed(0)
    codes = SparseCodes.from_dense((torch.rand(40, 30, generator=g) + 0.5).to(dtype))
    W, b, y = (100 * torch.randn(n, 256, generator=g).to(dtype) for n in (30, 1, 40))
    values, W = codes.values.clone().requires_grad_(), W.requires_grad_()
    found = nested_loss(codes.with_values(values), W, b[0], y, [10, 30], [0.5, 0.5])
    z = codes.to_dense().double().requires_grad_()
    want, _ = nested_loss_reference(z, W.detach().double(), b[0].double(), y.double(), [10, 30])
    torch.testing.assert_close(found.per_prefix.double(), want, rtol=1e-5, atol=0)
    assert found.residual.dtype == dtype
    found.value.backward()
    (exact,) = torch.autograd.grad(want.sum() / 2, z)
    assert values.grad is not None
    assert values.grad.dtype == dtype
    got = values.grad.double()
    assert float((got - exact[codes.rows(), codes.indices]).norm() / exact.norm()) < 2 * torch.finfo(dtype).eps
