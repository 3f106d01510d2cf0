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
    FeatureCorrelation,
    SparseCodes,
    batch_topk_encode,
    extension,
    nested_loss,
    sparse_decode,
    threshold_encode,
    topk_encode,
    use_backend,
)
from transcoder.kernels.encode.cpp_backend import transposed

CPP = "cpp" if extension.usable() else "torch"
ENCODE = {"topk": topk_encode, "batch_topk": batch_topk_encode, "threshold": threshold_encode}


def inputs(rows: int, d: int, d_sae: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, ...]:
    """Small whole numbers: every product and sum is exact, so ties are everywhere and results must agree to the bit."""
    g = torch.Generator("cpu").manual_seed(seed)
    shapes = ((rows, d), (d_sae, d), (d_sae,), (rows, d))
    return tuple(torch.randint(-2, 3, shape, generator=g, device="cpu").to(dtype) for shape in shapes)


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


def codes_parts(**wrong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(values, indices, row_ptr) of two rows over four latents."""
    parts = {"values": torch.ones(4), "indices": torch.tensor([0, 3, 1, 2]), "row_ptr": torch.tensor([0, 2, 4])}
    parts.update(wrong)
    return parts["values"], parts["indices"], parts["row_ptr"]


WRONG = {
    "id too large": {"indices": torch.tensor([0, 4, 1, 2])},
    "id negative": {"indices": torch.tensor([-1, 3, 1, 2])},
    "ids descend": {"indices": torch.tensor([3, 0, 1, 2])},
    "id twice": {"indices": torch.tensor([0, 3, 2, 2])},
    "pointer beyond the entries": {"row_ptr": torch.tensor([0, 2, 9])},
    "pointer short of the entries": {"row_ptr": torch.tensor([0, 2, 3])},
    "pointer descends": {"row_ptr": torch.tensor([0, 9, 4])},
    "pointer negative": {"row_ptr": torch.tensor([-2, 2, 4])},
    "another number of rows": {"row_ptr": torch.tensor([0, 1, 2, 4])},
    "no rows": {"row_ptr": torch.tensor([], dtype=torch.int64)},
    "too few values": {"values": torch.ones(3)},
}


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
@pytest.mark.parametrize("case", WRONG)
def test_the_ops_never_leave_their_memory(case: str) -> None:
    """Below the checks of the public ops: whatever the codes hold, the walk is refused before it begins."""
    ops = torch.ops.transcoder_cpp
    good, (values, ids, row_ptr) = codes_parts(), codes_parts(**WRONG[case])
    W, b, y, one = torch.ones(4, 3), torch.ones(3), torch.ones(2, 3), torch.ones(2)
    order = ops.by_latent(good[1], good[2], 4)
    calls = {
        "prefix_errors": lambda v, i, p: ops.prefix_errors(v, i, p, [2, 4], W, b, y, None),
        "prefix_gradients": lambda v, i, p: ops.prefix_gradients(v, i, p, *order, [2, 4], W, y, one, None),
        "row_sums": lambda v, i, p: ops.row_sums(W, i, p, v, None, b, True, True),
        "row_dots": lambda v, i, p: ops.row_dots(y, W, i, p),
        "by_latent": lambda v, i, p: ops.by_latent(i, p, 4),
    }
    # A sum over rows needs no order of ids; only some see the values or know the number of rows.
    blind = {
        "ids descend": {"row_sums", "row_dots", "by_latent"},
        "id twice": {"row_sums", "row_dots", "by_latent"},
        "another number of rows": {"row_sums", "by_latent"},
        "too few values": {"row_dots", "by_latent"},
    }
    for name, call in calls.items():
        call(*good)
        if name not in blind.get(case, ()):
            with pytest.raises(ValueError, match="expected"):
                call(values, ids, row_ptr)


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
def test_the_gradient_walk_refuses_an_order_that_is_not_the_codes() -> None:
    ops, (values, ids, row_ptr) = torch.ops.transcoder_cpp, codes_parts()
    W, y, scales = torch.ones(4, 3), torch.ones(2, 3), torch.ones(1)
    order, rows, ptr = ops.by_latent(ids, row_ptr, 4)
    for wrong in (
        (order + 1, rows, ptr),
        (order, rows + 1, ptr),
        (order, rows, ptr + 1),
        (order[:3], rows, ptr),
        (order, rows[:3], ptr),
        (order, rows, ptr[:4]),
    ):
        with pytest.raises(ValueError, match="expected"):
            ops.prefix_gradients(values, ids, row_ptr, *wrong, [4], W, y, scales, None)
    for widths in ([], [0, 4], [3, 3], [5]):
        with pytest.raises(ValueError, match="nested_loss: widths"):
            ops.prefix_errors(values, ids, row_ptr, widths, W, torch.ones(3), y, None)


def batches(dtype: torch.dtype, count: int = 9, rows: int = 40, d_sae: int = 90) -> list[SparseCodes]:
    """Values that round when they are multiplied and added."""
    g = torch.Generator().manual_seed(2)
    dense = torch.rand(count, rows, d_sae, generator=g, dtype=torch.float64).to(dtype)
    dense *= torch.rand(count, rows, d_sae, generator=g) < 0.2
    return [SparseCodes.from_dense(z) for z in dense]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("halflife", [None, 25.0])
@pytest.mark.parametrize("masked", [False, True])
def test_pairs_that_wait_are_added_as_if_at_once(
    dtype: torch.dtype, halflife: float | None, masked: bool, monkeypatch: pytest.MonkeyPatch, threads: None
) -> None:
    """To the bit, however long they wait, whoever works on it, and whatever the caller does to his codes meanwhile."""
    found = []
    for limit, count in ((0, 1), (10**9, 1), (500, 2), (10**9, 4)):
        torch.set_num_threads(count)
        monkeypatch.setattr("transcoder.kernels.correlation.cpp_backend.PAIRS_PER_WAITING_ENTRY", 1)
        monkeypatch.setattr("transcoder.kernels.correlation.cpp_backend.MOST_WAITING", limit)
        with use_backend(CPP):
            statistics = FeatureCorrelation(90, halflife=halflife)
            for i, codes in enumerate(batches(dtype)):
                mask = torch.arange(40) % 3 / 7 if masked else None
                statistics.update(codes, mask)
                codes.values.zero_()
                codes.indices.zero_()
                if i == 5:
                    statistics.correlation(3, 4)
            state = statistics.state_dict()["pairs"]
        found.append([state[name] for name in sorted(state)])
    assert float(found[0][-1].abs().sum()) > 0
    for other in found[1:]:
        assert_same(found[0], other)


def test_pairs_that_wait_are_in_every_look_and_counts_may_widen_meanwhile() -> None:
    codes = batches(torch.float32)
    with use_backend(CPP):
        one = FeatureCorrelation(90)
        for each in codes[:4]:
            one.update(each)
        assert one._exact is not None
        one.tokens_offered = 2**31 - 100
        for each in codes[4:]:
            one.update(each)
        assert one._exact.joint.dtype == torch.int64
    with use_backend("torch"):
        other = FeatureCorrelation(90)
        for each in codes:
            other.update(each)
    assert other._exact is not None
    assert torch.equal(one._exact.joint, other._exact.joint.long())
    torch.testing.assert_close(one._exact.product, other._exact.product, rtol=1e-14, atol=0)
    with use_backend(CPP):
        two = FeatureCorrelation(90)
        for each in codes:
            two.update(each)
        with use_backend("torch"):  # what waited comes first, then this
            two.update(codes[0])
    other.update(codes[0])
    assert torch.equal(two._exact.joint, other._exact.joint)  # type: ignore[union-attr]


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
def test_the_pair_update_refuses_what_would_leave_the_triangle() -> None:
    """Entries that wait: (latent, value) in 8 bytes each; where each token's begin."""

    def call(
        latents: list[int], starts: list[int], *, room: int = 6, entries: int | None = None, tokens: int | None = None,
        weights: int | None = None, tally: bool = False, wide: bool = False,
    ) -> Tensor:  # fmt: skip
        packed = torch.stack([torch.tensor(latents, dtype=torch.int32), torch.ones(len(latents)).view(torch.int32)], 1)
        product, joint = torch.zeros(room, dtype=torch.float64), torch.zeros(room, dtype=torch.int32)
        torch.ops.transcoder_cpp.add_kept(
            packed.view(torch.uint8).view(-1), torch.tensor(starts, dtype=torch.int32),
            None if weights is None else torch.ones(weights, dtype=torch.float64),
            torch.ones(9, dtype=torch.float64) if tally else None, len(latents) if entries is None else entries,
            len(starts) - 1 if tokens is None else tokens, wide, 4, product, joint,
        )  # fmt: skip
        assert torch.equal(product, joint.double())
        return joint

    assert call([0, 1, 3, 2], [0, 3, 4]).tolist() == [1, 0, 0, 1, 1, 0]
    wrong: list[tuple[list[int], list[int], dict]] = [
        ([0, 4], [0, 2], {}),
        ([-1, 2], [0, 2], {}),
        ([2, 1], [0, 2], {}),
        ([1, 1], [0, 2], {}),
        ([1, 2], [1, 2], {}),
        ([1, 2], [0, 1], {}),
        ([1, 2], [0, 3, 2], {}),
        ([1, 2], [0, 2], {"entries": 3}),
        ([1, 2], [0, 2], {"tokens": 2}),
        ([1, 2], [0, 2], {"tokens": -1}),
        ([1, 2], [0, 2], {"room": 5}),
        ([1, 2], [0, 2], {"wide": True}),
        ([1, 2], [0, 1, 2], {"weights": 1}),
    ]
    for latents, starts, options in wrong:
        with pytest.raises(ValueError, match="expected"):
            call(latents, starts, **options)
    with pytest.raises(TypeError, match="joint: expected integers"):
        call([1, 2], [0, 2], tally=True)


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
@pytest.mark.parametrize(
    "change",
    [
        {"partners": torch.empty(31, dtype=torch.uint8)},
        {"starts": torch.zeros(2, dtype=torch.int32)},
        {"total": torch.zeros(3, dtype=torch.float64)},
        {"ids": torch.tensor([0, 4, 1, 2])},
        {"ids": torch.tensor([2, 1, 1, 2])},
        {"row_ptr": torch.tensor([0, 2, 5])},
        {"token_weights": torch.ones(2, dtype=torch.float64)},
        {"token_weights": torch.ones(2, dtype=torch.float64), "kept_weights": torch.empty(1, dtype=torch.float64)},
        {"token_weights": torch.ones(3, dtype=torch.float64), "kept_weights": torch.empty(9, dtype=torch.float64)},
        {"entries": 2**31},
    ],
)
def test_entries_that_do_not_fit_are_not_kept(change: dict) -> None:
    given = {
        "values": torch.ones(4), "ids": torch.tensor([0, 1, 1, 2]), "row_ptr": torch.tensor([0, 2, 4]),
        "token_weights": None, "token_tally": None, "total": torch.zeros(4, dtype=torch.float64),
        "square": torch.zeros(4, dtype=torch.float64), "count": torch.zeros(4, dtype=torch.int64),
        "partners": torch.empty(32, dtype=torch.uint8), "starts": torch.zeros(3, dtype=torch.int32), "kept_weights": None,
        "kept_tally": None, "entries": 0, "tokens": 0,
    }  # fmt: skip
    assert torch.ops.transcoder_cpp.keep_entries(*given.values()) == (4, 2)
    assert given["count"].tolist() == [1, 2, 1, 0]
    with pytest.raises(ValueError, match="expected"):
        torch.ops.transcoder_cpp.keep_entries(*{**given, **change}.values())
    assert given["count"].tolist() == [1, 2, 1, 0]


def test_codes_of_other_kinds_take_turns() -> None:
    """What waits is of one kind: dtype, weights. The sums are those of backend torch to the bit."""
    narrow, wide = batches(torch.float32), batches(torch.float64)
    found = []
    for name in (CPP, "torch"):
        with use_backend(name):
            statistics = FeatureCorrelation(90)
            for n in range(9):
                mask = None if n % 3 else torch.arange(40) % 3 / 7
                statistics.update((narrow if n % 4 < 2 else wide)[n], mask)
            pairs, moments = (statistics.state_dict()[part] for part in ("pairs", "moments"))
        found.append([*(pairs[name] for name in sorted(pairs)), *(moments[name] for name in sorted(moments))])
    assert_same(*found)


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
def test_a_latent_may_fire_more_often_than_a_narrow_count_holds() -> None:
    tokens = 70_000
    z = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(0)) + 0.1
    both = []
    for name in (CPP, "torch"):
        with use_backend(name):
            statistics = FeatureCorrelation(3)
            statistics.update(SparseCodes.from_dense(z))
            assert statistics._exact is not None
            both.append([statistics._exact.product, statistics._exact.joint])
    assert both[0][1].tolist() == [tokens] * 3
    assert_same(*both)


@pytest.mark.parametrize("halflife", [None, 300.0])
@pytest.mark.parametrize("wide", [False, True])
def test_mining_finds_what_torch_finds(halflife: float | None, wide: bool, threads: None) -> None:
    """To the bit, whoever walks; of two parts (fading sums have one) one may have wider counts."""
    one, two = (FeatureCorrelation(600, halflife=halflife) for _ in range(2))
    for i, codes in enumerate(batches(torch.float32, count=6, rows=80, d_sae=600)):
        (one if i < 3 or halflife is not None else two).update(codes)
    beside = [two] if halflife is None else []
    edges = torch.tensor([-0.2, -0.1, 0.0, 0.05, 0.1, 0.3], dtype=torch.float64)
    if wide and halflife is None:
        assert two._exact is not None
        two._exact.joint = two._exact.joint.long()
    found = []
    for name, count in ((CPP, 1), (CPP, 2), (CPP, 4), ("torch", 1)):
        torch.set_num_threads(count)
        with use_backend(name):
            survey = one.survey(0.1, 3, edges, beside=beside)
        pairs = survey.pairs
        assert survey.histogram is not None
        assert len(pairs) > 100
        found.append(
            [pairs.i, pairs.j, pairs.correlation, pairs.support, pairs.cosine, pairs.jaccard, survey.histogram]
        )
        found[-1].append(torch.tensor(survey.squared_sum, dtype=torch.float64))
    for other in found[1:3]:
        assert_same(found[0], other)
    assert_same(found[0][:-1], found[3][:-1])
    torch.testing.assert_close(found[0][-1], found[3][-1], rtol=1e-12, atol=0)
    with use_backend(CPP):
        assert len(one.survey(0.1, 3, beside=beside).pairs) == len(found[0][0])


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
def test_bins_are_those_of_searchsorted() -> None:
    """Values on edges, outside of them, and NaN; edges far from even."""
    values = torch.tensor(
        [0.0, 0.25, 0.25 - 1e-17, 0.3, 0.9, 1.0, 1.7, -3.0, torch.nan, 0.26, 0.5], dtype=torch.float64
    )
    edges = torch.tensor([0.0, 0.25, 0.26, 0.261, 0.9, 1.0], dtype=torch.float64)
    # Latent 1 meets latent 0 only: one pair a call, whose correlation is what is asked for.
    for value in values:
        product = torch.zeros(3, dtype=torch.float64)
        product[0] = value
        joint = torch.tensor([1, 0, 0], dtype=torch.int32)
        zero, one = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
        fired = torch.full((3,), 2)
        histogram = torch.ops.transcoder_cpp.survey_pairs([product], [joint], zero, one, fired, 2.0, 0.0, 8, edges)[-2]
        want = (torch.searchsorted(edges, value, right=True) - 1).clamp(0, 4)
        assert histogram.tolist() == torch.bincount(want[None], minlength=5).tolist()
    for wrong in ((product[:2], joint, zero, one), (product, joint[:2], zero, one), (product, joint, zero, one[:2])):
        with pytest.raises(ValueError, match="expected"):
            torch.ops.transcoder_cpp.survey_pairs([wrong[0]], [wrong[1]], *wrong[2:], fired, 0.5, 0.0, 8, None)


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
def test_encode_refuses_shapes_that_do_not_fit() -> None:
    ops, x, W, b = torch.ops.transcoder_cpp, torch.ones(2, 3), torch.ones(4, 3), torch.ones(4)
    for wrong in ((x, W[:, :2].contiguous(), b, 1), (x, W, b[:3], 1), (x, W, b, 0), (x, W, b, 5), (x, W.T, b, 1)):
        for op in (ops.topk, ops.batch_topk):
            with pytest.raises(ValueError, match="expected"):
                op(*wrong)
    with pytest.raises(ValueError, match="limits: expected"):
        ops.above(x, W, b, torch.ones(3))


@pytest.mark.skipif(CPP == "torch", reason="no compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (3, 70), (64, 64), (66, 131), (0, 5), (200, 7)])
def test_a_transposed_matrix_is_the_transpose_to_the_bit(shape: tuple[int, int], dtype: torch.dtype) -> None:
    """Blocks of 64 with whole and broken edges, contiguous and strided, factors of either side."""
    g = torch.Generator("cpu").manual_seed(3)
    W = torch.randn(shape, generator=g, dtype=dtype)
    columns, rows = (torch.randn(n, generator=g, dtype=dtype) for n in (shape[1], shape[0]))
    for matrix in (W, W.T.contiguous().T):
        assert torch.equal(transposed(matrix), W.T)
        assert torch.equal(transposed(matrix, columns), W.T * columns[:, None])
        assert torch.equal(transposed(matrix, rows, back=True), W.T * rows)
        assert transposed(matrix).is_contiguous()
    with pytest.raises(ValueError, match="factors: expected"):
        transposed(W, torch.ones(shape[1] + 1, dtype=dtype))


def test_what_is_made_inside_is_made_on_the_inputs_device() -> None:
    """A default device set by the caller is not where the codes are."""
    with torch.device("meta"), use_backend(CPP):
        found = ops_on_the_cpu()
    assert_same(found, ops_on_the_cpu())


def ops_on_the_cpu() -> list[Tensor]:
    x, W, b, y = inputs(30, 5, 70)
    W_dec, cpu = W.clone().requires_grad_(), torch.device("cpu")
    codes = topk_encode(x, W, b, 3)
    found = [codes.values, codes.row_ptr]
    for more in (codes, batch_topk_encode(x, W, b, 3), threshold_encode(x, W, b, 1.0)):
        loss = nested_loss(more, W_dec, torch.zeros(5, device=cpu), y, (20, 70)).value
        found += [loss.detach(), *torch.autograd.grad(loss, W_dec)]
    return found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="one instruction set on this architecture")
@pytest.mark.parametrize("name", [pytest.param("base", marks=pytest.mark.slow), "avx2"])
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


@pytest.mark.parametrize("kind", ["plain", "weighted", "half-life"])
def test_so_many_waiting_pairs_that_threads_share_their_sorting(kind: str) -> None:
    """More than 2 * 4096 entries a thread: the sums are backend torch's, whatever the number of threads."""
    g = torch.Generator().manual_seed(0)
    latents, rows = 500, 1200
    z = torch.rand(2, rows, latents, generator=g) * (torch.rand(2, rows, latents, generator=g) < 0.03)
    weights = torch.arange(rows) % 3 / 7 if kind == "weighted" else None
    before, found = torch.get_num_threads(), []
    try:
        for threads, backend in ((1, "torch"), (1, "cpp"), (2, "cpp"), (4, "cpp")):
            torch.set_num_threads(threads)
            with use_backend(backend):
                statistics = FeatureCorrelation(latents, halflife=900.0 if kind == "half-life" else None)
                for batch in z:
                    codes = SparseCodes.from_dense(batch)
                    assert codes.nnz > 16_000
                    statistics.update(codes, weights)
                found.append(statistics.state_dict()["pairs"])
    finally:
        torch.set_num_threads(before)
    for one in found[1:]:
        assert all(torch.equal(one[name], part) for name, part in found[0].items())
    assert float(found[0]["product"].sum()) > 0
