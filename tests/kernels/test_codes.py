from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.kernels import SparseCodes


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
