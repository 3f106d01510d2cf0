"""The position sampler: probabilities as promised, an unbiased objective, a draw that depends on (seed, step) alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.antidup import PositionSampler, UsageLedger
from transcoder.antidup.ledger import REQUIRED_EFFECTS
from transcoder.config import PositionsSection

SPECIAL = 7


def make(folder: Path, seed: int = 0, **settings: object) -> PositionSampler:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")
    return PositionSampler(PositionsSection(**settings), seed, [SPECIAL], ledger, out_dir=folder / "logs")


def tokens(sequences: int, length: int, seed: int = 0, special_share: float = 0.05) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(8, 100, (sequences, length), generator=g)
    ids[torch.rand(sequences, length, generator=g) < special_share] = SPECIAL
    ids[:, 0] = SPECIAL
    return ids


def test_inclusion_probabilities_are_those_of_the_draws(tmp_path: Path) -> None:
    sampler, batch = make(tmp_path, keep_fraction=0.4, bos_penalty=0.5), tokens(6, 40)
    chance = sampler.inclusion(batch)
    draws = torch.stack([sampler.sample_positions(batch, step=s).keep for s in range(3000)]).double().mean(0)
    deviation = (chance * (1 - chance) / 3000).sqrt()
    assert float(((draws - chance).abs() - 5 * deviation).max()) <= 1e-9
    assert 0 < float(chance.min()) < float(chance.max()) <= 1


def test_the_weighted_objective_keeps_its_expectation(tmp_path: Path) -> None:
    """E[sum of w f over the drawn] / E[drawn] is the mean of f over all positions that can be drawn."""
    sampler, batch = make(tmp_path, keep_fraction=0.3), tokens(8, 50)
    value = torch.randn(8, 50, generator=torch.Generator().manual_seed(1)).double() + torch.arange(50) / 10
    sums = []
    for step in range(3000):
        drawn = sampler.sample_positions(batch, step=step)
        assert bool((drawn.weights[~drawn.keep] == 0).all())
        sums.append((drawn.weights.double() * value).sum())
    estimate = torch.stack(sums)
    expected = value.mean() * sampler.inclusion(batch).sum()
    assert abs(float(estimate.mean() - expected)) < 5 * float(estimate.std()) / 3000**0.5
    unweighted = torch.stack([value[sampler.sample_positions(batch, step=s).keep].mean() for s in range(200)]).mean()
    assert abs(float(unweighted - value.mean())) > 1e-4, "without weights the special tokens' lower chance must show"


@given(
    length=st.integers(1, 70),
    bins=st.integers(1, 12),
    keep=st.floats(0.05, 1.0),
    least=st.integers(0, 4),
    most_special=st.floats(0, 1),
    penalty=st.floats(0, 1),
    seed=st.integers(0, 1000),
)
@settings(max_examples=80, deadline=None)
def test_every_bin_gets_its_share_and_special_tokens_stay_few(
    tmp_path_factory: pytest.TempPathFactory,
    length: int,
    bins: int,
    keep: float,
    least: int,
    most_special: float,
    penalty: float,
    seed: int,
) -> None:
    sampler = make(
        tmp_path_factory.mktemp("positions"),
        seed,
        bins=bins,
        keep_fraction=keep,
        min_samples_per_bin=least,
        max_bos_fraction=most_special,
        bos_penalty=penalty,
    )
    batch = tokens(3, length, seed, special_share=0.3)
    drawn = sampler.sample_positions(batch, step=seed)
    place = torch.arange(length) * bins // length
    for row in range(3):
        special = batch[row] == SPECIAL
        for b in range(bins):
            there = int(((place == b) & ~special).sum())
            got = int((drawn.keep[row] & (place == b) & ~special).sum())
            assert got >= min(least, there)
            assert got <= max(least, keep * there + 1)
        ordinary = int((drawn.keep[row] & ~special).sum())
        if most_special < 1:
            assert int((drawn.keep[row] & special).sum()) <= ordinary * most_special / (1 - most_special) + 1
        if penalty == 0:
            assert not bool((drawn.keep[row] & special).any())
    assert bool((drawn.weights[drawn.keep] > 0).all())


def test_a_draw_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    batch = tokens(5, 30)
    first, second, other = make(tmp_path / "a"), make(tmp_path / "b"), make(tmp_path / "c", seed=1)
    first.sample_positions(batch, step=0)
    assert torch.equal(first.sample_positions(batch, step=4).keep, second.sample_positions(batch, step=4).keep)
    assert not torch.equal(first.sample_positions(batch, step=5).keep, second.sample_positions(batch, step=4).keep)
    assert not torch.equal(other.sample_positions(batch, step=4).keep, second.sample_positions(batch, step=4).keep)


def test_its_use_is_recorded_and_written(tmp_path: Path) -> None:
    sampler, batch = make(tmp_path, bins=4), tokens(5, 32)
    kept = sum(int(sampler.sample_positions(batch, step=s).keep.sum()) for s in range(3))
    path = sampler.save(9)
    content = json.loads(path.read_text())
    assert content["step"] == 9
    assert sum(content["drawn"]) + content["special_drawn"] == kept
    assert sum(content["seen"]) + content["special_seen"] == 3 * batch.numel()
    part = json.loads(sampler._ledger.write().read_text())["components"]["position_sampler"]
    assert part["calls"] == 3
    assert part["effect"]["positions_drawn"] == kept
    assert 0 < part["effect"]["positions_resampled"] <= kept
    assert part["files"] == ["logs/positions.json"]


def test_special_ids_may_come_later(tmp_path: Path) -> None:
    sampler, batch = make(tmp_path, bos_penalty=0.0), tokens(4, 20)
    sampler.special_ids = []
    assert bool((sampler.inclusion(batch)[batch == SPECIAL] > 0).any())
    sampler.special_ids = [SPECIAL]
    assert bool((sampler.inclusion(batch)[batch == SPECIAL] == 0).all())


@pytest.mark.parametrize("bad", [torch.zeros(3), torch.zeros(3, 4), [[1, 2]]])
def test_other_shapes_are_refused(tmp_path: Path, bad: object) -> None:
    with pytest.raises(ValueError, match=r"batch_tokens: expected integers \[S, L\]"):
        make(tmp_path).sample_positions(bad)
