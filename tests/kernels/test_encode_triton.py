"""Backend `triton` of the encode ops against the references and, entry for entry, backend `torch`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import (
    SparseCodes,
    active_backend,
    batch_topk_encode,
    threshold_encode,
    topk_encode,
    use_backend,
)
from transcoder.kernels.encode import config, torch_backend, triton_backend
from transcoder.kernels.encode.reference import (
    batch_topk_encode_reference,
    threshold_encode_reference,
    topk_encode_reference,
)


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


SHAPES = [(1, 1, 1, 1), (2, 3, 5, 5), (7, 5, 33, 4), (17, 20, 81, 3), (3, 8, 300, 1), (9, 2, 7, 6), (2, 3, 70, 50)]


def inputs(rows: int, d_in: int, d_sae: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(rows, d_in, generator=g).to(dtype),
        torch.randn(d_sae, d_in, generator=g).to(dtype),
        torch.randn(d_sae, generator=g),
    )


def whole_numbers(rows: int, d_in: int, d_sae: int, seed: int, low: int = -2, high: int = 2) -> tuple[Tensor, ...]:
    """Inputs whose products are exact in fp32, full of ties."""
    g = torch.Generator().manual_seed(seed)
    sizes = ((rows, d_in), (d_sae, d_in), (d_sae,))
    x, W, b = (torch.randint(low, high + 1, size, generator=g).float() for size in sizes)
    return x, W, b


def same(found: torch_backend.Selection, expected: torch_backend.Selection) -> None:
    for name, a, e in zip(found._fields, found, expected, strict=True):
        assert a.dtype == e.dtype, name
        assert torch.equal(a, e), name


Select = Callable[..., torch_backend.Selection]
SMALL_TILE = config.ProductLaunch(16, 16, 16, 1, 1, "many tiles of a small problem")


@pytest.fixture
def select(triton_device: torch.device) -> Select:
    """select(op, x, W, b, argument) on backend `triton`, from and to the CPU."""

    def run(op: str, x: Tensor, W: Tensor, b: Tensor, argument: object) -> torch_backend.Selection:
        triton_backend.counters(triton_device, reset=True)
        moved = [t.to(triton_device) for t in (x, W, b)]
        if isinstance(argument, Tensor):
            argument = argument.to(triton_device)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(config, "product_launch", lambda *_: SMALL_TILE)
            found = getattr(triton_backend, f"select_{op}")(*moved, argument)
        return torch_backend.Selection(*(t.cpu() for t in found))

    return run


@pytest.fixture(autouse=True)
def fresh_memory_is_poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a kernel fails to write shows: floats are NaN, integers far out of range."""
    plain = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        t = plain(*args, **kwargs)  # type: ignore[call-overload]
        return t.fill_(float("nan") if t.is_floating_point() else torch.iinfo(t.dtype).max // 3)

    monkeypatch.setattr(torch, "empty", poisoned)


# choice: which backend serves, and what it refuses


@pytest.mark.interpreted
def test_choice_by_name(triton_device: torch.device) -> None:
    assert active_backend(triton_device) != "triton"
    with use_backend("triton"):
        assert active_backend(triton_device, "encode") == "triton"


@pytest.mark.interpreted
def test_choice_float64_is_refused_by_name(select: Select) -> None:
    x, W, b = inputs(2, 3, 9)
    with pytest.raises(TypeError, match=r"topk_encode: backend triton: expected float32.*float64"):
        select("topk", x.double(), W.double(), b.double(), 2)


@pytest.mark.interpreted
def test_choice_of_tf32_follows_each_of_pytorchs_switches(triton_device: torch.device) -> None:
    x, W, b = (t.to(triton_device) for t in inputs(2, 3, 9))
    matmul, general = torch.backends.cuda.matmul, torch.backends
    switches = [(matmul, "allow_tf32", False, True), (matmul, "fp32_precision", "ieee", "tf32")]
    switches.append((general, "fp32_precision", "none", "tf32"))
    before = matmul.fp32_precision, general.fp32_precision
    try:
        for where, name, off, on in switches:
            matmul.fp32_precision = "none"
            for value, precision in ((on, "tf32"), (off, "ieee")):
                setattr(where, name, value)
                assert triton_backend.Product(x, W, b, "topk_encode").precision == precision, (name, value)
                assert triton_backend.Product(x.half(), W.half(), b, "topk_encode").precision == "ieee"
    finally:
        matmul.fp32_precision, general.fp32_precision = before


def test_choice_of_kept_entries_covers_every_winner_or_is_rare() -> None:
    assert config.kept_entries(48, 18432, 128) == 6
    assert config.kept_entries(48, 18432, 128, spread=2) == 7
    assert config.kept_entries(9, 9, 16) == 9
    for k, d_sae in ((1, 1), (1, 5), (64, 131072), (512, 18432), (18432, 18432), (3, 17)):
        kept = config.kept_entries(k, d_sae, 128)
        tiles = -(-d_sae // 128)
        assert 1 <= kept <= 128
        assert kept * tiles >= min(k, d_sae)


# topk


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), (SHAPES[3], torch.bfloat16), (SHAPES[3], torch.float16)],
)
def test_topk_is_exact_on_tied_whole_numbers(select: Select, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    rows, d_in, d_sae, k = shape
    x, W, b = whole_numbers(rows, d_in, d_sae, seed=rows + d_sae)
    found = select("topk", x.to(dtype), W.to(dtype), b, k)
    same(found, torch_backend.select_topk(x, W, b, k))


@pytest.mark.parametrize("shape", SHAPES[3:5])
@pytest.mark.interpreted
def test_topk_of_real_numbers(shape: tuple[int, ...], close: Callable[..., None]) -> None:
    rows, d_in, d_sae, k = shape
    x, W, b = inputs(rows, d_in, d_sae)
    with use_backend("triton"):
        codes = topk_encode(x, W, b, k)
    close(codes.to_dense(), topk_encode_reference(x.double(), W.double(), b.double(), k), d_in, scale=10)


@pytest.mark.parametrize(
    ("name", "low", "high", "bias"),
    [("flat", 1, 1, 0.0), ("negative", 0, 0, -1.0), ("zero", 0, 0, 0.0), ("few", 0, 1, -4.0)],
)
@pytest.mark.interpreted
def test_topk_of_flat_negative_and_sparse_rows(
    select: Select, triton_device: torch.device, name: str, low: int, high: int, bias: float
) -> None:
    x, W, b = whole_numbers(5, 5, 70, seed=1, low=low, high=high)
    same(select("topk", x, W, b * 0 + bias, 9), torch_backend.select_topk(x, W, b * 0 + bias, 9))
    assert triton_backend.counters(triton_device).rescanned == 0, name


@given(
    rows=st.integers(0, 5),
    d_sae=st.integers(1, 70),
    k_share=st.floats(0, 1),
    kept=st.integers(1, 5),
    spread=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@pytest.mark.interpreted
def test_topk_with_too_few_kept_is_rescanned_and_exact(
    select: Select,
    triton_device: torch.device,
    rows: int,
    d_sae: int,
    k_share: float,
    kept: int,
    spread: int,
    seed: int,
) -> None:
    """Whatever a tile keeps, the result is the same; and rows are certified exactly where no open tile reached the cut."""
    k = max(1, round(k_share * d_sae))
    x, W, b = whole_numbers(rows, 3, d_sae, seed, -spread, spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "kept_entries", lambda *_, **__: kept)
        same(select("topk", x, W, b, k), torch_backend.select_topk(x, W, b, k))
    seen = triton_backend.counters(triton_device)
    assert seen.certified + seen.rescanned == rows
    assert seen.rescanned == open_rows(torch.relu(x @ W.T + b), k, kept)


def open_rows(activations: Tensor, k: int, kept: int) -> int:
    """The certificate in plain words: per row, is some tile's last kept entry among the k best of all that was kept?"""
    d_sae = activations.shape[1]
    tiles = -(-d_sae // 16)
    number = 0
    for row in activations.tolist():
        order = sorted(range(d_sae), key=lambda i: (-row[i], i))
        by_tile = [[i for i in order if i % tiles == t] for t in range(tiles)]
        held = {i for own in by_tile for i in own[:kept]}
        best = set([i for i in order if i in held and row[i] > 0][:k])
        number += any(len(own) > kept and own[kept - 1] in best for own in by_tile)
    return number


@pytest.mark.interpreted
def test_topk_forced_failure_in_one_row_is_counted_and_repaired(select: Select, triton_device: torch.device) -> None:
    """All of one row's winners in one tile: latents congruent modulo the number of tiles."""
    rows, d_sae, k = 6, 160, 8
    pre = torch.rand(rows, d_sae, generator=torch.Generator().manual_seed(0))
    pre[4, torch.arange(k) * 10 + 3] += 5
    x, W, b = torch.eye(rows), pre.T.contiguous(), torch.zeros(d_sae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "kept_entries", lambda *_, **__: 7)
        found = select("topk", x, W, b, k)
    same(found, torch_backend.select_topk(x, W, b, k))
    assert triton_backend.counters(triton_device) == (rows - 1, 1)


@pytest.mark.interpreted
@pytest.mark.parametrize("kept", [1, 3, 16])
def test_topk_in_chunks_of_entries(select: Select, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SELECT_CHUNK", 32)
    monkeypatch.setattr(config, "RESCAN_CHUNK", 16)
    monkeypatch.setattr(config, "kept_entries", lambda *_, **__: kept)
    x, W, b = whole_numbers(2, 3, 70, seed=2)
    same(select("topk", x, W, b, 20), torch_backend.select_topk(x, W, b, 20))


@pytest.mark.interpreted
def test_topk_in_rounds_of_rows(select: Select, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "SCRATCH_BYTES", 1)
    x, W, b = whole_numbers(20, 4, 20, seed=2)
    same(select("topk", x, W, b, 5), torch_backend.select_topk(x, W, b, 5))


@pytest.mark.interpreted
def test_topk_reads_strided_inputs(select: Select) -> None:
    x, W, b = whole_numbers(24, 10, 36, seed=3)
    expected = torch_backend.select_topk(x[::2, 1:8], W[:, 1:8].contiguous(), b, 3)
    found = select("topk", x.T.contiguous().T[::2, 1:8], W.T.contiguous().T[:, 1:8], b, 3)
    same(found, expected)


@pytest.mark.parametrize(("bad", "kept"), [(float("nan"), 1), (float("inf"), 1), (float("nan"), 5), (float("-inf"), 5)])
@pytest.mark.interpreted
def test_topk_bad_numbers_are_seen_and_stay_in_range(
    select: Select, bad: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "kept_entries", lambda *_, **__: kept)
    x, W, b = inputs(6, 4, 50)
    x[3, 1] = bad
    found = select("topk", x, W, b, 5)
    codes = SparseCodes(*found, (6, 50))
    dense = codes.to_dense()
    assert int(codes.indices.min()) >= 0
    assert int(codes.indices.max()) < 50
    assert bool((codes.indices.view(6, 5).diff(dim=1) > 0).all())
    assert not bool(torch.isfinite(dense[3]).all())
    good = [0, 1, 2, 4, 5]
    torch.testing.assert_close(dense[good], topk_encode_reference(x, W, b, 5)[good])


@pytest.mark.interpreted
def test_topk_one_nan_pre_activation_comes_first(select: Select) -> None:
    x, W, b = torch.eye(2), torch.rand(40, 2), torch.zeros(40)
    W[31, 0] = float("nan")
    found = select("topk", x[:1], W, b, 1)
    assert found.indices.tolist() == [31]
    assert bool(found.values.isnan().all())


@pytest.mark.interpreted
def test_topk_repeats_bit_for_bit(select: Select) -> None:
    x, W, b = inputs(5, 7, 50)
    same(select("topk", x, W, b, 6), select("topk", x, W, b, 6))


# batch_topk


@pytest.mark.interpreted
@pytest.mark.parametrize(("op", "rows", "d_in", "d_sae"), [("topk", 17, 32, 48), ("batch_topk", 5, 16, 32)])
def test_described_operands_select_the_same_bits(
    op: str, rows: int, d_in: int, d_sae: int, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By descriptors and by pointers, with ties, NaN, infinity and tiles that are computed again."""
    x, W, b = (t.to(triton_device) for t in whole_numbers(rows, d_in, d_sae, 3))
    x[rows // 2] = x[0]
    x[-1, 0], W[d_sae // 2, 1] = float("nan"), float("inf")
    wide = torch.zeros(rows + 1, d_in + 20, device=triton_device)[1:, 4 : 4 + d_in].copy_(x)
    monkeypatch.setattr(config, "kept_entries", lambda *_, **__: 2)
    select = getattr(triton_backend, f"select_{op}")
    found = []
    for described, rows_of_x in ((False, x), (True, wide)):
        monkeypatch.setattr(config, "product_launch", lambda *_, d=described: replace(SMALL_TILE, described=d))
        assert triton_backend.Product(rows_of_x, W, b, op).described == described
        triton_backend.counters(triton_device, reset=True)
        chosen = select(rows_of_x, W, b, 7)
        found.append(chosen._replace(values=chosen.values.view(torch.int32)))
        assert triton_backend.counters(triton_device).rescanned > 0
    same(found[1], found[0])


@pytest.mark.interpreted
def test_operands_that_descriptors_cannot_reach_go_by_pointers(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "product_launch", lambda *_: replace(SMALL_TILE, described=True))
    x, W, b = (t.to(triton_device) for t in inputs(5, 32, 48))
    more = torch.zeros(5, 33, device=triton_device)
    cases = {
        "columns": (x[:, :31], W[:, :31].contiguous()),
        "latents": (x, W[:47]),
        "rows of W": (x, torch.zeros(48, 64, device=triton_device)[:, :32]),
        "columns of W": (x, W.T.contiguous().T),
        "columns of x": (x.T.contiguous().T, W),
        "stride of x": (more[:, :32], W),
        "expanded x": (x[:1].expand(5, 32), W),
        "address of x": (torch.zeros(5 * 36 + 1, device=triton_device)[1:].view(5, 36)[:, :32], W),
    }
    for name, (a, w) in cases.items():
        assert not triton_backend.Product(a, w, b[: len(w)], name).described, name
    assert triton_backend.Product(x, W, b, "all").described


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES)
def test_batch_is_exact_on_tied_whole_numbers(select: Select, shape: tuple[int, ...]) -> None:
    rows, d_in, d_sae, k = shape
    x, W, b = whole_numbers(rows, d_in, d_sae, seed=rows + d_sae)
    same(select("batch_topk", x, W, b, k), torch_backend.select_batch_topk(x, W, b, k))


@pytest.mark.interpreted
def test_batch_of_real_numbers_without_rows_and_of_float64(select: Select, close: Callable[..., None]) -> None:
    x, W, b = inputs(17, 20, 70)
    found = select("batch_topk", x, W, b, 4)
    dense = SparseCodes(*found, (17, 70)).to_dense()
    close(dense, batch_topk_encode_reference(x.double(), W.double(), b.double(), 4), 20, scale=10)
    same(found, select("batch_topk", x, W, b, 4))
    same(select("batch_topk", x[:0], W, b, 4), torch_backend.select_batch_topk(x[:0], W, b, 4))
    with pytest.raises(TypeError, match=r"batch_topk_encode: backend triton: expected float32.*float64"):
        select("batch_topk", x.double(), W.double(), b.double(), 2)


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("low", "high", "bias"),
    [(1, 1, 0.0), (0, 0, -1.0), (0, 0, 0.0), (0, 1, -4.0)],
    ids=["flat", "negative", "zero", "few"],
)
def test_batch_of_flat_negative_and_sparse_rows(select: Select, low: int, high: int, bias: float) -> None:
    x, W, b = whole_numbers(5, 5, 70, seed=1, low=low, high=high)
    b = b * 0 + bias
    same(select("batch_topk", x, W, b, 9), torch_backend.select_batch_topk(x, W, b, 9))


@pytest.mark.interpreted
@given(
    rows=st.integers(0, 5),
    d_sae=st.integers(1, 70),
    k_share=st.floats(0, 1),
    kept=st.integers(1, 5),
    spread=st.integers(1, 4),
    seed=st.integers(0, 10**6),
)
@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_batch_with_too_few_kept_is_rescanned_and_exact(
    select: Select, rows: int, d_sae: int, k_share: float, kept: int, spread: int, seed: int
) -> None:
    k = max(1, round(k_share * d_sae))
    x, W, b = whole_numbers(rows, 3, d_sae, seed, -spread, spread)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "kept_entries", lambda *_, **__: kept)
        same(select("batch_topk", x, W, b, k), torch_backend.select_batch_topk(x, W, b, k))


@pytest.mark.interpreted
def test_batch_forced_failure_in_one_cell_is_counted_and_repaired(select: Select, triton_device: torch.device) -> None:
    """One token holds most of the batch's winners, more of them in one tile than a tile keeps."""
    rows, d_sae, k = 6, 160, 3
    pre = torch.rand(rows, d_sae, generator=torch.Generator().manual_seed(0))
    pre[4, torch.arange(9) * 10 + 3] += 5
    x, W, b = torch.eye(rows), pre.T.contiguous(), torch.zeros(d_sae)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(config, "kept_entries", lambda *_, **__: 8)
        same(select("batch_topk", x, W, b, k), torch_backend.select_batch_topk(x, W, b, k))
    assert triton_backend.counters(triton_device) == (rows * 10 - 1, 1)


@pytest.mark.interpreted
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("kept", [1, 5])
def test_batch_bad_numbers_are_seen_and_stay_in_range(
    select: Select, bad: float, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(config, "kept_entries", lambda *_, **__: kept)
    x, W, b = inputs(6, 4, 50)
    x[3, 1] = bad
    codes = SparseCodes(*select("batch_topk", x, W, b, 5), (6, 50))
    flat = codes.rows() * 50 + codes.indices
    assert bool((flat.diff() > 0).all())
    assert int(codes.indices.min()) >= 0
    assert int(codes.indices.max()) < 50
    assert codes.nnz == 30
    assert not bool(torch.isfinite(codes.values).all())


# threshold


@pytest.mark.interpreted
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("per_latent", [False, True])
def test_threshold_is_exact_on_whole_numbers(select: Select, shape: tuple[int, ...], per_latent: bool) -> None:
    rows, d_in, d_sae, _ = shape
    x, W, b = whole_numbers(rows, d_in, d_sae, seed=rows + d_sae)
    threshold = torch.arange(d_sae).float() % 3 if per_latent else torch.tensor(1.0)
    same(select("threshold", x, W, b, threshold), torch_backend.select_threshold(x, W, b, threshold))


@pytest.mark.interpreted
def test_threshold_none_all_no_rows_and_strides(select: Select) -> None:
    x, W, b = whole_numbers(18, 6, 40, seed=5)
    limits = torch.arange(80).float()[::2] / 20
    for part, limit in ((x, 1e9), (x, -1.0), (x[:0], 0.0)):
        threshold = torch.tensor(limit)
        same(select("threshold", part, W, b, threshold), torch_backend.select_threshold(part, W, b, threshold))
    strided = (x.T.contiguous().T[::2], W.T.contiguous().T, b, limits)
    same(select("threshold", *strided), torch_backend.select_threshold(*strided))


@pytest.mark.interpreted
def test_threshold_drops_nan_as_the_comparison_does(select: Select) -> None:
    x, W, b = inputs(5, 4, 30)
    x[3, 1] = float("nan")
    found = select("threshold", x, W, b, torch.tensor(0.1))
    same(
        found._replace(values=found.indices),
        torch_backend.select_threshold(x, W, b, torch.tensor(0.1))._replace(values=found.indices),
    )
    assert int(found.row_ptr[4] - found.row_ptr[3]) == 0


# gradients, through the public ops


@pytest.mark.interpreted
@pytest.mark.parametrize(
    ("op", "reference", "argument"),
    [
        (topk_encode, topk_encode_reference, 4),
        (batch_topk_encode, batch_topk_encode_reference, 4),
        (threshold_encode, threshold_encode_reference, 0.3),
    ],
    ids=["topk", "batch", "threshold"],
)
@pytest.mark.parametrize(
    "shape",
    [(1, 1, 5), (9, 5, 33), pytest.param((130, 3, 4), marks=pytest.mark.slow)],
    ids=["one", "odd", "split"],  # test_decode_triton splits a segment every day
)
def test_gradients_match_the_float64_reference(
    op: Callable[..., SparseCodes],
    reference: Callable[..., Tensor],
    argument: float,
    shape: tuple[int, int, int],
    triton_device: torch.device,
    close: Callable[..., None],
) -> None:
    rows, d_in, d_sae = shape
    x, W, b = whole_numbers(rows, d_in, d_sae, seed=rows)
    b = b + torch.rand(d_sae, generator=torch.Generator().manual_seed(7)) / 2
    narrow = [t.to(triton_device).requires_grad_() for t in (x, W, b)]
    wide = [t.double().requires_grad_() for t in (x, W, b)]
    weight = torch.randn(rows, d_sae, generator=torch.Generator().manual_seed(1))
    with use_backend("triton"):
        codes = op(*narrow, argument)
        got = torch.autograd.grad((codes.to_dense() * weight.to(triton_device)).sum(), narrow)
    dense = reference(*wide, argument)
    want = torch.autograd.grad((dense * weight.double()).sum(), wide)
    close(codes.to_dense().cpu(), dense, d_in, scale=10)
    for actual, expected in zip(got, want, strict=True):
        close(actual.cpu(), expected, rows * d_sae, scale=10)


@pytest.mark.interpreted
def test_gradients_only_where_needed(triton_device: torch.device) -> None:
    x, W, b = (t.to(triton_device) for t in inputs(5, 4, 12))
    with use_backend("triton"):
        for needed in range(3):
            leaves = [t.clone().requires_grad_(i == needed) for i, t in enumerate((x, W, b))]
            topk_encode(*leaves, 3).values.sum().backward()
            assert [t.grad is not None for t in leaves] == [i == needed for i in range(3)]
