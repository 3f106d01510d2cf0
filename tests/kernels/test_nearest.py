"""Nearest rows above a cosine (csrc/nearest_rows.cpp) against float64, and the decoder penalty made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.antidup import DiversityRegularizer, UsageLedger
from transcoder.antidup.penalties import decoder_penalty
from transcoder.config import RegularizerSection
from transcoder.kernels import extension, nearest_cpp, use_backend
from transcoder.usage import REQUIRED_EFFECTS

pytestmark = pytest.mark.skipif(not extension.usable(), reason="no compiler")
EPS = torch.finfo(torch.float32).eps


def matrix(seed: int, n: int, d: int, spread: float, twins: float) -> Tensor:
    """Rows of lengths that differ by powers of `spread`; some are others, or others turned by a little."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(n, d, generator=g)
    copied = (torch.rand(n, generator=g) < twins).nonzero().flatten()
    source = torch.randint(0, n, copied.shape, generator=g)
    w[copied] = (
        w[source] + 0.01 * torch.randn(copied.numel(), d, generator=g) * (torch.arange(copied.numel()) % 2)[:, None]
    )
    return w * spread ** torch.randn(n, 1, generator=g)


@settings(max_examples=50, deadline=None)
@given(
    n=st.sampled_from([1, 2, 7, 130, 700, 1100]),
    d=st.sampled_from([1, 3, 16, 61, 128]),
    rows=st.sampled_from([1, 5, 520]),
    least=st.sampled_from([0.0, 0.1, 0.3, 0.9]),
    spread=st.sampled_from([1.0, 3.0]),
    twins=st.sampled_from([0.0, 0.1, 0.9]),
    seed=st.integers(0, 99),
)
def test_nothing_above_is_missed(
    n: int, d: int, rows: int, least: float, spread: float, twins: float, seed: int
) -> None:
    w = matrix(seed, n, d, spread, twins)
    w[n // 2] = 0
    own = torch.randperm(n, generator=torch.Generator().manual_seed(seed))[:rows]
    found = nearest_cpp.nearest_above(w, own, least)
    assert found is not None
    best, partner, length = found
    unit = torch.nn.functional.normalize(w.double(), dim=1)
    cosine = unit[own] @ unit.T
    cosine[torch.arange(own.numel()), own] = -2
    slack = (d + 8) * EPS
    torch.testing.assert_close(length.double(), w.double().norm(dim=1), rtol=slack, atol=0)
    truth = cosine.max(1).values
    assert bool((truth[partner < 0] <= least + slack).all())
    near = (partner >= 0).nonzero().flatten()
    assert bool((partner[near] != own[near]).all())
    torch.testing.assert_close(best[near].double(), truth[near], rtol=0, atol=slack)
    torch.testing.assert_close(cosine[near, partner[near]], truth[near], rtol=0, atol=slack)
    assert bool((best[near] > least).all())
    assert bool((best[partner < 0] == 0).all())


def test_of_equal_rows_the_first_is_the_partner() -> None:
    w = torch.randn(1200, 8, generator=torch.Generator().manual_seed(0))
    w[[3, 600, 1190]] = w[900].clone()
    found = nearest_cpp.nearest_above(w, torch.tensor([3, 900, 1190]), 0.5)
    assert found is not None
    assert found[1].tolist() == [600, 3, 3]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_never_shows(threads: None) -> None:
    w, own = matrix(1, 1500, 40, 1.5, 0.3), torch.arange(0, 1500, 2)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        one = nearest_cpp.nearest_above(w, own, 0.3)
        assert one is not None
        found.append(one)
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
def test_where_nothing_bounds_the_products_it_says_so(bad: float) -> None:
    w = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    w[7, 3] = bad
    assert nearest_cpp.nearest_above(w, torch.arange(5), 0.3) is None
    with use_backend("cpp"):
        got = decoder_penalty(w, torch.arange(8), 0.3)
    with use_backend("torch"):
        assert str(float(got.value)) == str(float(decoder_penalty(w, torch.arange(8), 0.3).value))


class Decoder:
    def __init__(self, w: Tensor) -> None:
        self.W_dec = w.clone().requires_grad_()


@pytest.mark.parametrize("twins", [0.0, 0.2])
def test_the_penalty_is_that_of_backend_torch(twins: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Value and gradient, through the regularizer: without a pair above the threshold nothing reaches the decoder."""
    monkeypatch.setattr(nearest_cpp, "multiplies_bf16", lambda: True)
    w = matrix(2, 300, 400, 1.2, twins)
    section = RegularizerSection(
        orthogonality_weight=0.5, orthogonality_every=1, orthogonality_chunk=120, correlation_weight=0.0
    )
    found = []
    for name in ("cpp", "torch"):
        decoder = Decoder(w)
        with use_backend(name):
            rows = decoder_penalty(w, torch.arange(0, 300, 3), 0.3).rows
            assert (rows is None) == (name == "torch")
            assert rows is None or (rows.numel() == 0) == (twins == 0)
            regularizer = DiversityRegularizer(
                section, 300, "cpu", 0, UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, False), tmp_path)
            )
            loss = regularizer.apply_penalty(torch.zeros(()), decoder) + 0 * decoder.W_dec.sum()
            loss.backward()
        norm = regularizer.metrics()["regularizer/orthogonality_gradient_norm"]
        found.append((loss.detach(), decoder.W_dec.grad, norm))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=400 * EPS)
    assert (float(found[0][0]) > 0) == (twins > 0)
