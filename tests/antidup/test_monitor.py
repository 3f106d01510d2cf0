"""The monitor finds planted duplicates, flags them on disjoint evidence, releases them, and leaves the rest
alone."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transcoder.antidup import CorrelationMonitor, UsageLedger, validate_correlation_report
from transcoder.antidup.merge_cost import MergeResult
from transcoder.antidup.pair_errors import correlation_bounds
from transcoder.antidup.window import pairs_in
from transcoder.config import MonitorSection
from transcoder.kernels import FeatureCorrelation, SparseCodes
from transcoder.kernels.correlation.reference import correlation_reference
from transcoder.usage import REQUIRED_EFFECTS

SECTION = MonitorSection(block_tokens=4000, min_support=100, min_sequences=30, correlation_save_frequency=1)
RHOS = (0.5, 0.6, 0.7, 0.95, 0.98, 1.0)
BATCH = 500


def planted(tokens: int, seed: int, rhos: tuple[float, ...] = RHOS, rate: float = 0.06, noise: int = 20) -> Tensor:
    """[tokens, 2 len(rhos) + noise]: latents 2n and 2n + 1 share a firing with probability rhos[n], which is
    then nearly their correlation (amplitude 1, small rate); the others are independent."""
    g = torch.Generator().manual_seed(seed)
    n = len(rhos)
    events = torch.rand(tokens, 3, n, generator=g) < rate
    shared = torch.rand(tokens, n, generator=g) < torch.tensor(rhos)
    z = torch.zeros(tokens, 2 * n + noise)
    z[:, 0 : 2 * n : 2] = ((events[:, 0] & shared) | (events[:, 1] & ~shared)).float()
    z[:, 1 : 2 * n : 2] = ((events[:, 0] & shared) | (events[:, 2] & ~shared)).float()
    z[:, 2 * n :] = (torch.rand(tokens, noise, generator=g) < rate).float()
    return z


def monitor(folder: Path, d_sae: int, section: MonitorSection = SECTION) -> CorrelationMonitor:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")
    return CorrelationMonitor(section, d_sae, "cpu", folder / "anti_duplication_logs", ledger)


def feed(part: CorrelationMonitor, z: Tensor, first: int = 1, sequences: int | None = 400) -> int:
    """Update batch by batch, reporting after each; returns the next step."""
    for a in range(0, z.shape[0], BATCH):
        ids = None if sequences is None else (torch.arange(a, a + BATCH) * 7919) % sequences
        part.update_correlations(SparseCodes.from_dense(z[a : a + BATCH]), first, sequences=ids)
        part.report(first)
        first += 1
    return first


def last_report(folder: Path) -> dict:
    return json.loads(sorted((folder / "anti_duplication_logs").glob("*.json"))[-1].read_text())


def test_planted_duplicates_are_flagged_and_pairs_up_to_070_are_not(tmp_path: Path) -> None:
    z = planted(16000, 0)
    part = monitor(tmp_path, z.shape[1])
    feed(part, z)
    report = last_report(tmp_path)
    validate_correlation_report(report)
    assert {(p["i"], p["j"]) for p in report["pairs"] if p["flagged"]} == {(6, 7), (8, 9), (10, 11)}
    assert report["pairs_flagged"] == report["pairs_total"] == 3
    assert all(p["blocks_above"] == 4 for p in report["pairs"])
    # The live view at this moment: the last full block, and nothing yet of the next.
    truth = correlation_reference(z[-SECTION.block_tokens :])
    for pair in report["pairs"]:
        i, j = pair["i"], pair["j"]
        assert pair["correlation"] == pytest.approx(float(truth.correlation[i, j]), abs=1e-4)
        assert pair["cosine"] == pytest.approx(float(truth.cosine[i, j]), abs=1e-4)
        assert pair["support"] == int(truth.union[i, j])
        assert pair["jaccard"] == pytest.approx(float(truth.jaccard[i, j]))
        assert pair["lower"] > 0.8
    assert report["components"] == [[6, 7], [8, 9], [10, 11]]
    assert report["live_latents"] == z.shape[1]
    assert report["candidate_components"] == report["components"]
    assert report["distinct_latents"] == report["distinct_latents_candidates"] == z.shape[1] - 3
    assert report["share_of_live_with_neighbour"] == pytest.approx(6 / z.shape[1])
    assert report["tokens"] == 16000
    i, j = part.target_pairs(10)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(6, 7), (8, 9), (10, 11)]
    assert part.target_pairs(2)[0].numel() == 2
    assert part.metrics()["duplicates/flagged"] == 3.0


def test_no_flag_without_enough_blocks(tmp_path: Path) -> None:
    z = planted(8000, 1)
    part = monitor(tmp_path, z.shape[1])
    feed(part, z)
    report = last_report(tmp_path)
    assert report["pairs_total"] == 3
    assert report["pairs_flagged"] == 0
    assert all(p["blocks_above"] == 2 for p in report["pairs"])
    # Candidates are already offered to the regularizer.
    assert part.target_pairs(10)[0].numel() == 3


def test_flags_are_released_when_the_pair_parts_or_dies(tmp_path: Path) -> None:
    section = replace(SECTION, blocks_to_flag=1, blocks_remembered=1, block_tokens=4000)
    part = monitor(tmp_path, 32, section)
    step = feed(part, planted(4000, 2))
    assert last_report(tmp_path)["pairs_flagged"] == 3
    later = planted(4000, 3, rhos=(0.5, 0.6, 0.7, 0.2, 0.98, 1.0))
    later[:, 9] = 0
    feed(part, later, step)
    report = last_report(tmp_path)
    assert [(p["i"], p["j"]) for p in report["pairs"] if p["flagged"]] == [(10, 11)]


def test_a_flag_between_release_and_threshold_is_kept_but_does_not_count(tmp_path: Path) -> None:
    section = replace(SECTION, blocks_to_flag=1, blocks_remembered=1, block_tokens=4000)
    part = monitor(tmp_path, 32, section)
    step = feed(part, planted(4000, 4))
    feed(part, planted(8000, 5, rhos=(0.5, 0.6, 0.7, 0.76, 0.98, 1.0)), step)
    report = last_report(tmp_path)
    assert (6, 7) in part._book.flagged
    # It is reported whatever its correlation is now, and flagged only above the threshold.
    for pair in report["pairs"]:
        assert pair["flagged"] == (pair["correlation"] > section.correlation_threshold), pair
    assert next(p["correlation"] for p in report["pairs"] if p["i"] == 6) < 0.8


def test_rare_pairs_and_pairs_of_few_sequences_are_not_candidates(tmp_path: Path) -> None:
    z = planted(4000, 6, rhos=(1.0,), rate=0.02)
    assert int((z[:, 0] > 0).sum()) < 100
    part = monitor(tmp_path / "rare", z.shape[1])
    feed(part, z)
    assert last_report(tmp_path / "rare")["pairs_total"] == 0
    z = planted(4000, 7, rhos=(1.0,))
    for name, sequences, found in (("few", 10, 0), ("many", 200, 1), ("unknown", None, 1)):
        part = monitor(tmp_path / name, z.shape[1])
        feed(part, z, sequences=sequences)
        report = last_report(tmp_path / name)
        assert report["pairs_total"] == found
        if found:
            seen = report["pairs"][0]["sequences"]
            assert seen is None if sequences is None else 100 < seen < 300


def test_the_monitor_correlates_latents_not_tokens(tmp_path: Path) -> None:
    # As many tokens as latents: a corrcoef of [B, N] would be of the right shape and of the wrong thing.
    z = planted(32, 8, rhos=RHOS, rate=0.5)
    part = monitor(tmp_path, 32, replace(SECTION, min_support=1, min_sequences=1))
    part.update_correlations(SparseCodes.from_dense(z), 1)
    found = {(p["i"], p["j"]): p["correlation"] for p in part.report(1)["pairs"]}
    assert found[10, 11] == pytest.approx(1.0)
    truth = torch.corrcoef(z.double().T)
    assert all(r == pytest.approx(float(truth[i, j]), abs=1e-9) for (i, j), r in found.items())


def test_sorted_triples_of_strangers_correlate_and_their_streams_do_not(tmp_path: Path) -> None:
    # The original's figure: corrcoef of each latent's three strongest activations, SORTED. Any two sorted triples rise
    # together, so independent latents came out at 0.9 and more.
    g = torch.Generator().manual_seed(40)
    z = torch.rand(4000, 60, generator=g) * (torch.rand(4000, 60, generator=g) < 0.1)
    triples = z.topk(3, dim=0).values.T.double()
    wrong = torch.corrcoef(triples)[torch.triu_indices(60, 60, 1).unbind()]
    assert float(wrong.median()) > 0.85
    part = monitor(tmp_path, 60)
    feed(part, z)
    report = last_report(tmp_path)
    assert report["pairs_total"] == report["pairs_flagged"] == 0
    edges, counts = report["histogram"]["edges"], report["histogram"]["counts"]
    assert all(abs(edge) <= 0.15 for edge, count in zip(edges, counts, strict=False) if count)


@pytest.mark.parametrize(("halflife", "sketch_dim"), [(None, None), (3000, None), (None, 64), (3000, 64)])
@pytest.mark.parametrize("cut", [3000, 4500])
def test_resume_in_the_middle_changes_nothing(
    halflife: int | None, sketch_dim: int | None, cut: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_ring(monkeypatch)
    z = planted(10000, 9)
    section = replace(SECTION, halflife_tokens=halflife, sketch_dim=sketch_dim, blocks_to_flag=1)
    whole = monitor(tmp_path / "whole", z.shape[1], section)
    feed(whole, z)
    half = monitor(tmp_path / "half", z.shape[1], section)
    step = feed(half, z[:cut])
    resumed = monitor(tmp_path / "half", z.shape[1], section)
    resumed.load_state_dict(copy.deepcopy(half.state_dict()))
    assert torch.equal(resumed.target_pairs(9)[0], half.target_pairs(9)[0])
    assert resumed.metrics() == half.metrics()
    feed_from = z[cut:]
    for a in range(0, feed_from.shape[0], BATCH):
        ids = (torch.arange(cut + a, cut + a + BATCH) * 7919) % 400
        resumed.update_correlations(SparseCodes.from_dense(feed_from[a : a + BATCH]), step, sequences=ids)
        resumed.report(step)
        step += 1
    assert last_report(tmp_path / "half") == last_report(tmp_path / "whole")


def test_the_fading_view_forgets(tmp_path: Path) -> None:
    part = monitor(tmp_path, 32, replace(SECTION, halflife_tokens=2000))
    step = feed(part, planted(4000, 10))
    assert last_report(tmp_path)["pairs_total"] >= 3
    feed(part, planted(4000, 11, rhos=(0.5, 0.6, 0.7, 0.2, 0.2, 1.0)), step)
    assert {(p["i"], p["j"]) for p in last_report(tmp_path)["pairs"]} == {(10, 11)}


def test_update_every_passes_steps_over(tmp_path: Path) -> None:
    part = monitor(tmp_path, 32, replace(SECTION, update_every=3))
    codes = SparseCodes.from_dense(planted(100, 12))
    for step in range(1, 10):
        part.update_correlations(codes, step)
    record = part._ledger.record()["components"]["correlation_monitor"]
    assert record["calls"] == 3
    active = (codes.to_dense() > 0).sum(1)
    assert record["effect"]["pairs_seen"] == 3 * float((active * (active - 1) // 2).sum())


def test_a_sketched_monitor_finds_the_same_pairs(tmp_path: Path) -> None:
    z = planted(4000, 13, noise=100)
    part = monitor(tmp_path, z.shape[1], replace(SECTION, sketch_dim=128))
    feed(part, z)
    report = last_report(tmp_path)
    validate_correlation_report(report)
    assert {(p["i"], p["j"]) for p in report["pairs"]} == {(6, 7), (8, 9), (10, 11)}
    assert report["effective_dictionary_size"] is None
    assert monitor(tmp_path, 40000)._sketch_dim == 128


def short_ring(monkeypatch: pytest.MonkeyPatch, tokens: int = BATCH) -> None:
    monkeypatch.setattr(
        "transcoder.antidup.monitor.FeatureCorrelation", partial(FeatureCorrelation, ring_tokens=tokens)
    )


@pytest.mark.parametrize("halflife", [None, 3000])
def test_a_sketched_monitor_flags_pairs_too_rare_for_the_ring(
    halflife: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_ring(monkeypatch)
    z = planted(16000, 24, rhos=(1.0, 0.98), rate=0.03)
    # About 120 tokens in a block, 15 in the ring; at least 100 are asked for.
    section = replace(SECTION, sketch_dim=64, halflife_tokens=halflife)
    for name, found in (("watching", {(0, 1), (2, 3)}), ("blind", set())):
        if name == "blind":
            monkeypatch.setattr(FeatureCorrelation, "watch", lambda *_: None)
        part = monitor(tmp_path / name, z.shape[1], section)
        feed(part, z)
        report = last_report(tmp_path / name)
        validate_correlation_report(report)
        assert {(p["i"], p["j"]) for p in report["pairs"]} == found
        assert report["pairs_flagged"] == len(found)
        if found and halflife is None:
            counted = monitor(tmp_path / "counted", z.shape[1])
            feed(counted, z)
            exact = last_report(tmp_path / "counted")["pairs"]
            for mine, theirs in zip(report["pairs"], exact, strict=True):
                for field in ("i", "j", "support", "sequences", "blocks_above", "flagged"):
                    assert mine[field] == theirs[field], field
                assert mine["correlation"] == pytest.approx(theirs["correlation"], abs=1e-9)


def test_no_count_is_lost_where_blocks_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_ring(monkeypatch)
    z = planted(14000, 25, rhos=(1.0,), rate=0.03)
    part = monitor(tmp_path, z.shape[1], replace(SECTION, sketch_dim=64))
    step, i, j = 1, torch.tensor([0]), torch.tensor([1])
    for a in range(0, 14000, BATCH):
        part.update_correlations(SparseCodes.from_dense(z[a : a + BATCH]), step)
        part.report(step)
        step += 1
        end = a + BATCH
        full = end // SECTION.block_tokens * SECTION.block_tokens
        live = part._block.statistics.statistics(i, j, beside=[] if part._past is None else [part._past.statistics])
        first = max(0, full - SECTION.block_tokens)
        # The last full block and the one in progress, every token of both.
        assert float(live.weight) == end - first
        assert int(live.support) == int((z[first:end, :2].amax(1) > 0).sum())
        own = part._block.statistics.statistics(i, j)
        assert float(own.weight) == end - full


def test_blocks_watch_what_they_propose_themselves_beside_a_fading_view(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short_ring(monkeypatch)
    z = planted(3500, 29, rhos=(1.0,), rate=0.03)
    # Apart for one batch: a view of 20 tokens no longer proposes the pair, the block goes on counting it.
    z[2000:2500] = planted(500, 30, rhos=(0.0,), rate=0.1)
    part = monitor(tmp_path, z.shape[1], replace(SECTION, sketch_dim=64, halflife_tokens=20))
    feed(part, z[:2500])
    assert float(part._fading.correlation(0, 1)) < 0.5  # type: ignore[union-attr]
    feed(part, z[2500:], 6)
    assert float(part._block.statistics.statistics(torch.tensor([0]), torch.tensor([1])).weight) == 3500


def test_a_rare_flag_is_released_under_a_sketch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_ring(monkeypatch)
    section = replace(SECTION, sketch_dim=64, blocks_to_flag=1, blocks_remembered=1, min_support=15, min_sequences=1)
    part = monitor(tmp_path, 22, section)
    step = feed(part, planted(4000, 26, rhos=(1.0,), rate=0.006))
    assert last_report(tmp_path)["pairs_flagged"] == 1
    apart = planted(4000, 27, rhos=(0.0,), rate=0.006)
    # In the ring alone they fire so seldom that the bounds would hold anything.
    support = int((apart[-BATCH:, :2].amax(1) > 0).sum())
    assert correlation_bounds(0.0, support)[1] > section.release_threshold
    feed(part, apart, step)
    assert last_report(tmp_path)["pairs_flagged"] == 0


def test_targets_alone_are_watched_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    short_ring(monkeypatch)
    z = planted(4000, 28, rhos=(1.0,), rate=0.03)
    part = monitor(tmp_path, z.shape[1], replace(SECTION, sketch_dim=64))
    found = []
    for step, a in enumerate(range(0, 4000, BATCH), 1):
        part.update_correlations(SparseCodes.from_dense(z[a : a + BATCH]), step)
        found.append(part.refresh_targets())
    assert found[0] == 0
    assert found[-1] == 1


@pytest.mark.parametrize("density", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("zeros", [False, True])
def test_pairs_seen_are_those_that_fire_together(density: float, zeros: bool) -> None:
    g = torch.Generator().manual_seed(3)
    z = torch.rand(20, 9, generator=g) * (torch.rand(20, 9, generator=g) < density)
    codes = SparseCodes.from_dense(z + 1.0).with_values(z.flatten()) if zeros else SparseCodes.from_dense(z)
    fired = (z > 0).sum(1)
    assert int(pairs_in(codes)) == int((fired * (fired - 1) // 2).sum())


def test_targets_can_be_surveyed_before_the_first_report(tmp_path: Path) -> None:
    z = planted(6000, 19)
    part = monitor(tmp_path, z.shape[1])
    assert part.refresh_targets() == 0
    assert part._ledger.surveys == 0  # nothing was streamed, so nothing was looked at
    for step, a in enumerate(range(0, 6000, BATCH), 1):
        part.update_correlations(SparseCodes.from_dense(z[a : a + BATCH]), step)
    assert part.target_pairs(10)[0].numel() == 0
    assert part.refresh_targets() == 3
    assert part._ledger.surveys == 1
    i, j = part.target_pairs(10)
    assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == [(6, 7), (8, 9), (10, 11)]
    # A survey alone: no file, no metrics, no closed block, though the block is full.
    assert list((tmp_path).rglob("*.json")) == []
    assert part.metrics() == {}
    assert part._past is None
    report = part.report(12)
    assert part._past is not None
    assert part._ledger.surveys == 2
    assert report["pairs_total"] == 3


def test_weights_weigh_the_sums_and_zero_is_not_there(tmp_path: Path) -> None:
    z = planted(4000, 20)
    g = torch.Generator().manual_seed(21)
    weights = torch.rand(4000, generator=g) * (torch.rand(4000, generator=g) < 0.7)
    for name, section in (("plain", SECTION), ("fading", replace(SECTION, halflife_tokens=10**9))):
        part = monitor(tmp_path / name, z.shape[1], section)
        ids = torch.where(weights > 0, torch.arange(4000) % 50, torch.arange(4000) + 50)
        part.update_correlations(SparseCodes.from_dense(z), 1, sequences=ids, weights=weights)
        seen = weights > 0
        expected = torch.cov(z[:, 8:10].double().T, correction=0, aweights=weights.double())
        r = float(expected[0, 1] / (expected[0, 0] * expected[1, 1]).sqrt())
        pair = next(p for p in part.report(1)["pairs"] if p["i"] == 8)
        assert pair["correlation"] == pytest.approx(r, abs=1e-6)
        union = int(((z[:, 8] + z[:, 9] > 0) & seen).sum())
        assert pair["support"] == pytest.approx(union, abs=1)
        assert pair["sequences"] == pytest.approx(50, abs=5)


def verdicts(i: Tensor, j: Tensor, shares: dict[tuple[int, int], float | None]) -> MergeResult:
    """A judge's answer by hand: the share of each pair, None where its latent hardly fired."""
    found = [shares[pair] for pair in zip(i.tolist(), j.tolist(), strict=True)]
    cost = torch.tensor([0.0 if share is None else share for share in found], dtype=torch.float64)
    firings = torch.tensor([3 if share is None else 500 for share in found])
    return MergeResult(i, j, torch.ones_like(cost), cost * 0.01, torch.full_like(cost, 0.01), firings)


def test_what_the_merge_test_refuses_is_reported_and_no_target(tmp_path: Path) -> None:
    z = planted(6000, 19)
    shares = {(6, 7): 0.5, (8, 9): None, (10, 11): 0.02}
    act, leave = True, False
    for limit, untested, targets, refused in (
        (0.2, act, [(8, 9), (10, 11)], 1),
        (0.2, leave, [(10, 11)], 1),
        (0.01, act, [(8, 9)], 2),
        (None, leave, [(6, 7), (8, 9), (10, 11)], 0),
    ):
        section = replace(SECTION, merge_share_to_act=limit, act_on_untested=untested)
        part = monitor(tmp_path, z.shape[1], section)
        for step, a in enumerate(range(0, 6000, BATCH), 1):
            part.update_correlations(SparseCodes.from_dense(z[a : a + BATCH]), step)
        assert part.refresh_targets(lambda i, j: verdicts(i, j, shares)) == len(targets)
        report = part.report(12, judge=lambda i, j: verdicts(i, j, shares))
        validate_correlation_report(report)
        i, j = part.target_pairs(10)
        assert sorted(zip(i.tolist(), j.tolist(), strict=True)) == targets
        assert (report["pairs_total"], report["pairs_mergeable"], report["pairs_refused"]) == (3, 1, refused)
        tests = {(p["i"], p["j"]): (p["mergeable"], p["merge_share"]) for p in report["pairs"]}
        assert tests[(8, 9)] == (None, None)
        assert report["pairs_untested"] == 1
        assert tests[(6, 7)] == (False, pytest.approx(0.5))
        assert tests[(10, 11)] == (True, pytest.approx(0.02))
        assert part.metrics()["duplicates/mergeable"] == 1


def test_without_a_judge_every_candidate_is_a_target(tmp_path: Path) -> None:
    z = planted(6000, 19)
    part = monitor(tmp_path, z.shape[1])
    feed(part, z)
    report = part.report(99)
    validate_correlation_report(report)
    assert report["pairs_mergeable"] is None
    assert part.target_pairs(10)[0].numel() == report["pairs_total"] == 3


def test_only_the_strongest_pairs_are_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcoder.antidup.monitor.MOST_JUDGED", 1)
    z = planted(6000, 19)
    part = monitor(tmp_path, z.shape[1])
    feed(part, z)
    asked: list[tuple[int, int]] = []

    def judge(i: Tensor, j: Tensor) -> MergeResult:
        asked.extend(zip(i.tolist(), j.tolist(), strict=True))
        return verdicts(i, j, {(10, 11): 0.9})

    part.section = replace(part.section, act_on_untested=True)
    report = part.report(99, judge=judge)
    validate_correlation_report(report)
    assert asked == [(10, 11)]
    assert report["pairs_untested"] == 2
    assert part.target_pairs(10)[0].tolist() == [8, 6]


def test_forgotten_latents_leave_flags_targets_and_sums(tmp_path: Path) -> None:
    section = replace(SECTION, block_tokens=2000, blocks_to_flag=2, blocks_remembered=3)
    z = planted(6000, 19)
    part = monitor(tmp_path, z.shape[1], section)
    feed(part, z)
    shares = {(6, 7): 0.05, (8, 9): 0.02, (10, 11): 0.5}
    report = part.report(90, judge=lambda i, j: verdicts(i, j, shares))
    assert {(8, 9), (10, 11)} <= {(p["i"], p["j"]) for p in report["pairs"] if p["flagged"]}
    foldable = part.foldable()
    assert next(zip(foldable.kept.tolist(), foldable.dropped.tolist(), strict=True)) == (8, 9)
    assert 10 not in foldable.kept.tolist()
    part.forget(torch.tensor([9]))
    assert 9 not in torch.cat(part.target_pairs(10)).tolist()
    after = part.report(91)
    assert not any(9 in (p["i"], p["j"]) for p in after["pairs"])
    assert any((p["i"], p["j"]) == (10, 11) and p["flagged"] for p in after["pairs"])
    assert after["live_latents"] == report["live_latents"] - 1


@pytest.mark.parametrize("field", ["block", "past", "past_sequences", "book", "targets", "tokens"])
def test_a_state_that_does_not_fit_changes_nothing(tmp_path: Path, field: str) -> None:
    z = planted(5000, 3)
    part, other = monitor(tmp_path / "a", z.shape[1]), monitor(tmp_path / "b", z.shape[1])
    feed(part, z)
    feed(other, z[:1000])
    before = other.report(50)
    for bad in ({}, None):
        state = copy.deepcopy(part.state_dict())
        if bad is None:
            del state[field]
        else:
            state[field] = bad
        with pytest.raises((ValueError, KeyError, TypeError)):
            other.load_state_dict(state)
    assert other.report(50) == before
    other.load_state_dict(part.state_dict())
    assert other.report(50) == part.report(50)


def test_flagged_pairs_are_judged_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcoder.antidup.monitor.MOST_JUDGED", 2)
    z = planted(6000, 19)
    part = monitor(tmp_path, z.shape[1], replace(SECTION, block_tokens=2000, blocks_to_flag=2, blocks_remembered=3))
    feed(part, z)
    part._book.flagged = {(6, 7)}  # the weakest of the three
    asked: list[list[tuple[int, int]]] = []

    def judge(i: Tensor, j: Tensor) -> MergeResult:
        asked.append(list(zip(i.tolist(), j.tolist(), strict=True)))
        return verdicts(i, j, {(6, 7): 0.9, (10, 11): 0.02})

    report = part.report(99, judge=judge)
    validate_correlation_report(report)
    assert asked == [[(6, 7), (10, 11)]]
    assert {(p["i"], p["j"]): p["mergeable"] for p in report["pairs"]} == {(6, 7): False, (8, 9): None, (10, 11): True}
    assert (report["pairs_mergeable"], report["pairs_refused"], report["pairs_untested"]) == (1, 1, 1)
