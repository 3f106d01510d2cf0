"""CKA against float64, against its published definition, and against the wrong uses of it."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from transcoder.antidup import cka as cka_module
from transcoder.antidup.cka import StreamingCKA, gram_of_codes, gram_of_rows
from transcoder.kernels import FeatureCorrelation, SparseCodes


def dense(tokens: int, latents: int, seed: int, density: float = 0.3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(tokens, latents, generator=g, dtype=torch.float64) + 0.1
    return z * (torch.rand(tokens, latents, generator=g) < density)


def hsic1(k: Tensor, el: Tensor) -> float:
    """Song et al. 2012, equation 5."""
    n = k.shape[0]
    k, el = k.double().clone().fill_diagonal_(0), el.double().clone().fill_diagonal_(0)
    one = k.sum() * el.sum() / ((n - 1) * (n - 2)) - 2 * (k @ el).sum() / (n - 2)
    return float(((k @ el).trace() + one) / (n * (n - 3)))


def both(*representations: Tensor, batch: int) -> StreamingCKA:
    part = StreamingCKA(len(representations))
    for a in range(0, representations[0].shape[0], batch):
        part.update(*(gram_of_rows(x[a : a + batch]) for x in representations))
    return part


def biased(x: Tensor, y: Tensor) -> float:
    x, y = x.double() - x.double().mean(0), y.double() - y.double().mean(0)
    return float((x.T @ y).norm() ** 2 / ((x.T @ x).norm() * (y.T @ y).norm()))


def test_the_stream_is_the_dense_float64_definition() -> None:
    x, y = dense(96, 30, 0), dense(96, 11, 1)
    y = y + x[:, :11]
    found = both(x, y, batch=32).result()
    sums = [
        [
            sum(hsic1(a[t : t + 32] @ a[t : t + 32].T, b[t : t + 32] @ b[t : t + 32].T) for t in (0, 32, 64))
            for b in (x, y)
        ]
        for a in (x, y)
    ]
    wanted = sums[0][1] / math.sqrt(sums[0][0] * sums[1][1])
    assert float(found.cka[0, 1]) == pytest.approx(wanted, rel=1e-5)
    assert found.cka.diagonal().tolist() == pytest.approx([1, 1])
    assert 0 < float(found.error[0, 1]) < 0.5


def test_hsic_is_the_u_statistic_over_all_quadruples() -> None:
    # The identity by which Song et al. define it: the mean of k_st (l_st + l_uv - 2 l_su) over distinct s, t, u, v.
    x, y = (torch.randn(6, 3, generator=torch.Generator().manual_seed(n), dtype=torch.float64) for n in (0, 1))
    k, el = x @ x.T, y @ y.T
    terms = [
        float(k[s, t] * (el[s, t] + el[u, v] - 2 * el[s, u])) for s, t, u, v in itertools.permutations(range(6), 4)
    ]
    part = StreamingCKA(2)
    part.update(k, el)
    assert float(part._batches[0][0, 1]) == pytest.approx(sum(terms) / len(terms), rel=1e-9)


@pytest.mark.parametrize("tile", [4096, 3])
def test_the_gram_of_codes_is_the_dense_one(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cka_module, "TILE_COLUMNS", tile)
    z = dense(20, 17, 2)
    codes = SparseCodes.from_dense(z)
    for first, last in ((0, None), (5, 12), (3, 3)):
        part = z[:, first:last]
        torch.testing.assert_close(gram_of_codes(codes, first, last).double(), part @ part.T, rtol=1e-5, atol=1e-6)


def test_rotation_scale_and_shift_change_nothing() -> None:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(80, 12, generator=g, dtype=torch.float64)
    y = x[:, :5] + torch.randn(80, 5, generator=g, dtype=torch.float64)
    turn = torch.linalg.qr(torch.randn(12, 12, generator=g, dtype=torch.float64))[0]
    plain = both(x, y, batch=40).result().cka[0, 1]
    moved = both(7 * x @ turn + 30, y, batch=40).result().cka[0, 1]
    assert float(moved) == pytest.approx(float(plain), rel=1e-4)


def test_few_tokens_of_strangers_look_alike_to_the_biased_estimate_and_not_to_this_one() -> None:
    # More dimensions than tokens: plain CKA says that independent representations are nearly the same.
    g = torch.Generator().manual_seed(4)
    x, y = (torch.randn(640, 300, generator=g) for _ in range(2))
    assert biased(x[:32], y[:32]) > 0.8
    found = both(x, y, batch=32).result()
    assert abs(float(found.cka[0, 1])) < 0.05
    assert abs(float(found.cka[0, 1])) < 4 * float(found.error[0, 1])


def test_the_mini_batch_size_does_not_move_the_mean() -> None:
    g = torch.Generator().manual_seed(5)
    x = torch.randn(4096, 6, generator=g)
    y = x @ torch.randn(6, 40, generator=g) + 3 * torch.randn(4096, 40, generator=g)
    small, large = (both(x, y, batch=size).result() for size in (16, 512))
    apart = abs(float(small.cka[0, 1] - large.cka[0, 1]))
    assert apart < 4 * math.hypot(float(small.error[0, 1]), float(large.error[0, 1]))
    assert apart < 0.05


def test_cka_cannot_see_duplicates_within_a_dictionary() -> None:
    # The wrong use: every latent split into two that fire alike. CKA sees one representation; correlating latents sees it.
    z = dense(256, 20, 6)
    split = torch.cat([z, z], 1)
    part = StreamingCKA(2)
    for a in range(0, 256, 64):
        part.update(*(gram_of_codes(SparseCodes.from_dense(x[a : a + 64])) for x in (z, split)))
    assert float(part.result().cka[0, 1]) == pytest.approx(1, abs=1e-6)
    statistics = FeatureCorrelation(40)
    statistics.update(SparseCodes.from_dense(split))
    assert len(statistics.pairs(0.99)) == 20


def test_what_does_not_vary_has_no_similarity() -> None:
    constant = torch.ones(8, 3)
    found = both(constant, torch.randn(8, 3), batch=8).result()
    assert math.isnan(float(found.cka[0, 1]))
    assert math.isnan(float(found.error[0, 1]))


def test_bad_input_is_named() -> None:
    part = StreamingCKA(2)
    with pytest.raises(ValueError, match="at least one mini-batch"):
        part.result()
    with pytest.raises(ValueError, match="2 Gram matrices"):
        part.update(torch.eye(5))
    with pytest.raises(ValueError, match="at least 4"):
        part.update(torch.eye(3), torch.eye(3))
    with pytest.raises(ValueError, match="representations"):
        StreamingCKA(0)
