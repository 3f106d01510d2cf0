"""A hundred thousand pairs above the threshold: handled in bounded numbers, their groups known, and the same after a resume."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transcoder.antidup import CorrelationMonitor, UsageLedger, validate_correlation_report
from transcoder.antidup.candidates import LEAST_LIMIT, most_telling
from transcoder.antidup.merge_cost import MergeResult
from transcoder.antidup.workload import SEARCH, SHARE, TEST, WorkBudget
from transcoder.config import MonitorSection
from transcoder.kernels import FeatureCorrelation, SparseCodes
from transcoder.kernels.correlation.statistics import CorrelatedPairs
from transcoder.usage import REQUIRED_EFFECTS

GROUPS, WIDTH = (300, 400), 720
PAIRS = sum(n * (n - 1) // 2 for n in GROUPS)


def grouped(tokens: int, seed: int) -> Tensor:
    """[tokens, WIDTH]: the latents of a group fire together, with nearly the same amplitude; the others alone."""
    g = torch.Generator().manual_seed(seed)
    z = torch.zeros(tokens, WIDTH)
    first = 0
    for size in GROUPS:
        fires = (torch.rand(tokens, 1, generator=g) < 0.2) * (0.5 + torch.rand(tokens, 1, generator=g))
        z[:, first : first + size] = fires * (1 + 0.05 * torch.rand(tokens, size, generator=g))
        first += size
    z[:, first:] = (torch.rand(tokens, WIDTH - first, generator=g) < 0.3).float()
    return z


def monitor(folder: Path) -> CorrelationMonitor:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")
    section = MonitorSection(block_tokens=600, min_support=50, min_sequences=1, blocks_to_flag=1, blocks_remembered=2)
    return CorrelationMonitor(section, WIDTH, "cpu", folder / "logs", ledger)


def test_a_hundred_thousand_pairs_are_bounded_and_their_groups_known(tmp_path: Path) -> None:
    assert PAIRS > 100_000
    part = monitor(tmp_path)
    part.update_correlations(SparseCodes.from_dense(grouped(400, 0)), 1)
    asked: list[int] = []

    def judge(i: Tensor, j: Tensor) -> MergeResult:
        asked.append(i.numel())
        return MergeResult.untested(i, j)

    report = part.report(1, judge=judge)
    validate_correlation_report(report)
    assert report["pairs_total"] == PAIRS
    assert len(report["pairs"]) == part.section.max_reported_pairs
    assert [len(group) for group in report["candidate_components"]] == [400, 300]
    assert report["distinct_latents_candidates"] == WIDTH - sum(GROUPS) + len(GROUPS)
    assert asked == [4096]
    assert part.refresh_targets() == LEAST_LIMIT
    # A block closes: flags are bounded too, and join whole groups.
    part.update_correlations(SparseCodes.from_dense(grouped(400, 1)), 2)
    closed = part.report(2)
    assert 0 < closed["pairs_flagged"] <= 2 * LEAST_LIMIT
    assert [len(group) for group in closed["components"]] == [400, 300]


def test_a_report_without_a_search_is_the_same_after_a_resume(tmp_path: Path) -> None:
    whole, resumed = monitor(tmp_path / "a"), monitor(tmp_path / "b")
    codes = [SparseCodes.from_dense(grouped(150, seed)) for seed in range(3)]
    whole.update_correlations(codes[0], 1)
    whole.report(1)
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    reports = []
    for part in (whole, resumed):
        part.update_correlations(codes[1], 2)
        reports.append([part.report(2, search=False), part.report(3)])
    assert reports[0] == reports[1]
    known, searched = reports[0]
    assert known["histogram"] != searched["histogram"]
    assert known["pairs_total"] <= searched["pairs_total"] == PAIRS


def test_few_pairs_are_all_telling_and_many_join_their_groups() -> None:
    def pairs(i: Tensor, j: Tensor) -> CorrelatedPairs:
        r = torch.linspace(1, 0.8, i.numel(), dtype=torch.float64)
        return CorrelatedPairs(i, j, r, torch.full_like(i, 100), r, r, r)

    few = pairs(torch.tensor([0, 1]), torch.tensor([5, 2]))
    assert most_telling(few, 10) is few
    i, j = torch.triu_indices(300, 300, 1)
    # The weakest pair of all is the only one of its group.
    many = pairs(torch.cat([i, torch.tensor([300])]), torch.cat([j, torch.tensor([301])]))
    kept = most_telling(many, 302)
    assert len(kept) == LEAST_LIMIT
    assert (int(kept.i[-1]), int(kept.j[-1])) == (300, 301)
    assert bool((kept.correlation.diff() <= 0).all())
    assert torch.cat([kept.i, kept.j]).unique().numel() == 302


@pytest.mark.parametrize("backend", ["cpp", "torch"])
def test_a_limited_survey_has_the_strongest_pairs_and_counts_all(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSCODER_BACKEND", backend)
    g = torch.Generator().manual_seed(5)
    base = torch.rand(200, 1, generator=g) * (torch.rand(200, 1, generator=g) < 0.5)
    z = base * (1 + 0.3 * torch.rand(200, 40, generator=g))
    found = FeatureCorrelation(40)
    found.update(SparseCodes.from_dense(z))
    every, limited = found.survey(0.5, 10), found.survey(0.5, 10, most=25)
    assert every.total == len(every.pairs) == limited.total == 780
    assert len(limited.pairs) == 25
    assert torch.equal(limited.pairs.i, every.pairs.i[:25])
    assert torch.equal(limited.pairs.j, every.pairs.j[:25])
    assert found.survey(0.5, 1000).total == 0


def test_a_debt_is_paid_by_steps_and_unused_credit_is_not_kept() -> None:
    work = WorkBudget()
    work.earn(1e12)
    assert work.affords(SEARCH)
    work.spend(SEARCH, 100.0)
    assert not work.affords(SEARCH)
    assert work.affords(TEST)
    work.earn(99.0 / SHARE)
    resumed = WorkBudget()
    resumed.load_state_dict(work.state_dict())
    for part in (work, resumed):
        assert not part.affords(SEARCH)
        part.earn(1.1 / SHARE)
        assert part.affords(SEARCH)
