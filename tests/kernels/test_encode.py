from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import SparseCodes, batch_topk_encode, threshold_encode, topk_encode
from transcoder.kernels.encode import torch_backend
from transcoder.kernels.encode.reference import (
    batch_topk_encode_reference,
    threshold_encode_reference,
    topk_encode_reference,
)

pytestmark = pytest.mark.usefixtures("cpu_backend")

OPS = {
    "topk": (topk_encode, topk_encode_reference),
    "batch_topk": (batch_topk_encode, batch_topk_encode_reference),
    "threshold": (threshold_encode, threshold_encode_reference),
}
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 5), (7, 5, 33, 4), (130, 16, 257, 3), (3, 8, 1000, 1), (65, 2, 7, 6)]


def inputs(rows: int, d_in: int, d_sae: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, d_in, generator=g, dtype=dtype),
        torch.randn(d_sae, d_in, generator=g, dtype=dtype),
        torch.randn(d_sae, generator=g, dtype=dtype),
    )


def check_form(codes: SparseCodes) -> None:
    """Compressed rows as promised: ascending unique ids in range, monotone pointers, no negative value."""
    ptr = codes.row_ptr.tolist()
    assert ptr[0] == 0
    assert ptr[-1] == codes.nnz
    for a, b in itertools.pairwise(ptr):
        assert a <= b
        row = codes.indices[a:b]
        assert bool((row.diff() > 0).all())
        if row.numel():
            assert int(row[0]) >= 0
            assert int(row[-1]) < codes.shape[1]
    assert bool((codes.values >= 0).all())


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_forward_and_gradients_match_the_float64_reference(
    name: str, shape: tuple[int, ...], device: torch.device, close: Callable[..., None]
) -> None:
    rows, d_in, d_sae, k = shape
    op, reference = OPS[name]
    argument = 0.3 if name == "threshold" else k
    wide = [t.to(device).requires_grad_() for t in inputs(rows, d_in, d_sae)]
    codes, dense = op(*wide, argument), reference(*wide, argument)
    check_form(codes)
    close(codes.to_dense(), dense, d_in, scale=10)
    if name != "threshold":
        assert codes.nnz == rows * k
    weight = torch.randn(rows, d_sae, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(device)
    got = torch.autograd.grad((codes.to_dense().sin() * weight).sum(), wide)
    want = torch.autograd.grad((dense.sin() * weight).sum(), wide)
    for actual, expected in zip(got, want, strict=True):
        close(actual, expected, rows * d_sae, scale=10)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
@given(
    rows=st.integers(1, 12),
    d_sae=st.integers(1, 24),
    k_share=st.floats(0, 1),
    levels=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    shift=st.sampled_from([-3.0, -0.5, 0.0, 0.5]),
)
@settings(max_examples=80, deadline=None)
def test_ties_flat_rows_and_too_few_positives_are_exact(
    name: str, rows: int, d_sae: int, k_share: float, levels: int, seed: int, shift: float
) -> None:
    """Few distinct values make ties everywhere; a negative shift leaves fewer positives than k; identity input makes the
    pre-activations exact, so the selection must be the reference's to the entry."""
    g = torch.Generator().manual_seed(seed)
    pre = torch.randint(0, levels, (rows, d_sae), generator=g).double() + shift
    x, W, b = (
        torch.eye(rows, dtype=torch.float64),
        pre.T.contiguous(),
        torch.zeros(d_sae, dtype=torch.float64),
    )
    k = max(1, round(k_share * d_sae))
    op, reference = OPS[name]
    codes = op(x, W, b, k)
    check_form(codes)
    assert codes.nnz == rows * k
    assert torch.equal(codes.to_dense(), reference(x, W, b, k))
    again = op(x, W, b, k)
    assert torch.equal(codes.indices, again.indices)


def test_ties_go_to_the_lowest_latent() -> None:
    x, W, b = torch.ones(3, 1), torch.ones(50, 1), torch.zeros(50)
    assert topk_encode(x, W, b, 4).indices.tolist() == [0, 1, 2, 3] * 3
    assert batch_topk_encode(x, W, b, 4).indices.tolist() == list(range(12))


def test_gradient_stops_at_inactive_entries() -> None:
    x = torch.tensor([[1.0]], requires_grad=True)
    W, b = torch.tensor([[1.0], [-1.0], [0.0]], requires_grad=True), torch.zeros(3, requires_grad=True)
    codes = topk_encode(x, W, b, 3)
    assert codes.values.tolist() == [1.0, 0.0, 0.0]
    codes.values.sum().backward()
    assert b.grad.tolist() == [1.0, 0.0, 0.0]
    assert x.grad.tolist() == [[1.0]]


@pytest.mark.parametrize("name", OPS)
def test_no_rows(name: str, device: torch.device) -> None:
    x, W, b = (t.to(device).requires_grad_() for t in inputs(0, 4, 9))
    codes = OPS[name][0](x, W, b, 2)
    assert codes.nnz == 0
    assert codes.to_dense().shape == (0, 9)
    codes.values.sum().backward()
    assert torch.equal(W.grad, torch.zeros_like(W))


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("chunk", [1, 50, 1 << 20])
def test_chunk_size_does_not_change_the_result(name: str, chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x, W, b = inputs(37, 6, 40)
    monkeypatch.setattr(torch_backend, "MIN_CHUNK_ROWS", 1)
    monkeypatch.setitem(torch_backend.CHUNK_ELEMENTS, "cpu", chunk)
    codes = OPS[name][0](x, W, b, 3)
    torch.testing.assert_close(codes.to_dense(), OPS[name][1](x, W, b, 3))


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
def test_the_path_without_host_reads_gives_the_same_entries(name: str) -> None:
    """What accelerators run, run here: ties, zeros and plain rows."""
    g = torch.Generator().manual_seed(3)
    x = torch.randint(-2, 3, (40, 3), generator=g).float()
    W, b = torch.randint(-2, 3, (30, 3), generator=g).float(), torch.zeros(30)
    codes = OPS[name][0](x, W, b, 4)
    if name == "topk":
        indices = torch_backend._topk_ids_static(torch.relu(x @ W.T), 4)
        assert torch.equal(indices.flatten(), codes.indices)
    else:
        chunks = torch_backend._activation_chunks(x, W, b)
        values, flat = torch_backend._collect_static(chunks, 160, 30)
        assert torch.equal(flat, codes.rows() * 30 + codes.indices)
        assert torch.equal(values, codes.values)


@pytest.mark.parametrize("order", ["rising", "falling", "spike"])
def test_batch_topk_when_the_first_rows_mislead_the_guess(order: str) -> None:
    x, W, b = inputs(200, 6, 50)
    scale = torch.linspace(0.01, 5, 200, dtype=torch.float64)[:, None]
    x = x * {"rising": scale, "falling": scale.flip(0), "spike": torch.where(scale > 4.9, 100.0, 0.01)}[order]
    codes = batch_topk_encode(x, W, b * 0, 4)
    assert codes.nnz == 800
    torch.testing.assert_close(codes.to_dense(), batch_topk_encode_reference(x, W, b * 0, 4))


@pytest.mark.parametrize("name", OPS)
def test_bitwise_reproducible(name: str, device: torch.device) -> None:
    def run() -> list[Tensor]:
        x, W, b = (t.to(device).requires_grad_() for t in inputs(70, 16, 300, dtype=torch.float32))
        codes = OPS[name][0](x, W, b, 5)
        return [codes.values, codes.indices, *torch.autograd.grad(codes.values.square().sum(), (x, W, b))]

    for first, second in zip(run(), run(), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPS)
def test_sixteen_bit_inputs_accumulate_in_fp32(
    name: str, dtype: torch.dtype, device: torch.device, close: Callable[..., None]
) -> None:
    x, W, b = (t.to(device, dtype) for t in inputs(20, 64, 90, dtype=torch.float32))
    codes = OPS[name][0](x, W, b, 4)
    assert codes.dtype == torch.float32
    # Products of 16-bit numbers are exact in fp32: only the sum rounds, so the fp64 selection is right but for near-ties.
    dense = OPS[name][1](x.double(), W.double(), b.double(), 4)
    close(codes.to_dense().sum(), dense.sum().float(), 64 * 80, scale=4)
    assert float(((codes.to_dense() > 0) != (dense > 0)).double().mean()) < 0.01


def test_autocast_rounds_the_inputs_and_leaves_gradients_wide() -> None:
    x, W, b = (t.requires_grad_() for t in inputs(20, 16, 40, dtype=torch.float32))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        codes = topk_encode(x, W, b, 4)
    rounded = topk_encode(x.bfloat16().float(), W.bfloat16().float(), b, 4)
    assert torch.equal(codes.to_dense(), rounded.to_dense())
    codes.values.sum().backward()
    assert W.grad.dtype == torch.float32


def test_strided_inputs_are_read_as_they_are(close: Callable[..., None]) -> None:
    x, W, b = inputs(24, 10, 36)
    codes = topk_encode(x.T.contiguous().T[::2], W.T.contiguous().T, b, 3)
    close(codes.to_dense(), topk_encode_reference(x[::2], W, b, 3), 10, scale=10)


@pytest.mark.parametrize("name", ["topk", "batch_topk"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_bad_number_is_seen_not_lost(name: str, bad: float) -> None:
    x, W, b = inputs(6, 4, 20)
    x[3, 1] = bad
    codes = OPS[name][0](x, W, b, 3)
    check_ids = codes.indices
    assert int(check_ids.min()) >= 0
    assert int(check_ids.max()) < 20
    assert not bool(torch.isfinite(codes.values).all())
    with pytest.raises(ValueError, match="NaN or Inf in 1 rows, the first is row 3"):
        OPS[name][0](x, W, b, 3, checks="full")


def test_no_dense_activations_are_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither direction makes a tensor of B * d_sae elements, whatever its shape."""
    from torch.utils._python_dispatch import TorchDispatchMode

    rows, d_in, d_sae, k = 256, 4, 512, 3
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(t, Tensor):
                    largest = max(largest, t.numel())
            return out

    x, W, b = (t.requires_grad_() for t in inputs(rows, d_in, d_sae, dtype=torch.float32))
    with Watch():
        for op in (topk_encode, batch_topk_encode):
            op(x, W, b, k).values.sum().backward()
    assert d_sae * k < largest <= rows * d_sae // 2


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"k": 0}, ValueError, "k: expected between 1 and d_sae = 9, got 0"),
        ({"k": 10}, ValueError, "k: expected between 1 and d_sae = 9, got 10"),
        ({"k": 2.0}, TypeError, "k: expected an int"),
        ({"x": torch.ones(3, 5)}, ValueError, r"x: expected shape \[\*, 4\], got \[3, 5\]"),
        ({"x": torch.ones(4)}, ValueError, "x: expected shape"),
        ({"x": torch.ones(3, 4, dtype=torch.int64)}, TypeError, "x: expected float32.*int64"),
        ({"x": [[1.0]]}, TypeError, "x: expected a tensor, got list"),
        ({"b_enc": torch.ones(8)}, ValueError, r"b_enc: expected shape \[9\], got \[8\]"),
        ({"W_enc": torch.ones(0, 4)}, ValueError, "at least one latent"),
        ({"x": torch.ones(3, 4, device="meta")}, ValueError, "one device"),
        ({"checks": "some"}, ValueError, "expected 'fast' or 'full'"),
    ],
)
@pytest.mark.parametrize("op", [topk_encode, batch_topk_encode])
def test_bad_arguments_are_refused_by_name(
    op: Callable[..., SparseCodes], change: dict, error: type[Exception], words: str
) -> None:
    good = {"x": torch.ones(3, 4), "W_enc": torch.ones(9, 4), "b_enc": torch.zeros(9), "k": 2}
    with pytest.raises(error, match=words):
        op(**{**good, **change})


def test_threshold_per_latent_and_bad_thresholds() -> None:
    x, W, b = inputs(5, 3, 8)
    limits = torch.linspace(0, 2, 8, dtype=torch.float64)
    codes = threshold_encode(x, W, b, limits)
    torch.testing.assert_close(codes.to_dense(), threshold_encode_reference(x, W, b, limits))
    for bad in (-0.1, float("nan")):
        with pytest.raises(ValueError, match="expected at least 0"):
            threshold_encode(x, W, b, bad)
    with pytest.raises(ValueError, match=r"expected a number or shape \[8\]"):
        threshold_encode(x, W, b, torch.ones(7))
