"""The penalties against their dense definitions, value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from tests.antidup.test_regularizer import dense, dense_gradient
from transcoder.antidup import penalties as penalties_module
from transcoder.antidup.penalties import (
    all_pairs_penalty,
    decoder_penalty,
    pair_penalty,
    position_penalty,
    sink_penalty,
)
from transcoder.antidup.running_mass import PositionMass, SinkMass
from transcoder.kernels import SparseCodes


@pytest.mark.parametrize("tile", [1 << 22, 50])
@pytest.mark.parametrize("weighted", [False, True])
def test_pair_penalty_is_the_dense_one(tile: int, weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties_module, "TILE_NUMBERS", tile)
    z = dense(40, 12, 0.4, 0)
    z[:, 3] = 0  # a latent of some pair that does not fire
    i, j = torch.tensor([0, 0, 2, 3, 5, 1]), torch.tensor([1, 7, 4, 6, 9, 0])
    w = torch.rand(40, generator=torch.Generator().manual_seed(1), dtype=torch.float64) if weighted else None
    z.requires_grad_()
    scale = torch.ones(40, dtype=torch.float64) if w is None else w
    u, v = z[:, i], z[:, j]
    norms = ((scale[:, None] * u * u).sum(0) * (scale[:, None] * v * v).sum(0)).clamp(min=1e-300).sqrt()
    expected = (((scale[:, None] * u * v).sum(0) / norms - 0.3).relu() ** 2).mean()
    got = pair_penalty(SparseCodes.from_dense(z.detach()), i, j, 0.3, w)
    assert float(expected.detach()) > 0
    torch.testing.assert_close(got.value, expected.detach())
    torch.testing.assert_close(got.gradient, dense_gradient(expected, z))


def test_pair_penalty_leaves_entries_that_do_not_fire_alone() -> None:
    codes = SparseCodes(torch.tensor([1.0, 2.0, 0.0, 3.0]), torch.tensor([0, 1, 0, 1]), torch.tensor([0, 2, 4]), (2, 3))
    got = pair_penalty(codes, torch.tensor([0]), torch.tensor([1]), 0.0)
    assert float(got.gradient[2]) == 0
    assert bool(got.gradient[[0, 1, 3]].any())


@pytest.mark.parametrize("tile", [1 << 22, 70])
def test_decoder_penalty_is_the_dense_one(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties_module, "TILE_NUMBERS", tile)
    w = torch.randn(30, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64).requires_grad_()
    rows = torch.tensor([4, 29, 0, 11, 17])
    u = F.normalize(w, dim=1)
    cosine = u[rows] @ u.T
    cosine = cosine.index_put((torch.arange(5), rows), torch.tensor(-1.0, dtype=torch.float64))
    expected = ((cosine.max(1).values - 0.3).relu() ** 2).mean()
    got = decoder_penalty(w.detach(), rows, 0.3)
    torch.testing.assert_close(got.value, expected.detach())
    torch.testing.assert_close(got.gradient, torch.autograd.grad(expected, w)[0])


@pytest.mark.parametrize("tile", [1 << 22, 90])
def test_all_pairs_penalty_is_the_dense_one(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penalties_module, "TILE_NUMBERS", tile)
    z = dense(30, 14, 0.5, 3)
    z[:, 5] = 0
    z.requires_grad_()
    live = z[:, [c for c in range(14) if c != 5]]
    centred = live - live.mean(0)
    r = F.normalize(centred, dim=0).T @ F.normalize(centred, dim=0)
    expected = (r.square().sum() - 13) / (13 * 12)
    got = all_pairs_penalty(SparseCodes.from_dense(z.detach()))
    torch.testing.assert_close(got.value, expected.detach())
    torch.testing.assert_close(got.gradient, dense_gradient(expected, z))


def test_all_pairs_floor_is_one_over_tokens() -> None:
    z = torch.rand(200, 60, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    assert float(all_pairs_penalty(SparseCodes.from_dense(z)).value) == pytest.approx(1 / 199, rel=0.1)


def test_position_penalty_is_the_dense_one() -> None:
    # Three batches: the entropy is that of the decayed sums, the gradient that of the last batch's part.
    running = PositionMass(9, "cpu", torch.float64)
    mass, offered, firings = torch.zeros(9, 10).double(), torch.zeros(10).double(), torch.zeros(9).double()
    for seed in (5, 25, 26):
        z = dense(60, 9, 0.5, seed)
        positions = torch.randint(0, 20, (60,), generator=torch.Generator().manual_seed(seed + 1))
        positions[0] = 19
        z[:, 2] *= (positions < 2).double() * 3  # a positional latent, too rare to be judged
        z[:, 3] *= 0.05 + (positions < 5).double()  # one that is judged
        z.requires_grad_()
        bins = positions * 10 // 20
        one_hot = F.one_hot(bins, 10).double()
        mass = 0.99 * mass.detach() + z.T @ one_hot
        offered = 0.99 * offered + one_hot.sum(0)
        firings = 0.99 * firings + (z > 0).sum(0)
        codes = SparseCodes.from_dense(z.detach())
        bin_of = running.add(codes, positions)
        got = position_penalty(codes, bin_of, running, 0.95)
    judged = firings >= 30
    assert judged.sum() == 8
    rate = mass[judged] / offered
    q = rate / rate.sum(1, keepdim=True).detach()
    entropy = -(q * q.clamp(min=1e-300).log()).sum(1) / math.log(10)
    expected = (0.95 - entropy).relu().mean()
    assert float(expected.detach()) > 0
    torch.testing.assert_close(got.value, expected.detach())
    (gradient,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(got.gradient, gradient[z > 0])


def test_position_penalty_pushes_a_latent_off_its_only_bin() -> None:
    # Undetached denominators would leave a latent on one bin at a stationary point.
    positions = torch.arange(20).repeat(20)
    z = torch.zeros(400, 2, dtype=torch.float64)
    z[positions < 2, 0] = 1.0
    z[:, 1] = 1.0
    codes, running = SparseCodes.from_dense(z), PositionMass(2, "cpu", torch.float64)
    got = position_penalty(codes, running.add(codes, positions), running, 0.5)
    assert float(got.value) == pytest.approx(0.25)
    assert bool((got.gradient[codes.indices == 0] > 0).all())
    assert not bool(got.gradient[codes.indices == 1].any())


def test_sink_penalty_is_the_dense_one() -> None:
    running = SinkMass(9, "cpu", torch.float64)
    at_sinks, whole, firings = (torch.zeros(9).double() for _ in range(3))
    for seed in (5, 25, 26):
        z = dense(60, 9, 0.5, seed)
        sink = torch.rand(60, generator=torch.Generator().manual_seed(seed)) < 0.1
        z[:, 2] *= 1 + 30 * sink.double()  # lives on sinks
        z[:, 3] *= sink.double()  # on nothing else, and too rare to be judged
        z.requires_grad_()
        at_sinks = 0.99 * at_sinks.detach() + z[sink].sum(0)
        whole = 0.99 * whole + z.detach().sum(0)
        firings = 0.99 * firings + (z > 0).sum(0)
        codes = SparseCodes.from_dense(z.detach())
        running.add(codes, sink)
        got = sink_penalty(codes, sink, running, 0.2)
    judged = firings >= 30
    assert judged.tolist() == [n != 3 for n in range(9)]
    expected = ((at_sinks / whole)[judged] - 0.2).relu().square().mean()
    assert float(expected.detach()) > 0.01
    torch.testing.assert_close(got.value, expected.detach())
    (gradient,) = torch.autograd.grad(expected, z)
    torch.testing.assert_close(got.gradient, gradient[z > 0])
    assert not bool(got.gradient[codes.indices != 2].any())


def test_mean_squared_cosine_cannot_see_a_copied_basis_and_ours_can() -> None:
    # The Welch floor (N - d) / (d (N - 1)) is met exactly by an orthonormal basis copied 8 times.
    basis = torch.linalg.qr(torch.randn(64, 64, generator=torch.Generator().manual_seed(7), dtype=torch.float64))[0]
    copied = basis.repeat(8, 1)
    n, d = copied.shape
    gram = copied @ copied.T
    mean_square = float((gram.square().sum() - n) / (n * (n - 1)))
    assert mean_square == pytest.approx((n - d) / (d * (n - 1)), rel=1e-9)
    random = F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(8), dtype=torch.float64), dim=1)
    random_square = float(((random @ random.T).square().sum() - n) / (n * (n - 1)))
    assert mean_square < random_square  # the blind measure prefers the duplicates
    rows = torch.arange(n)
    assert float(decoder_penalty(copied, rows, 0.3).value) == pytest.approx(0.49, abs=1e-6)
    assert float(decoder_penalty(random, rows, 0.3).value) < 0.1


def test_antipodal_decoders_are_left_alone() -> None:
    w = torch.tensor([[1.0, 0.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    got = decoder_penalty(w, torch.arange(3), 0.3)
    assert float(got.value) == 0
    assert float(got.gradient.abs().sum()) == 0
