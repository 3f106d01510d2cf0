"""Each condition of a flag and of its release, on a stream in which it alone decides."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transcoder.antidup import CorrelationMonitor, UsageLedger
from transcoder.antidup import flags as flags_module
from transcoder.antidup.flags import FlagBook
from transcoder.antidup.merge_cost import MergeResult
from transcoder.config import MonitorSection
from transcoder.kernels import SparseCodes, use_backend
from transcoder.usage import REQUIRED_EFFECTS

TOKENS = 400
"""Of a block."""
SECTION = MonitorSection(block_tokens=TOKENS, min_support=10, min_sequences=1, blocks_to_flag=1, blocks_remembered=1)
PAIR = (0, 1)


def monitor(folder: Path, section: MonitorSection, d_sae: int = 4) -> CorrelationMonitor:
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")
    return CorrelationMonitor(section, d_sae, "cpu", folder / "logs", ledger)


def block(part: CorrelationMonitor, step: int, z: Tensor, sequences: Tensor | None = None) -> dict[str, Any]:
    """The report that closes a block of these tokens."""
    part.update_correlations(SparseCodes.from_dense(z), step, sequences=sequences)
    return part.report(step)


def firing(together: int, first_only: int, second_only: int) -> Tensor:
    """[TOKENS, 4]: latents 0 and 1 fire on so many tokens together and alone, spread over the block; 2 and 3 rarely."""
    z = torch.zeros(TOKENS, 4)
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    z[order[:together], :2] = 1
    z[order[together : together + first_only], 0] = 1
    z[order[together + first_only : together + first_only + second_only], 1] = 1
    z[0, 2] = z[1, 3] = 1
    return z


def copies() -> Tensor:
    return firing(100, 0, 0)


@pytest.mark.parametrize(("sequences", "flagged"), [(5, 0), (200, 1)])
def test_a_flag_needs_enough_sequences_in_its_blocks(sequences: int, flagged: int, tmp_path: Path) -> None:
    section = replace(SECTION, min_sequences=30, blocks_to_flag=3, blocks_remembered=4)
    part = monitor(tmp_path, section)
    for step in range(4):
        report = block(part, step, copies(), torch.arange(TOKENS) % sequences)
    assert report["pairs_flagged"] == flagged


def test_a_block_counts_by_its_lower_bound_and_not_by_the_correlation(tmp_path: Path) -> None:
    part = monitor(tmp_path, SECTION)
    # 88 of 112: r is 0.84, its lower bound 0.75.
    report = block(part, 0, firing(88, 12, 12))
    (pair,) = report["pairs"]
    assert pair["lower"] < 0.8 < pair["correlation"]
    assert pair["blocks_above"] == 0
    assert not pair["flagged"]


def test_a_flag_stays_while_the_upper_bound_is_above_the_release(tmp_path: Path) -> None:
    part = monitor(tmp_path, SECTION)
    assert block(part, 0, copies())["pairs_flagged"] == 1
    report = block(part, 1, firing(20, 10, 10))
    # r is 0.64 on 40 tokens, too few for a release; until it is above the threshold again, the flag does not count.
    assert float(part._past.statistics.statistics(*torch.tensor([[0], [1]])).correlation) < 0.66  # type: ignore[union-attr]
    assert report["pairs_flagged"] == 0
    assert not part.foldable().kept.numel()
    assert part._book.flagged == {PAIR}
    assert block(part, 2, copies())["pairs_flagged"] == 1
    block(part, 3, firing(60, 100, 100))
    assert not part._book.flagged


def test_a_release_rests_on_the_pairs_own_error_where_it_is_known(tmp_path: Path) -> None:
    part = monitor(tmp_path, SECTION)
    sequences = torch.arange(TOKENS) // 20
    assert block(part, 0, copies(), sequences)["pairs_flagged"] == 1
    # Twins on all sequences but one, on which the first is loud alone. Leaving that one out, r is 1; the rule of thumb takes
    # its 20 tokens for independent ones, and would release.
    z = torch.zeros(TOKENS, 4)
    z[::2, :2] = 1
    loud = sequences == 3
    z[loud, 0], z[loud, 1] = 3.0, 0.0
    block(part, 1, z, sequences)
    assert part._book.flagged == {PAIR}


def test_a_flag_rests_on_the_pairs_own_error_where_it_is_known(tmp_path: Path) -> None:
    part = monitor(tmp_path, replace(SECTION, blocks_to_flag=2, blocks_remembered=4))
    sequences = torch.arange(TOKENS) // 20
    for step in range(4):
        g = torch.Generator().manual_seed(step)
        z = (torch.rand(TOKENS, 4, generator=g) < 0.5).float()
        z[sequences == 3, :2] = 20.0 * torch.rand(20, 1, generator=g)  # one sequence carries the correlation
        report = block(part, step, z, sequences)
        (entry,) = [p for p in report["pairs"] if (p["i"], p["j"]) == PAIR]
        assert entry["blocks_above"] == step + 1
        assert not entry["flagged"]


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_sequences_of_tokens_without_weight_do_not_count(backend: str, tmp_path: Path) -> None:
    with use_backend(backend):
        part = monitor(tmp_path, replace(SECTION, min_sequences=1))
        weights = (torch.arange(TOKENS) < 20).float()
        z = torch.rand(TOKENS, 2, generator=torch.Generator().manual_seed(3)).repeat_interleave(2, 1)
        part.update_correlations(SparseCodes.from_dense(z), 0, torch.arange(TOKENS) // 4, weights)
        report = part.report(0)
    assert {(p["i"], p["j"]): p["sequences"] for p in report["pairs"]}[PAIR] == 5


@pytest.mark.parametrize("dead", [[0], [1], [0, 1]])
def test_a_flag_of_a_latent_that_died_is_released(dead: list[int], tmp_path: Path) -> None:
    part = monitor(tmp_path, SECTION)
    assert block(part, 0, copies())["pairs_flagged"] == 1
    z = copies()
    z[:, dead] = 0
    assert block(part, 1, z)["pairs_flagged"] == 0


def test_the_noise_of_independent_latents_is_taken_off_the_effective_size(tmp_path: Path) -> None:
    n = 64
    part = monitor(tmp_path, SECTION, n)
    g = torch.Generator().manual_seed(2)
    report = block(part, 0, torch.rand(128, n, generator=g) * (torch.rand(128, n, generator=g) < 0.5))
    # Without it about n / (1 + n / 128): 43.
    assert report["effective_dictionary_size"] == pytest.approx(n, rel=0.06)


def passes(i: Tensor, j: Tensor) -> MergeResult:
    """A merge test that everything passes."""
    one = torch.ones(i.shape, dtype=torch.float64)
    return MergeResult(i, j, one, 0 * one, one, torch.full_like(i, 100))


def test_only_flagged_pairs_are_folded(tmp_path: Path) -> None:
    part = monitor(tmp_path, replace(SECTION, blocks_to_flag=2, blocks_remembered=2))
    for step, flagged in ((0, 0), (1, 1)):
        part.update_correlations(SparseCodes.from_dense(copies()), step)
        report = part.report(step, judge=passes)
        assert (report["pairs_mergeable"], report["pairs_flagged"]) == (1, flagged)
        assert part.foldable().kept.numel() == flagged


def test_what_training_tokens_said_of_a_forgotten_latent_is_dropped(tmp_path: Path) -> None:
    part = monitor(tmp_path, SECTION)
    part.update_correlations(SparseCodes.from_dense(copies()), 0)
    part.report(0, judge=lambda i, j: part.evidence.completed(MergeResult.untested(i, j), torch.eye(4), None))
    assert len(part.evidence) == 1
    part.forget(torch.tensor([1]))
    assert len(part.evidence) == 0


def test_the_fading_view_forgets_a_latent_too(tmp_path: Path) -> None:
    part = monitor(tmp_path, replace(SECTION, halflife_tokens=10_000))
    assert block(part, 0, copies())["live_latents"] == 4
    part.forget(torch.tensor([1]))
    report = part.report(1)
    assert report["live_latents"] == 3
    assert report["pairs_total"] == 0


def test_a_book_forgets_flags_counts_and_evidence_of_a_latent() -> None:
    others = (2, 3)
    book = FlagBook(needed=1, remembered=4, threshold=0.8)
    low, high = (0.5, 0.05, 1000.0), (0.99, 0.001, 100.0)
    book.close_block([PAIR, others], [], {PAIR: high, others: high})
    book.close_block([], [], {PAIR: low, others: low})
    assert book.flagged == {PAIR, others}
    book.forget({1})
    assert book.flagged == {others}
    assert (book.blocks_above(PAIR), book.blocks_above(others)) == (0, 1)
    # Its one block is all that is known of the new latent: with the old ones' evidence the mean would be 0.53.
    book.close_block([PAIR], [], {PAIR: high})
    assert book.flagged == {PAIR, others}


def test_all_remembered_blocks_are_pooled() -> None:
    for before, flagged in (({PAIR: (0.5, 0.05, 100.0)}, set()), ({}, {PAIR})):
        book = FlagBook(needed=1, remembered=2, threshold=0.8)
        book.close_block([], [], before)
        book.close_block([PAIR], [], {PAIR: (0.82, 0.001, 100.0)})
        assert book.flagged == flagged


def test_a_released_pair_begins_anew() -> None:
    book = FlagBook(needed=3, remembered=6, threshold=0.8)
    for _ in range(4):
        book.close_block([PAIR], [])
    assert book.flagged == {PAIR}
    book.close_block([], [PAIR])
    assert book.flagged == set()
    # The four blocks before the release are still within the last six.
    book.close_block([], [])
    assert book.flagged == set()
    assert book.blocks_above(PAIR) == 0
    for _ in range(3):
        assert book.flagged == set()
        book.close_block([PAIR], [])
    assert book.flagged == {PAIR}


def test_what_was_measured_before_a_release_is_not_pooled_with_what_comes_after() -> None:
    book = FlagBook(needed=1, remembered=4, threshold=0.8)
    book.close_block([PAIR], [], {PAIR: (0.99, 0.001, 100.0)})
    book.close_block([], [PAIR], {PAIR: (0.5, 0.05, 1.0)})
    book.close_block([PAIR], [], {PAIR: (0.81, 0.05, 100.0)})
    assert book.flagged == set()


def test_flag_book_counts_the_last_blocks() -> None:
    book = FlagBook(needed=2, remembered=3, threshold=0.8)
    book.close_block([(0, 1)], [])
    assert book.flagged == set()
    book.close_block([], [])
    book.close_block([(0, 1)], [])
    assert book.flagged == {(0, 1)}
    other = FlagBook(2, 3, 0.8)
    other.load_state_dict(copy.deepcopy(book.state_dict()))
    assert other.flagged == {(0, 1)}
    assert other.blocks_above((0, 1)) == 2
    other.close_block([(0, 1)], [(0, 1)])
    assert other.flagged == set()


def test_the_book_holds_a_bounded_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flags_module, "MAX_PAIRS", 3)
    book = FlagBook(needed=1, remembered=2, threshold=0.8)
    book.close_block([(4, 5), (0, 1), (2, 3), (6, 7)], [])
    assert book.flagged == {(4, 5), (0, 1), (2, 3)}
    book.close_block([(6, 7)], [])
    assert book.flagged == {(4, 5), (0, 1), (2, 3)}
    book.close_block([], [(0, 1)])
    assert book.flagged == {(4, 5), (2, 3), (6, 7)}


def tokens(tied: list[tuple[int, int]], seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(400, 8, generator=g) * (torch.rand(400, 8, generator=g) < 0.5)
    for i, j in tied:
        z[:, j] = z[:, i]
    return z


@pytest.mark.parametrize("sketch_dim", [None, 64])
def test_the_pair_that_came_apart_is_the_one_released(sketch_dim: int | None, tmp_path: Path) -> None:
    # By (i, j) the pairs are (0, 7), (1, 2); by (j, i) they are (1, 2), (0, 7).
    section = replace(
        MonitorSection(), sketch_dim=sketch_dim, block_tokens=400, blocks_to_flag=1, min_support=10, min_sequences=1
    )
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), tmp_path / "usage.json")
    part = CorrelationMonitor(section, 8, "cpu", tmp_path / "logs", ledger)
    part.update_correlations(SparseCodes.from_dense(tokens([(0, 7), (1, 2)], 0)), 0)
    part.report(0)
    assert sorted(part._book.flagged) == [(0, 7), (1, 2)]
    part.update_correlations(SparseCodes.from_dense(tokens([(1, 2)], 1)), 1)
    part.report(1)
    assert sorted(part._book.flagged) == [(1, 2)]
