from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from transcoder.kernels import FeatureCorrelation, SparseCodes, nested_loss, sparse_decode, use_backend
from transcoder.kernels import sparse_codes as codes_module
from transcoder.kernels.checks import check_codes


def random_dense(rows: int, columns: int, seed: int) -> torch.Tensor:
    z = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    return z.clamp_min(0)


@given(rows=st.integers(0, 9), columns=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_from_dense_and_back_is_the_identity_on_positive_entries(rows: int, columns: int, seed: int) -> None:
    z = random_dense(rows, columns, seed)
    codes = SparseCodes.from_dense(z)
    assert torch.equal(codes.to_dense(), z)
    assert codes.nnz == int((z > 0).sum())
    assert codes.shape == (rows, columns)
    if rows:
        assert torch.equal(codes.to_sparse_csr().to_dense(), z)


@given(rows=st.integers(1, 9), columns=st.integers(1, 12), seed=st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_feature_major_order_lists_each_latents_tokens_in_order(rows: int, columns: int, seed: int) -> None:
    z = random_dense(rows, columns, seed)
    codes = SparseCodes.from_dense(z)
    order = codes.by_latent()
    values = codes.values[order.permutation]
    assert order.latent_ptr[0] == 0
    assert order.latent_ptr[-1] == codes.nnz
    for i in range(columns):
        own = slice(int(order.latent_ptr[i]), int(order.latent_ptr[i + 1]))
        tokens = z[:, i].nonzero().flatten()
        assert torch.equal(order.rows[own], tokens)
        assert torch.equal(values[own], z[tokens, i])


def test_derived_orders_are_computed_once_and_shared() -> None:
    codes = SparseCodes.from_dense(random_dense(5, 7, 0))
    assert codes.by_latent() is codes.by_latent()
    assert codes.with_values(codes.values * 2).by_latent() is codes.by_latent()


def test_to_dense_carries_the_gradient() -> None:
    codes = SparseCodes.from_dense(random_dense(4, 6, 1))
    values = codes.values.clone().requires_grad_()
    weights = torch.randn(4, 6)
    (codes.with_values(values).to_dense() * weights).sum().backward()
    assert torch.equal(values.grad, weights[codes.rows(), codes.indices])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"values": torch.ones(3, dtype=torch.int64)}, TypeError, "values.*floating"),
        ({"indices": torch.ones(3, dtype=torch.int32)}, TypeError, "indices.*int64"),
        ({"row_ptr": torch.zeros(2, dtype=torch.int64)}, ValueError, "row_ptr"),
        ({"values": torch.ones(2)}, ValueError, "one length"),
        ({"values": torch.ones(3, 1)}, ValueError, "one dimension"),
        ({"values": [1.0]}, TypeError, "expected a tensor"),
    ],
)
def test_malformed_codes_are_refused_by_name(change: dict, error: type[Exception], words: str) -> None:
    parts = {
        "values": torch.ones(3),
        "indices": torch.tensor([0, 1, 0]),
        "row_ptr": torch.tensor([0, 2, 3]),
        "shape": (2, 4),
    }
    with pytest.raises(error, match=words):
        SparseCodes(**{**parts, **change})


def test_from_dense_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"expected z \[B, d_sae\]"):
        SparseCodes.from_dense(torch.ones(3))


MALFORMED = {
    "descending ids": ([0, 1, 3, 2], [0, 2, 4], r"indices: row 1: expected ascending, unique latents, got 2 after 3"),
    "repeated id": ([0, 1, 1, 3], [0, 1, 4], r"indices: row 1: expected ascending, unique latents, got 1 after 1"),
    "id too large": ([0, 1, 2, 5], [0, 2, 4], r"indices: row 1: expected latents in \[0, 5\), got 5"),
    "negative id": ([-1, 1, 2, 4], [0, 2, 4], r"indices: row 0: expected latents in \[0, 5\), got -1"),
    "late begin": ([0, 1, 2, 4], [1, 2, 4], "row_ptr: row 0: expected to begin at entry 0, got 1"),
    "early end": ([0, 1, 2, 4], [0, 2, 3], "row_ptr: row 1: expected to end at nnz = 4, got 3"),
    "beyond the end": ([0, 1, 2, 4], [0, 2, 9], "row_ptr: row 1: expected to end at nnz = 4, got 9"),
    "descending pointers": (
        [0, 1, 2, 4],
        [0, 6, 4],
        r"row_ptr: row 1: expected pointers that do not descend, got 6 \.\. 4",
    ),
    "negative pointer": ([0, 1, 2, 4], [0, -3, 4], r"row_ptr: row 0: expected pointers that do not descend"),
}


def by_hand(ids: list[int], ptr: list[int], d_sae: int = 5) -> SparseCodes:
    return SparseCodes(torch.ones(len(ids)), torch.tensor(ids), torch.tensor(ptr), (len(ptr) - 1, d_sae))


def torch_decode(codes: SparseCodes) -> None:
    with use_backend("torch"):
        sparse_decode(codes, torch.ones(5, 3), torch.zeros(3))


def torch_nested(codes: SparseCodes) -> None:
    with use_backend("torch"):
        nested_loss(codes, torch.ones(5, 3), torch.zeros(3), torch.ones(2, 3), [2, 5])


USES = {
    "validate": (lambda codes: codes.validate(), "SparseCodes: "),
    "to_sparse_csr": (SparseCodes.to_sparse_csr, "SparseCodes: "),
    "to_dense": (SparseCodes.to_dense, "SparseCodes: "),
    "rows": (SparseCodes.rows, "SparseCodes: "),
    "by_latent": (SparseCodes.by_latent, "SparseCodes: "),
    "sparse_decode": (torch_decode, "sparse_decode: codes: "),
    "nested_loss": (torch_nested, "nested_loss: codes: "),
    "update": (lambda codes: FeatureCorrelation(5).update(codes), "FeatureCorrelation.update: codes: "),
}


@pytest.mark.parametrize("case", MALFORMED)
@pytest.mark.parametrize("use", USES)
def test_a_wrong_pattern_is_refused_by_row(case: str, use: str) -> None:
    ids, ptr, words = MALFORMED[case]
    run, begins = USES[use]
    codes = by_hand(ids, ptr)
    for _ in range(2):
        with pytest.raises(ValueError, match="^" + begins + words):
            run(codes)


@given(rows=st.integers(0, 6), columns=st.integers(1, 6), seed=st.integers(0, 10**6))
@settings(max_examples=100, deadline=None)
def test_validate_agrees_with_a_walk_over_the_rows(rows: int, columns: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    right = SparseCodes.from_dense(random_dense(rows, columns, seed))
    ids, ptr = right.indices.clone(), right.row_ptr.clone()
    for part in (ids, ptr):
        if part.numel() and int(torch.randint(0, 3, (), generator=g)) == 0:
            part[int(torch.randint(0, part.numel(), (), generator=g))] += int(torch.randint(-2, 3, (), generator=g))
    codes = SparseCodes(right.values, ids, ptr, right.shape)
    bounds = ptr.tolist()
    fine = bounds[0] == 0 and bounds[-1] == codes.nnz and bounds == sorted(bounds)
    for a, b in itertools.pairwise(bounds):
        own = ids[a:b].tolist()
        fine = fine and own == sorted(set(own)) and all(0 <= i < columns for i in own)
    if fine:
        codes.validate()
    else:
        with pytest.raises(ValueError, match="row"):
            codes.validate()


def test_a_pattern_is_looked_at_once_and_ours_never(monkeypatch: pytest.MonkeyPatch) -> None:
    looked = []

    def look(codes: SparseCodes) -> None:
        looked.append(codes)

    monkeypatch.setattr(codes_module, "_id_problem", look)
    mine = by_hand([0, 1, 2, 4], [0, 2, 4])
    mine.to_sparse_csr()
    mine.with_values(mine.values * 2).to_sparse_csr()
    torch_decode(mine.detach())
    assert len(looked) == 1
    SparseCodes.from_dense(random_dense(3, 5, 0)).to_sparse_csr()
    kept: dict[str, object] = {}
    ours = SparseCodes.trusted(mine.values, mine.indices, mine.row_ptr, mine.shape, kept)
    ours.by_latent()
    assert "by_latent" in kept
    assert len(looked) == 1


def test_shapes_below_nothing_are_refused() -> None:
    for shape, ptr in (((1, -2), [0, 0]), ((-1, 2), [])):
        with pytest.raises(ValueError, match="row_ptr must hold"):
            SparseCodes(torch.ones(0), torch.ones(0).long(), torch.tensor(ptr).long(), shape)


def test_a_tracer_sees_no_check_of_contents() -> None:
    """Fake tensors have no contents; under torch.compile reading them would break the graph."""

    def use(values: torch.Tensor, ids: torch.Tensor, ptr: torch.Tensor) -> torch.Tensor:
        codes = SparseCodes(values, ids, ptr, (2, 5))
        check_codes("op", codes)
        return codes.to_dense()

    right = by_hand([0, 1, 2, 4], [0, 2, 4])
    parts = (right.values, right.indices, right.row_ptr)
    with FakeTensorMode(allow_non_fake_inputs=False) as fake:
        assert use(*(fake.from_tensor(t) for t in parts)).shape == (2, 5)
    compiled = torch.compile(use, backend="eager", fullgraph=True)
    assert torch.equal(compiled(*parts), right.to_dense())
    with pytest.raises(ValueError, match="row 0"):
        use(right.values, right.indices.flip(0), right.row_ptr)
