"""The position sampler draws with the probabilities it states, in every bin, and its weights keep the
objective."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.antidup import PositionSampler, UsageLedger
from transcoder.config import PositionsSection
from transcoder.usage import REQUIRED_EFFECTS, judge

SECTION = PositionsSection()
BOS, PAD = 1, 0


def sampler(section: PositionsSection, folder: Path, seed: int = 0) -> PositionSampler:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")
    return PositionSampler(section, seed, [BOS, PAD], ledger, folder / "anti_duplication_logs", sequence_length=50)


def tokens_with_specials(count: int = 6, length: int = 50, seed: int = 0) -> Tensor:
    """A BOS at each start, some in the middle (packed text), padding at the end of the last sequence."""
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(2, 100, (count, length), generator=g)
    tokens[:, 0] = BOS
    tokens[torch.rand(count, length, generator=g) < 0.05] = BOS
    tokens[-1, -8:] = PAD
    return tokens


def draws(part: PositionSampler, tokens: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """(mean of keep, mean of weights) [S, L] over many steps."""
    samples = [part.sample_positions(tokens, step) for step in range(steps)]
    return (
        torch.stack([s.keep.double() for s in samples]).mean(0),
        torch.stack([s.weights.double() for s in samples]).mean(0),
    )


def test_positions_are_drawn_as_often_as_stated(tmp_path: Path) -> None:
    part, tokens = sampler(SECTION, tmp_path), tokens_with_specials()
    steps = 3000
    kept, _ = draws(part, tokens, steps)
    chance = part._inclusion(part._strata(tokens))
    error = (kept - chance) / (chance * (1 - chance) / steps).sqrt().clamp(min=1e-9)
    sure = (chance == 0) | (chance == 1)
    assert torch.equal(kept[sure], chance[sure])
    assert float(error[~sure].abs().max()) < 4.5
    special = (tokens == BOS) | (tokens == PAD)
    assert float(chance[special].max()) <= 0.5 * 0.3 + 1e-12


def test_weights_keep_the_expectation_of_any_objective(tmp_path: Path) -> None:
    # E[sum of w f over the drawn] = c * sum of f over what can be drawn, for position-dependent f.
    tokens = tokens_with_specials()
    f = torch.linspace(-1, 3, tokens.shape[1], dtype=torch.float64).square() + (tokens == BOS).double() * 5
    for section in (SECTION, replace(SECTION, keep_fraction=0.2, min_samples_per_bin=2)):
        part = sampler(section, tmp_path)
        chance = part._inclusion(part._strata(tokens))
        totals = torch.tensor(
            [float((part.sample_positions(tokens, step).weights * f).sum()) for step in range(2000)],
            dtype=torch.float64,
        )
        scale = float(chance.sum()) / int((chance > 0).sum())
        expected = scale * float(f.sum())
        assert abs(float(totals.mean()) - expected) < 4 * float(totals.std()) / len(totals) ** 0.5
        # Unweighted, the draw favours ordinary tokens: the weights are what makes it right.
        plain = float((chance * f).sum()) * scale / (float(chance.sum()) / chance.numel())
        assert abs(plain - expected) > 20 * float(totals.std()) / len(totals) ** 0.5


def test_each_weight_has_the_same_expectation_and_their_mean_is_one(tmp_path: Path) -> None:
    part, tokens = sampler(SECTION, tmp_path), tokens_with_specials(seed=3)
    chance = part._inclusion(part._strata(tokens))
    sample = part.sample_positions(tokens, 5)
    scale = chance.sum() / (chance > 0).sum()
    torch.testing.assert_close(sample.weights[sample.keep].double(), (scale / chance)[sample.keep], rtol=1e-6, atol=0)
    assert float(sample.weights[~sample.keep].abs().sum()) == 0
    means = [part.sample_positions(tokens, s) for s in range(400)]
    ratio = sum(float(s.weights.sum()) for s in means) / sum(int(s.keep.sum()) for s in means)
    assert ratio == pytest.approx(1.0, abs=0.01)


@settings(max_examples=60, deadline=None)
@given(
    length=st.integers(1, 70),
    bins=st.integers(1, 12),
    least=st.integers(0, 4),
    fraction=st.sampled_from([0.05, 0.3, 0.5, 0.9, 1.0]),
    penalty=st.sampled_from([0.0, 0.3, 1.0]),
    most=st.sampled_from([0.0, 0.2, 0.5, 1.0]),
    seed=st.integers(0, 1000),
)
def test_bins_and_special_tokens_keep_their_bounds(
    length: int, bins: int, least: int, fraction: float, penalty: float, most: float, seed: int, tmp_path_factory
) -> None:
    section = PositionsSection(
        bins=bins, min_samples_per_bin=least, keep_fraction=fraction, bos_penalty=penalty, max_bos_fraction=most
    )
    part = sampler(section, tmp_path_factory.getbasetemp(), seed)
    g = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 5, (4, length), generator=g)
    keep = part.sample_positions(tokens, seed).keep
    special = tokens <= BOS
    bin_of = torch.arange(length) * bins // length
    for s in range(4):
        ordinary = (keep & ~special)[s]
        for b in range(bins):
            there = int(((bin_of == b) & ~special[s]).sum())
            drawn = int((ordinary & (bin_of == b)).sum())
            assert min(least, there) <= drawn <= there
            assert abs(drawn - fraction * there) <= 1 or drawn == min(least, there)
        drawn_special, drawn_all = int((keep & special)[s].sum()), int(keep[s].sum())
        if most < 1:
            assert drawn_special <= most * drawn_all + 1e-9
        assert drawn_special <= fraction * penalty * int(special[s].sum()) + 1
        if penalty == 0:
            assert drawn_special == 0


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    bins=st.integers(1, 12),
    least=st.integers(0, 4),
    fraction=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
    most=st.sampled_from([0.0, 0.2, 0.5]),
    specials=st.sampled_from([0.0, 0.1, 0.9, 1.0]),
    seed=st.integers(0, 1000),
)
def test_a_batch_of_shuffled_tokens_keeps_the_same_bounds(
    rows: int, bins: int, least: int, fraction: float, most: float, specials: float, seed: int, tmp_path_factory
) -> None:
    """By the tokens' positions, wherever they stand in the batch; a position beyond the sequence counts as its last."""
    section = PositionsSection(bins=bins, min_samples_per_bin=least, keep_fraction=fraction, max_bos_fraction=most)
    part = sampler(section, tmp_path_factory.getbasetemp(), seed)
    g = torch.Generator().manual_seed(seed)
    special = torch.rand(rows, generator=g) < specials
    tokens = torch.where(special, BOS, torch.randint(2, 100, (rows,), generator=g))
    positions = torch.randint(0, 60, (rows,), generator=g)
    keep = part.sample_positions(tokens[None], seed, positions=positions[None], micro=seed % 3).keep[0]
    bin_of = positions.clamp(max=49) * bins // 50
    for b in range(bins):
        there = int(((bin_of == b) & ~special).sum())
        drawn = int(((bin_of == b) & ~special & keep).sum())
        assert min(least, there) <= drawn <= there
        assert abs(drawn - fraction * there) <= 1 or drawn == min(least, there)
    assert int((keep & special).sum()) <= most * int(keep.sum()) + 1e-9


def test_micro_batches_draw_apart_and_columns_are_the_positions_by_default(tmp_path: Path) -> None:
    part, tokens = sampler(SECTION, tmp_path), tokens_with_specials(1, 50)
    place = torch.arange(50)[None]
    first = part.sample_positions(tokens, 3).keep
    assert torch.equal(part.sample_positions(tokens, 3, positions=place).keep, first)
    other = part.sample_positions(tokens, 3, positions=place, micro=1).keep
    assert not torch.equal(other, first)
    assert torch.equal(part.sample_positions(tokens, 3, positions=place, micro=1).keep, other)
    for wrong in (place[:, :9], place[0]):
        with pytest.raises(ValueError, match=r"positions: expected the shape of batch_tokens, \[1, 50\]"):
            part.sample_positions(tokens, positions=wrong)
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), tmp_path / "usage.json")
    with pytest.raises(ValueError, match=r"a sequence_length of at least 1, got .* and 0"):
        PositionSampler(SECTION, 0, [], ledger).sample_positions(tokens, positions=place)


def test_whole_sequences_are_drawn_as_they_were_before_batches_were(tmp_path: Path) -> None:
    # Runs that train on drawn positions resume to the same bits: the digest is of the version before.
    part, digest = sampler(SECTION, tmp_path, seed=11), hashlib.sha256()
    for step in range(20):
        digest.update(part.sample_positions(tokens_with_specials(seed=step), step).keep.numpy().tobytes())
    assert digest.hexdigest() == "83bc1fe2708dba5b285d8a9a2949945a736be7a10fd2f05db8b9737b818a8002"


def test_a_bins_count_is_the_same_in_every_draw(tmp_path: Path) -> None:
    part, tokens = sampler(SECTION, tmp_path), tokens_with_specials(seed=4)
    bin_of = torch.arange(50) * 10 // 50
    ordinary = tokens > BOS
    counts = []
    for step in range(20):
        keep = part.sample_positions(tokens, step).keep & ordinary
        counts.append(torch.stack([keep[:, bin_of == b].sum(1) for b in range(10)]))
    assert all(torch.equal(c, counts[0]) for c in counts)


def test_any_two_positions_can_be_drawn_together(tmp_path: Path) -> None:
    # A systematic draw in the order of the text would never keep two neighbours.
    part = sampler(SECTION, tmp_path)
    tokens = torch.full((40, 20), 7)
    together = torch.zeros(20, 20)
    for step in range(200):
        keep = part.sample_positions(tokens, step).keep.float()
        together += keep.T @ keep
    bin_of = torch.arange(20) * 10 // 20
    other_bin = bin_of[:, None] != bin_of[None, :]
    assert bool((together[other_bin] > 0).all())


def test_sequences_draw_apart(tmp_path: Path) -> None:
    # One special token each, drawn three times in twenty: all together or none would be one draw and not four hundred.
    tokens = torch.full((400, 10), 5)
    tokens[:, 0] = BOS
    sample = sampler(SECTION, tmp_path).sample_positions(tokens, 0)
    assert 30 < int(sample.keep[:, 0].sum()) < 100


def test_the_draw_is_a_function_of_seed_and_step(tmp_path: Path) -> None:
    tokens = tokens_with_specials(seed=5)
    first, second = sampler(SECTION, tmp_path), sampler(SECTION, tmp_path)
    first.sample_positions(tokens, 0)
    torch.rand(7)  # a global generator plays no part
    a, b = first.sample_positions(tokens, 9), second.sample_positions(tokens, 9)
    assert torch.equal(a.keep, b.keep)
    assert torch.equal(a.weights, b.weights)
    assert not torch.equal(a.keep, first.sample_positions(tokens, 10).keep)
    assert not torch.equal(a.keep, sampler(SECTION, tmp_path, seed=1).sample_positions(tokens, 9).keep)


def test_keeping_everything_weighs_everything_one(tmp_path: Path) -> None:
    part = sampler(replace(SECTION, keep_fraction=1.0, bos_penalty=1.0, max_bos_fraction=1.0), tmp_path)
    sample = part.sample_positions(tokens_with_specials(), 0)
    assert bool(sample.keep.all())
    assert torch.equal(sample.weights, torch.ones(6, 50))
    effect = part._ledger.record()["components"]["position_sampler"]["effect"]
    assert effect["positions_resampled"] == 0
    assert effect["positions_drawn"] == 300


def test_batches_too_small_to_leave_a_token_out_are_no_fault(tmp_path: Path) -> None:
    part = sampler(SECTION, tmp_path)
    for step in range(3):
        assert bool(part.sample_positions(torch.full((1, 1), 9), step).keep.all())
    part.save(3)
    record = part._ledger.record()["components"]["position_sampler"]
    assert "none to leave out" in record["effect"]["finding"]
    assert judge("position_sampler", record, tmp_path).lacking == []


def test_shapes_and_types_of_a_sample(tmp_path: Path) -> None:
    sample = sampler(SECTION, tmp_path).sample_positions(tokens_with_specials(3, 17))
    assert sample.keep.shape == sample.weights.shape == (3, 17)
    assert sample.keep.dtype == torch.bool
    assert sample.weights.dtype == torch.float32
    empty = sampler(SECTION, tmp_path).sample_positions(torch.empty(0, 9, dtype=torch.int64))
    assert empty.keep.shape == (0, 9)


def test_the_file_counts_bins_and_is_in_the_ledger(tmp_path: Path) -> None:
    part, tokens = sampler(SECTION, tmp_path), tokens_with_specials()
    drawn = torch.zeros(6, 50)
    for step in range(5):
        drawn += part.sample_positions(tokens, step).keep
    path = part.save(5)
    assert path == tmp_path / "anti_duplication_logs" / "positions.json"
    content = json.loads(path.read_text())
    special = tokens <= BOS
    bin_of = torch.arange(50) * 10 // 50
    assert content["seen"] == [5 * int((~special[:, bin_of == b]).sum()) for b in range(10)]
    assert content["drawn"] == [int((drawn * ~special)[:, bin_of == b].sum()) for b in range(10)]
    assert content["special_seen"] == 5 * int(special.sum())
    assert content["special_drawn"] == int((drawn * special).sum())
    record = part._ledger.record()["components"]["position_sampler"]
    assert record["files"] == ["anti_duplication_logs/positions.json"]
    assert record["calls"] == 5
    assert record["effect"]["positions_drawn"] == float(drawn.sum())
    assert record["effect"]["positions_resampled"] > 0


def test_bad_tokens_are_refused(tmp_path: Path) -> None:
    part = sampler(SECTION, tmp_path)
    with pytest.raises(ValueError, match=r"expected integers \[S, L\], got torch.float32 \[2, 3\]"):
        part.sample_positions(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"expected integers \[S, L\], got torch.int64 \[4\]"):
        part.sample_positions(torch.zeros(4, dtype=torch.int64))
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), tmp_path / "usage.json")
    with pytest.raises(ValueError, match="expected an out_dir"):
        PositionSampler(SECTION, 0, [], ledger).save(1)


def test_a_draw_is_counted_when_it_is_recorded(tmp_path: Path) -> None:
    tokens = tokens_with_specials()
    at_once, later = sampler(SECTION, tmp_path / "a"), sampler(SECTION, tmp_path / "b")
    samples = [later.sample_positions(tokens, step, record=False) for step in range(3)]
    assert later._ledger.record()["components"]["position_sampler"]["calls"] == 0
    assert later.state_dict()["counts"].sum() == 0
    for step, sample in enumerate(samples[:2]):
        assert torch.equal(at_once.sample_positions(tokens, step).keep, sample.keep)
        later.record(sample)
    assert later._ledger.record() == at_once._ledger.record()
    assert later.save(2).read_text() == at_once.save(2).read_text()


def test_counts_go_on_after_a_resume(tmp_path: Path) -> None:
    tokens = tokens_with_specials()
    whole, half, resumed = (sampler(SECTION, tmp_path / name) for name in ("whole", "half", "resumed"))
    for step in range(4):
        whole.sample_positions(tokens, step)
        half.sample_positions(tokens, step) if step < 2 else None
    state = half.state_dict()
    half.sample_positions(tokens, 9)  # the state is a copy
    resumed.load_state_dict(state)
    for step in (2, 3):
        resumed.sample_positions(tokens, step)
    assert resumed.save(4).read_text() == whole.save(4).read_text()
    with pytest.raises(ValueError, match=r"expected counts \[2, 4\] of 3 bins, got \[2, 11\]"):
        sampler(replace(SECTION, bins=3), tmp_path).load_state_dict(state)


def test_a_file_that_cannot_be_written_costs_no_count(tmp_path: Path) -> None:
    part = sampler(SECTION, tmp_path)
    part.sample_positions(tokens_with_specials(), 0)
    path = tmp_path / "anti_duplication_logs" / "positions.json"
    path.mkdir(parents=True)  # a folder in the file's place: it cannot be replaced
    with pytest.raises(IsADirectoryError):
        part.save(1)
    assert list(tmp_path.rglob("*.tmp")) == []
    assert part._ledger.record()["components"]["position_sampler"]["files"] == []
    path.rmdir()
    assert sum(json.loads(part.save(1).read_text())["seen"]) > 0
