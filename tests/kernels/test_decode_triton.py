"""Backend `triton` of the decode ops against the float64 reference and against backend `torch`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from transcoder.kernels import SparseCodes, nested_loss, sparse_decode, use_backend
from transcoder.kernels.decode import config
from transcoder.kernels.decode.reference import nested_loss_reference, sparse_decode_reference


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


def test_asked_for_by_name_with_tensors_it_cannot_reach(monkeypatch: pytest.MonkeyPatch) -> None:
    from transcoder.kernels import triton_support

    monkeypatch.setattr(triton_support, "interpreted", lambda: False)
    with pytest.raises(RuntimeError, match="sparse_decode: backend 'triton' runs on CUDA tensors, got cpu"):
        triton_support.check_device("sparse_decode", torch.device("cpu"))


def inputs(
    rows: int, d_sae: int, d_out: int, seed: int = 0, dtype: torch.dtype = torch.float64, density: float = 0.3
) -> tuple[SparseCodes, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(rows, d_sae, generator=g, dtype=dtype) * (torch.rand(rows, d_sae, generator=g) < density)
    W = torch.randn(d_sae, d_out, generator=g, dtype=dtype)
    b = torch.randn(d_out, generator=g, dtype=dtype)
    return SparseCodes.from_dense(z), W, b, torch.randn(rows, d_out, generator=g, dtype=dtype)


def to(device: torch.device, codes: SparseCodes, *tensors: Tensor) -> tuple:
    moved = SparseCodes(codes.values.to(device), codes.indices.to(device), codes.row_ptr.to(device), codes.shape)
    return moved, *(t.to(device) for t in tensors)


def check_decode(codes: SparseCodes, W: Tensor, b: Tensor, close: Callable[..., None]) -> None:
    leaves = codes.values.clone().requires_grad_(), W.detach().requires_grad_(), b.detach().requires_grad_()
    z = codes.to_dense().double().requires_grad_()
    wide = W.detach().double().requires_grad_(), b.detach().double().requires_grad_()
    with use_backend("triton"):
        got = sparse_decode(codes.with_values(leaves[0]), *leaves[1:])
        got_grads = torch.autograd.grad(got.sin().sum(), leaves)
    want = sparse_decode_reference(z, *wide)
    want_grads = torch.autograd.grad(want.sin().sum(), (z, *wide))
    rows, d_sae = codes.shape
    # The sine's slope carries an error of the sum (d_sae terms) into sums of d_out and of B terms.
    close(got, want, d_sae, scale=5)
    close(got_grads[0], want_grads[0][codes.rows(), codes.indices], max(W.shape[1], d_sae), scale=10)
    close(got_grads[1], want_grads[1], max(rows, d_sae), scale=10)
    close(got_grads[2], want_grads[2], max(rows, d_sae), scale=10)


SHAPES = [(1, 1, 1), (5, 9, 3), (9, 30, 33), (0, 5, 3), (6, 5, 0), (2, 6, 2311)]


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_decode_and_its_gradients(
    shape: tuple[int, int, int], dtype: torch.dtype, triton_device: torch.device, close: Callable[..., None]
) -> None:
    codes, W, b, _ = to(triton_device, *inputs(*shape, dtype=dtype))
    check_decode(codes, W, b, close)


def check_nested(
    codes: SparseCodes,
    W: Tensor,
    b: Tensor,
    y: Tensor,
    widths: list[int],
    tokens: Tensor | None,
    close: Callable[..., None],
) -> None:
    leaves = [t.detach().clone(memory_format=torch.preserve_format).requires_grad_() for t in (codes.values, W, b, y)]
    z, *wide = (t.detach().double().requires_grad_() for t in (codes.to_dense(), W, b, y))
    weights = [0.5 + i for i in range(len(widths))]
    with use_backend("triton"):
        got = nested_loss(codes.with_values(leaves[0]), *leaves[1:], widths, weights, token_weights=tokens)
        got_grads = torch.autograd.grad(got.value + got.per_prefix[0].sin(), leaves)
    losses, residual = nested_loss_reference(z, *wide, widths, None if tokens is None else tokens.double())
    (rows, d_sae), d_out = codes.shape, W.shape[1]
    close(got.residual, residual.detach(), d_sae, scale=5)
    if y.numel() == 0:
        assert got.per_prefix.tolist() == [0.0] * len(widths)
        assert all(bool((g == 0).all()) for g in got_grads)
        return
    value = (losses * torch.tensor(weights, dtype=torch.float64, device=W.device)).sum()
    close(got.per_prefix, losses, max(rows * d_out, d_sae), scale=5)
    want_grads = torch.autograd.grad(value + losses[0].sin(), (z, *wide))
    close(got_grads[0], want_grads[0][codes.rows(), codes.indices], max(d_out, d_sae), scale=10)
    for actual, expected in zip(got_grads[1:], want_grads[1:], strict=True):
        close(actual, expected, max(rows * d_out, d_sae), scale=10)


@pytest.mark.interpreted
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("shape", "widths"),
    [
        ((1, 1, 1), [1]),
        ((5, 9, 3), [9]),
        ((5, 9, 3), [1, 2, 3, 9]),
        ((7, 40, 33), [10, 11, 30, 40]),
        ((7, 20, 4), [3, 12]),
        ((0, 5, 3), [2, 5]),
        ((4, 5, 0), [2, 5]),
        ((1, 9, 2304), [2, 3, 7, 9]),
        ((1, 40, 257), [39, 40]),
    ],
)
def test_nested_loss_and_its_gradients(
    shape: tuple[int, int, int],
    widths: list[int],
    weighted: bool,
    triton_device: torch.device,
    close: Callable[..., None],
) -> None:
    codes, W, b, y = to(triton_device, *inputs(*shape))
    tokens = torch.linspace(0.0, 1.5, shape[0], dtype=torch.float64, device=triton_device) if weighted else None
    check_nested(codes, W, b, y, widths, tokens, close)


@pytest.mark.interpreted
@pytest.mark.parametrize("d_out", [64, 300])
def test_fp32(d_out: int, triton_device: torch.device, close: Callable[..., None]) -> None:
    codes, W, b, y = to(triton_device, *inputs(6, 50, d_out, dtype=torch.float32))
    check_nested(codes, W, b, y, [7, 30, 50], None, close)


@pytest.mark.interpreted
def test_slabs_of_columns_one_after_another(
    triton_device: torch.device, close: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "SLAB_BYTES", 1)
    codes, W, b, y = to(triton_device, *inputs(3, 20, 300))
    check_nested(codes, W, b, y, [6, 13, 20], None, close)


@pytest.mark.interpreted
def test_a_latent_in_every_row_and_rows_of_no_entry(triton_device: torch.device, close: Callable[..., None]) -> None:
    """131 entries of one latent are split over programs; BatchTopK leaves some rows empty and fills others."""
    g = torch.Generator().manual_seed(3)
    z = torch.rand(131, 12, generator=g, dtype=torch.float64) * (torch.rand(131, 12, generator=g) < 0.1)
    z[:, 5] = 1
    z[::7] = 0
    z[3] = 2
    codes = SparseCodes.from_dense(z)
    W, b = torch.randn(12, 3, generator=g, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    y = torch.randn(131, 3, generator=g, dtype=torch.float64)
    codes, W, b, y = to(triton_device, codes, W, b, y)
    check_decode(codes, W, b, close)
    check_nested(codes, W, b, y, [5, 6, 12], None, close)


@pytest.mark.interpreted
def test_strided_inputs_and_stored_zeros(triton_device: torch.device, close: Callable[..., None]) -> None:
    codes, W, b, y = to(triton_device, *inputs(5, 9, 6, density=0.9))
    values = torch.where(torch.arange(codes.nnz, device=triton_device) % 3 == 0, 0.0, codes.values)
    wide = torch.stack([values, torch.full_like(values, torch.nan)], 1)
    codes = codes.with_values(wide[:, 0])
    W, y = W.T.contiguous().T, torch.cat([y, y], 1)[:, ::2]
    check_decode(codes, W, b, close)
    check_nested(codes, W, b, y, [2, 9], None, close)


@pytest.mark.interpreted
def test_sixteen_bit_dictionaries_sum_in_fp32(triton_device: torch.device, close: Callable[..., None]) -> None:
    codes, W, b, y = to(triton_device, *inputs(4, 30, 40, dtype=torch.float32))
    low_W, low_b = W.bfloat16(), b.bfloat16()
    with use_backend("triton"):
        got = sparse_decode(codes, low_W, low_b)
        loss = nested_loss(codes, low_W, low_b, y, [8, 30])
    assert got.dtype == loss.per_prefix.dtype == torch.float32
    z = codes.to_dense().double()
    close(got, sparse_decode_reference(z, low_W.double(), low_b.double()), 30, scale=5)
    want, residual = nested_loss_reference(z, low_W.double(), low_b.double(), y.double(), [8, 30])
    close(loss.per_prefix, want, 160, scale=5)
    close(loss.residual, residual, 30, scale=5)


@pytest.mark.interpreted
def test_sixteen_bit_values_match_backend_torch(triton_device: torch.device) -> None:
    codes, W, b, y = to(triton_device, *inputs(4, 20, 33, dtype=torch.bfloat16))
    found = []
    for backend in ("triton", "torch"):
        leaves = [t.clone().requires_grad_() for t in (codes.values, W, b, y)]
        with use_backend(backend):
            loss = nested_loss(codes.with_values(leaves[0]), *leaves[1:], [5, 20])
            grads = torch.autograd.grad(loss.value, leaves)
        found.append([loss.value.detach(), loss.per_prefix.detach(), loss.residual, *grads])
    for n, (mine, theirs) in enumerate(zip(*found, strict=True)):
        # Losses are sums of squares and stay wide; the rest has the type of what it belongs to.
        assert mine.dtype == theirs.dtype == (torch.float32 if n < 2 else torch.bfloat16)
        # Both round to 8 bits at the end, of sums of up to 20 terms of size about 2.
        torch.testing.assert_close(mine, theirs, rtol=0.1, atol=20**0.5 * 2 * 2**-8)


@pytest.mark.interpreted
def test_latents_beyond_the_widest_prefix_get_no_gradient(triton_device: torch.device) -> None:
    codes, W, b, y = to(triton_device, *inputs(6, 10, 4, density=0.8))
    values, W = codes.values.clone().requires_grad_(), W.requires_grad_()
    with use_backend("triton"):
        loss = nested_loss(codes.with_values(values), W, b, y, [3, 7])
        grad_values, grad_W = torch.autograd.grad(loss.value, (values, W))
    assert bool((grad_values[codes.indices >= 7] == 0).all())
    assert bool((grad_W[7:] == 0).all())
    assert bool((grad_W[:7].abs().sum(1) > 0).all())


@pytest.mark.interpreted
def test_nan_reaches_its_row_and_stops_there(triton_device: torch.device) -> None:
    codes, W, b, y = to(triton_device, *inputs(5, 9, 33, dtype=torch.float32))
    y[2, 7] = torch.nan
    values = codes.values.clone().requires_grad_()
    with use_backend("triton"):
        loss = nested_loss(codes.with_values(values), W, b, y, [4, 9])
        (grad,) = torch.autograd.grad(loss.value, values)
    assert bool(loss.per_prefix.isnan().all())
    assert loss.residual.isnan().nonzero().tolist() == [[2, 7]]
    assert torch.equal(grad.isnan(), codes.rows() == 2)


@pytest.mark.interpreted
def test_bitwise_reproducible_and_uninitialised_memory_never_read(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run() -> list[Tensor]:
        codes, W, b, y = to(triton_device, *inputs(6, 30, 65, dtype=torch.float32))
        values, W = codes.values.clone().requires_grad_(), W.requires_grad_()
        with use_backend("triton"):
            loss = nested_loss(codes.with_values(values), W, b, y, [8, 20])
            out = sparse_decode(codes.with_values(values), W, b)
            return [loss.value.detach(), out.detach(), *torch.autograd.grad(loss.value + out.sum(), (values, W))]

    first = run()
    empty = torch.empty

    def poisoned(*size: int, **options: object) -> Tensor:
        made = empty(*size, **options)  # type: ignore[call-overload]
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch, "empty", poisoned)
    monkeypatch.setattr(torch, "empty_like", lambda t, **o: poisoned(*t.shape, dtype=t.dtype, device=t.device))
    for before, after in zip(first, run(), strict=True):
        assert torch.equal(before, after)
