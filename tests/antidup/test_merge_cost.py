"""The merge test against the fold carried out: decode again without the latent, its row added to its partner's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transcoder.antidup import merge_cost as module
from transcoder.antidup.merge_cost import MergeTest
from transcoder.kernels import SparseCodes


def dense_codes(tokens: int, d_sae: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(tokens, d_sae, generator=g, dtype=torch.float64)
    return z * (torch.rand(tokens, d_sae, generator=g) < 0.3)


def sse(z: Tensor, W: Tensor, y: Tensor) -> Tensor:
    return (z @ W - y).square().sum()


def fold_by_hand(z: Tensor, W: Tensor, y: Tensor, kept: int, dropped: int, scale: float) -> float:
    folded, merged = z.clone(), W.clone()
    folded[:, dropped] = 0
    merged[kept] = W[kept] + scale * W[dropped]
    return float((sse(folded, merged, y) - sse(z, W, y)) / (y - y.mean(0)).square().sum())


def streamed(z: Tensor, W: Tensor, y: Tensor, i: list[int], j: list[int], batch: int = 17) -> module.MergeResult:
    test = MergeTest(torch.tensor(i), torch.tensor(j), W)
    for a in range(0, z.shape[0], batch):
        codes = SparseCodes.from_dense(z[a : a + batch])
        test.update(codes, codes.to_dense() @ W - y[a : a + batch], y[a : a + batch])
    return test.result()


@pytest.mark.parametrize("tile", [1, 60, 1 << 22])
def test_change_is_that_of_the_fold_carried_out(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_NUMBERS", tile)
    g = torch.Generator().manual_seed(0)
    z, W = dense_codes(50, 7, 1), torch.randn(7, 4, generator=g, dtype=torch.float64)
    y = z @ W + 0.3 * torch.randn(50, 4, generator=g, dtype=torch.float64)
    found = streamed(z, W, y, [0, 1, 5, 0], [3, 2, 4, 1])
    for p in range(4):
        kept, dropped, scale = int(found.kept[p]), int(found.dropped[p]), float(found.scale[p])
        assert float(found.fvu_change[p]) == pytest.approx(fold_by_hand(z, W, y, kept, dropped, scale), rel=1e-9)
        for other in (scale * 0.98, scale * 1.02):  # the best scale, and the better direction
            assert fold_by_hand(z, W, y, kept, dropped, other) >= float(found.fvu_change[p]) - 1e-12
            assert fold_by_hand(z, W, y, dropped, kept, other) >= float(found.fvu_change[p]) - 1e-12
        without = z.clone()
        without[:, dropped] = 0
        lost = (sse(without, W, y) - sse(z, W, y)) / (y - y.mean(0)).square().sum()
        assert float(found.fvu_without[p]) == pytest.approx(float(lost), rel=1e-9)
        assert float(found.cost_share[p]) == pytest.approx(float(found.fvu_change[p] / found.fvu_without[p]), rel=1e-9)
        assert int(found.firings[p]) == int((z[:, dropped] > 0).sum())


def test_a_split_feature_is_mergeable_and_a_correlated_one_is_not() -> None:
    g = torch.Generator().manual_seed(2)
    z, W = dense_codes(4000, 6, 3), torch.randn(6, 8, generator=g, dtype=torch.float64)
    z[:, 1] = 0.7 * z[:, 0]  # a copy, of another scale and with another direction: one latent would do
    together = torch.rand(4000, generator=g) < 0.85  # correlated, but neither's amplitude says the other's
    z[:, 3] = z[:, 2] * together + dense_codes(4000, 1, 4)[:, 0] * ~together
    y = z @ W + 0.1 * torch.randn(4000, 8, generator=g, dtype=torch.float64)
    r = torch.corrcoef(z[:, 2:4].T)[0, 1]
    assert 0.6 < float(r) < 0.9
    found = streamed(z, W, y, [0, 2, 4], [1, 3, 5], batch=512)
    assert found.mergeable().tolist() == [True, False, False]
    assert float(found.fvu_change[0]) < 1e-4 < 1e-2 < float(found.fvu_change[1])
    # All of a copy's worth is kept, though leaving it out would cost a lot.
    assert float(found.fvu_without[0]) > 1e-2


def test_without_firings_there_is_no_verdict() -> None:
    z, W = dense_codes(40, 4, 5), torch.randn(4, 3, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    z[9:, 2] = 0
    found = streamed(z, W, z @ W, [0], [2])
    assert int(found.dropped) == 2
    assert int(found.firings) == int((z[:9, 2] > 0).sum()) < module.MIN_FIRINGS
    assert not bool(found.known)
    assert not bool(found.mergeable(share=float("inf")))


def test_a_latent_that_harms_is_mergeable_only_where_the_fold_does_not() -> None:
    g = torch.Generator().manual_seed(8)
    z, W = dense_codes(400, 4, 7), torch.randn(4, 5, generator=g, dtype=torch.float64)
    y = z @ W
    harmful = W.clone()
    harmful[2] = -W[2]  # it pushes the wrong way: leaving it out helps
    found = streamed(z, harmful, y, [1], [2])
    assert float(found.fvu_without) < 0
    assert bool(found.mergeable()) == (float(found.fvu_change) <= 0)


def test_bad_input_is_named() -> None:
    W = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="two different latents"):
        MergeTest(torch.tensor([1]), torch.tensor([1]), W)
    with pytest.raises(ValueError, match=r"latent ids in \[0, 4\)"):
        MergeTest(torch.tensor([1]), torch.tensor([4]), W)
    with pytest.raises(ValueError, match="int64"):
        MergeTest(torch.tensor([1.0]), torch.tensor([2.0]), W)
    test = MergeTest(torch.tensor([1]), torch.tensor([2]), W)
    with pytest.raises(ValueError, match="at least one token"):
        test.result()
    with pytest.raises(ValueError, match="expected codes"):
        test.update(SparseCodes.from_dense(torch.ones(2, 5)), torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_latent_of_a_narrow_prefix_is_never_the_one_that_goes() -> None:
    g = torch.Generator().manual_seed(9)
    z, W = dense_codes(400, 8, 10), torch.randn(8, 5, generator=g, dtype=torch.float64)
    # Wherever 1 fires 6 does, and elsewhere too: by the full width alone it would be 1 that goes.
    z[:, 6] = torch.where(z[:, 1] > 0, 1.2 * z[:, 1], z[:, 6])
    codes = SparseCodes.from_dense(z)
    y = z @ W
    kept = {}
    for widths in (None, [8], [4, 8]):
        test = MergeTest(torch.tensor([1, 2]), torch.tensor([6, 3]), W, widths)
        test.update(
            codes, 0.01 * torch.randn(400, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64), y
        )
        kept[str(widths)] = test.result().kept.tolist()
    assert (kept["None"][0], kept["[4, 8]"][0]) == (6, 1)
    assert kept["None"] == kept["[8]"]
    assert kept["[4, 8]"][1] == kept["[8]"][1]  # of one prefix, nothing changes


@pytest.mark.parametrize(("i", "j"), [(3, 4), (4, 3), (0, 7), (7, 0)])
def test_the_first_latent_of_a_wider_prefix_is_of_the_wider_one(i: int, j: int) -> None:
    # Wherever the narrow one fires the wide one does, and elsewhere too; prefixes are [0, 4) and [4, 8), pairs in any order.
    narrow, wide = min(i, j), max(i, j)
    z, W = dense_codes(400, 8, 10), torch.randn(8, 5, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    W = torch.nn.functional.normalize(W, dim=1)
    z[:, wide] = torch.where(z[:, narrow] > 0, 1.2 * z[:, narrow], z[:, wide])
    noise = 0.01 * torch.randn(400, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for widths, expected in ((None, wide), ([4, 8], narrow)):
        test = MergeTest(torch.tensor([i]), torch.tensor([j]), W, widths)
        test.update(SparseCodes.from_dense(z), noise, z @ W)
        assert int(test.result().kept) == expected


@pytest.mark.parametrize(("i", "j"), [(1, 2), (2, 1)])
def test_of_equal_latents_the_lower_is_kept(i: int, j: int) -> None:
    z, W = dense_codes(40, 4, 5), torch.eye(4, dtype=torch.float64)
    z[:, 2] = z[:, 1]
    W[2] = W[1]
    assert int(streamed(z, W, z @ W, [i], [j], batch=40).kept) == 1


def test_no_fold_turns_a_row_around() -> None:
    # Whatever the residual would like: the kept latent's row becomes W[kept] + a W[dropped] with a >= 0.
    z, W = dense_codes(60, 2, 6), torch.eye(2, 3, dtype=torch.float64)
    z[:, 1] *= z[:, 0] == 0
    y = z @ W - z[:, :1] * W[1]
    found = streamed(z, W, y, [0], [1])
    assert int(found.dropped) == 1
    assert float(found.scale) == 0
    assert float(found.fvu_change) == pytest.approx(fold_by_hand(z, W, y, 0, 1, 0.0), rel=1e-9)


@pytest.mark.parametrize(("firings", "known"), [(module.MIN_FIRINGS - 1, False), (module.MIN_FIRINGS, True)])
def test_a_verdict_needs_so_many_firings(firings: int, known: bool) -> None:
    z, W = torch.ones(40, 2, dtype=torch.float64), torch.eye(2, dtype=torch.float64)
    z[firings:, 1] = 0
    found = streamed(z, W, z @ W, [0], [1])
    assert int(found.dropped) == 1
    assert bool(found.known) == known


@pytest.mark.parametrize("level", [0.0, 3.0])
def test_constant_targets_give_finite_costs(level: float) -> None:
    z, W = dense_codes(60, 4, 11), torch.randn(4, 3, generator=torch.Generator().manual_seed(12), dtype=torch.float64)
    found = streamed(z, W, torch.full((60, 3), level, dtype=torch.float64), [0], [1])
    assert bool(torch.isfinite(found.fvu_change).all())
    assert bool(torch.isfinite(found.cost_share).all() | (found.fvu_without <= 0).all())
