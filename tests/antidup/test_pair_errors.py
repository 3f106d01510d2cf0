"""The jackknife's errors against leaving groups out by hand, its bounds against the truth, and what flags make of it."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transcoder.antidup import pair_errors as module
from transcoder.antidup.flags import FlagBook
from transcoder.antidup.pair_errors import (
    GROUPS,
    PairErrors,
    PairJackknife,
    correlation_bounds,
    pooled_lower_bound,
    scaled,
)
from transcoder.config import MonitorSection
from transcoder.kernels import FeatureCorrelation, SparseCodes
from transcoder.kernels.correlation.counter_rng import hash_bits

from .test_monitor import feed, last_report, monitor

CPU = torch.device("cpu")


def pearson(z: Tensor, weights: Tensor) -> float:
    x, y = z.double().T
    mean_x, mean_y = ((weights * v).sum() / weights.sum() for v in (x, y))
    x, y = x - mean_x, y - mean_y
    return float((weights * x * y).sum() / ((weights * x * x).sum() * (weights * y * y).sum()).sqrt())


@pytest.mark.parametrize("tile", [1 << 20, 100])
def test_errors_are_those_of_leaving_groups_out_by_hand(tile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TILE_NUMBERS", tile)
    g = torch.Generator().manual_seed(0)
    z = torch.rand(300, 5, generator=g) * (torch.rand(300, 5, generator=g) < 0.4)
    z[:, 3] = 35 + 0.15 * z[:, 0] + 0.01 * torch.randn(300, generator=g)  # nearly always on
    sequences, weights = torch.arange(300) // 5, torch.rand(300, generator=g) + 0.5
    part = PairJackknife(5, CPU)
    i, j = torch.tensor([0, 0, 1]), torch.tensor([1, 3, 2])
    part.watch(i, j)
    for a in range(0, 300, 90):
        rows = slice(a, a + 90)
        part.update(SparseCodes.from_dense(z[rows]), sequences[rows], weights[rows])
    group = hash_bits(sequences, module._KEY) & (GROUPS - 1)
    found = part.errors(i.flip(0), j.flip(0))
    for n, (a, b) in enumerate(zip(i.flip(0).tolist(), j.flip(0).tolist(), strict=True)):
        without = [pearson(z[:, [a, b]], weights.double() * (group != left)) for left in range(GROUPS)]
        for got, values in ((found.plain, without), (found.fisher, list(map(math.atanh, without)))):
            mean = sum(values) / GROUPS
            wanted = math.sqrt((GROUPS - 1) / GROUPS * sum((v - mean) ** 2 for v in values))
            assert float(got[n]) == pytest.approx(wanted, rel=1e-6)
    assert found.weight.tolist() == pytest.approx([float(weights.double().sum())] * 3)
    assert bool(part.errors(torch.tensor([2]), torch.tensor([4])).plain.isnan())


def heavy(tokens: int, pairs: int, rho: float, g: torch.Generator) -> Tensor:
    """[tokens, 2 pairs]: amplitudes exp(N(0, 1)), the same for both where both fire; they fire together on the share rho."""
    event, which = (torch.rand(tokens, pairs, generator=g) for _ in range(2))
    fires, joint = event < 0.05, which < rho / (2 - rho)
    first = torch.rand(tokens, pairs, generator=g) < 0.5
    amplitude = torch.exp(torch.randn(tokens, pairs, generator=g))
    z = torch.stack([fires & (joint | first), fires & (joint | ~first)], 2) * amplitude[:, :, None]
    return z.view(tokens, 2 * pairs)


@pytest.mark.parametrize("rho", [0.8, 0.9])
def test_bounds_of_heavy_tails_hold_the_truth_where_the_rule_of_thumb_does_not(rho: float) -> None:
    g = torch.Generator().manual_seed(1)
    # The truth of these pairs is that of a long stream: means, which are not 0, are in it.
    long = heavy(400_000, 4, rho, g).double().view(-1, 2)
    truth = pearson(long, torch.ones(len(long), dtype=torch.float64))
    hits, rule, pairs, rounds = 0, 0, 60, 4
    for n in range(rounds):
        z = heavy(8000, pairs, rho, g)
        part, i = PairJackknife(2 * pairs, CPU), torch.arange(0, 2 * pairs, 2)
        part.watch(i, i + 1)
        part.update(SparseCodes.from_dense(z), torch.arange(8000) // 20 + n, None)
        errors = part.errors(i, i + 1).fisher.tolist()
        for p in range(pairs):
            own = z[:, 2 * p : 2 * p + 2]
            r, support = pearson(own, torch.ones(8000, dtype=torch.float64)), int((own > 0).any(1).sum())
            low, high = correlation_bounds(r, support, errors[p])
            hits += low <= truth <= high
            low, high = correlation_bounds(r, support)
            rule += low <= truth <= high
    assert rule / (pairs * rounds) < 0.6
    assert hits / (pairs * rounds) > 0.85


def test_sums_of_parts_add_up_and_follow_their_own_pairs() -> None:
    g = torch.Generator().manual_seed(2)
    z = torch.rand(400, 6, generator=g) * (torch.rand(400, 6, generator=g) < 0.5)
    sequences = torch.arange(400) // 8
    i, j = torch.tensor([0, 2]), torch.tensor([1, 3])

    def part(pairs: slice, rows: slice) -> PairJackknife:
        made = PairJackknife(6, CPU)
        made.watch(i[pairs], j[pairs])
        made.update(SparseCodes.from_dense(z[rows]), sequences[rows], None)
        return made

    both = slice(0, 2)
    whole, first, second = part(both, slice(0, 400)), part(both, slice(0, 150)), part(both, slice(150, 400))
    for a, b in zip(first.errors(i, j, earlier=second), whole.errors(i, j), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)
    one = part(slice(0, 1), slice(0, 150))
    assert one.errors(i, j, earlier=second).weight.tolist() == [400, 250]
    one = second
    one.forget(torch.tensor([1]))
    assert one.errors(i, j).weight.tolist() == [0, 250]
    one.watch(i, j)
    assert one.errors(i, j).weight.tolist() == [0, 250]
    again = PairJackknife(6, CPU)
    again.load_state_dict(one.state_dict())
    assert torch.equal(again.errors(i, j).weight, one.errors(i, j).weight)
    one.reset()
    assert len(one) == 2
    assert one.errors(i, j).weight.tolist() == [0, 0]


def test_a_block_without_mismatches_does_not_outweigh_the_others() -> None:
    assert pooled_lower_bound([(0.9, 0.01, 100.0)] * 3) > 0.88
    mixed = pooled_lower_bound([(1.0, 0.0, 100.0), (0.6, 0.1, 100.0)])
    assert mixed < 0.8
    assert pooled_lower_bound([(1.0, 0.0, 10.0)]) == pytest.approx(1)


def test_a_flag_needs_the_blocks_together_to_clear_the_threshold() -> None:
    def book(error: float) -> FlagBook:
        made = FlagBook(2, 3, 0.8)
        for r in (0.9, 0.9, 0.55):
            made.close_block([(0, 1)] if r > 0.8 else [], [], {(0, 1): (r, error, 200.0)})
        return made

    # The third block has no vote in "two of three", but it is evidence.
    assert book(0.01).flagged == {(0, 1)}  # flagged at the second block, and 0.55 releases nobody
    wide = book(0.3)
    assert wide.blocks_above((0, 1)) == 2
    assert wide.flagged == set()
    wide.forget({1})
    assert wide.state_dict()["evidence"][0]["pairs"].numel() == 0


def test_reports_say_where_their_bounds_are_from(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(3)
    z = heavy(6000, 3, 0.95, g)
    section = MonitorSection(block_tokens=3000, correlation_threshold=0.6, release_threshold=0.5, min_sequences=5)
    part = monitor(tmp_path, 6, section)
    feed(part, z[:500])
    first = last_report(tmp_path)
    assert first["pairs"] == [] or {p["bounds"] for p in first["pairs"]} == {"rule"}
    feed(part, z[500:], first=2)
    report = last_report(tmp_path)
    pairs = {(p["i"], p["j"]): p for p in report["pairs"]}
    assert set(pairs) == {(0, 1), (2, 3), (4, 5)}
    for entry in pairs.values():
        assert entry["bounds"] == "jackknife"
        low, high = correlation_bounds(entry["correlation"], entry["support"])
        assert entry["upper"] - entry["lower"] > high - low  # heavy tails: wider than the rule of thumb


def test_bounds_use_union_tokens() -> None:
    lower, upper = correlation_bounds(0.9, 300)
    half = 1.959964 * 1.32 / math.sqrt(297)
    assert (lower, upper) == (
        pytest.approx(math.tanh(math.atanh(0.9) - half)),
        pytest.approx(math.tanh(math.atanh(0.9) + half)),
    )
    assert correlation_bounds(0.9, 3) == (-1.0, 1.0)
    low, high = correlation_bounds(1.0, 100)
    assert 0.999 < low <= 1.0 == high
    assert correlation_bounds(-1.0, 100)[0] == -1.0


def test_bounds_hold_the_truth_about_as_often_as_they_say() -> None:
    # 200 pairs of true correlation 0.8 on about 400 union tokens each.
    g = torch.Generator().manual_seed(16)
    hits, trials, tokens, rate = 0, 200, 8000, 0.04
    for _ in range(4):
        shared = torch.rand(tokens, 50, generator=g) < 0.8
        a, b, c = (torch.rand(tokens, 50, generator=g) < rate for _ in range(3))
        x, y = ((a & shared) | (b & ~shared)).double(), ((a & shared) | (c & ~shared)).double()
        # Amplitudes vary as activations do; the true correlation is that of a long stream.
        z = torch.stack([x, y], 2).view(tokens, 100).float()
        found = FeatureCorrelation(100)
        found.update(SparseCodes.from_dense(z))
        i = torch.arange(0, 100, 2)
        stats = found.statistics(i, i + 1)
        for r, support in zip(stats.correlation.tolist(), stats.support.tolist(), strict=True):
            lower, upper = correlation_bounds(r, support)
            hits += lower <= 0.8 <= upper
    assert hits / trials >= 0.93


def test_bounds_are_those_of_the_formula() -> None:
    half = 1.959964 * 1.32 / math.sqrt(103 - 3)
    assert correlation_bounds(0.8, 103) == pytest.approx(
        (math.tanh(math.atanh(0.8) - half), math.tanh(math.atanh(0.8) + half)), rel=1e-5
    )
    # Of 16 groups: Student's t with 15 degrees of freedom.
    assert correlation_bounds(0.8, 103, 0.1) == pytest.approx(
        (math.tanh(math.atanh(0.8) - 0.2131), math.tanh(math.atanh(0.8) + 0.2131)), rel=1e-4
    )
    assert correlation_bounds(0.8, 3) == (-1, 1)


def test_blocks_are_pooled_by_their_weights() -> None:
    r = (300 * 0.9 + 100 * 0.8) / 400
    error = math.sqrt((300 * 0.02) ** 2 + (100 * 0.05) ** 2) / 400
    wanted = math.tanh(math.atanh(r) - 1.644854 * error / (1 - r * r))
    assert pooled_lower_bound([(0.9, 0.02, 300.0), (0.8, 0.05, 100.0)]) == pytest.approx(wanted, rel=1e-5)


def test_an_error_of_part_of_the_tokens_is_scaled_to_all_of_them_or_not_believed() -> None:
    error = torch.tensor([0.1, 0.1, 0.1, 0.1], dtype=torch.float64)
    found = PairErrors(error, error, torch.tensor([400.0, 100.0, 99.0, 500.0], dtype=torch.float64))
    believed = scaled(found, found.fisher, torch.full((4,), 400.0, dtype=torch.float64))
    assert believed[[0, 1, 3]].tolist() == pytest.approx([0.1, 0.05, 0.1])
    assert bool(believed[2].isnan())
