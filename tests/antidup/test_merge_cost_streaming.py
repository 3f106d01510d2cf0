"""Verdicts from training tokens are those of the merge test on the same tokens, and only where held-out tokens say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from bench.science.toy import Toy, independent
from transcoder import RunConfig, train_transcoder
from transcoder.antidup import merge_cost_streaming as module
from transcoder.antidup.merge_cost import MergeResult, MergeTest
from transcoder.antidup.merge_cost_streaming import ENOUGH, MergeEvidence
from transcoder.kernels import SparseCodes, sparse_decode

D_SAE, D_OUT, TOKENS = 12, 7, 400
LEFT, RIGHT = torch.tensor([0, 2, 5, 3]), torch.tensor([1, 9, 6, 10])
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _reads_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST_READ", 1 << 40)


def world(seed: int, tokens: int = TOKENS) -> tuple[SparseCodes, Tensor, Tensor, Tensor]:
    """(codes, residual, target, W_dec) in which latents 0 and 1 share their firings."""
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(tokens, D_SAE, generator=g) * (torch.rand(tokens, D_SAE, generator=g) < 0.3)
    z[:, 1] = 0.7 * z[:, 0]
    fixed = torch.Generator().manual_seed(99)
    W = torch.nn.functional.normalize(torch.randn(D_SAE, D_OUT, generator=fixed), dim=1)
    codes = SparseCodes.from_dense(z)
    target = z @ W + 0.3 * torch.randn(tokens, D_OUT, generator=g)
    return codes, sparse_decode(codes, W, torch.zeros(D_OUT)) - target, target, W


def asked(evidence: MergeEvidence, i: Tensor = LEFT, j: Tensor = RIGHT) -> None:
    _, _, _, W = world(0)
    evidence.completed(MergeResult.untested(i, j), W, None)
    evidence.settle()


@pytest.mark.parametrize("widths", [None, (1, 6, 12)])
def test_verdicts_are_those_of_the_merge_test_on_the_same_tokens(widths: tuple[int, ...] | None) -> None:
    evidence = MergeEvidence(D_SAE, CPU)
    asked(evidence)
    W = world(0)[3]
    test = MergeTest(LEFT, RIGHT, W, widths)
    for seed in range(3):
        codes, residual, target, _ = world(seed)
        evidence.add(evidence.measure(codes, residual, target, W))
        test.update(codes, residual, target)
    wanted = test.result()
    # In the order of the question, whichever way round the pairs stand in it.
    found = evidence.completed(MergeResult.untested(RIGHT.flip(0), LEFT.flip(0)), W, widths)
    for name in ("kept", "dropped", "firings"):
        assert torch.equal(getattr(found, name).flip(0), getattr(wanted, name))
    for name in ("scale", "cost_share"):
        torch.testing.assert_close(getattr(found, name).flip(0), getattr(wanted, name), rtol=1e-4, atol=1e-6)
    # Its denominator is taken around each batch's own mean.
    torch.testing.assert_close(found.fvu_change.flip(0), wanted.fvu_change, rtol=0.02, atol=1e-6)
    assert found.mergeable().flip(0).tolist() == wanted.mergeable().tolist()
    assert bool(wanted.mergeable()[0])


@pytest.mark.parametrize("weighted", [False, True])
def test_both_ways_of_measuring_are_one(weighted: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Latents in several pairs, one that never fires, stored zeros, and pages of a few entries.
    monkeypatch.setattr("transcoder.antidup.merge_cost_streaming.DOTS_AT_A_TIME", 37)
    codes, residual, _, W = world(5)
    values = codes.values.clone()
    values[::7] = 0
    values[codes.indices == 10] = 0
    codes = codes.with_values(values)
    left, right = torch.tensor([0, 0, 1, 3, 4]), torch.tensor([1, 2, 2, 10, 5])
    evidence = MergeEvidence(D_SAE, CPU)
    asked(evidence, left, right)
    w = torch.rand(TOKENS, generator=torch.Generator().manual_seed(1)).double() if weighted else None
    if w is not None:
        w[::5] = 0
    sums, fired, _ = evidence._measure_firings(codes, residual, W, w)
    monkeypatch.setattr("transcoder.antidup.merge_cost_streaming.MOST_FIRINGS", 5000)
    every, all_fired, looked_at = evidence._measure_some(codes, residual, W, w)
    assert bool(looked_at.all())
    torch.testing.assert_close(sums, every, rtol=1e-12, atol=1e-12)
    assert torch.equal(fired, all_fired)
    assert int(fired[1, 3]) == 0
    assert int(fired.sum()) > 500
    silent = codes.with_values(torch.zeros_like(values))
    assert not bool(torch.cat(evidence._measure_firings(silent, residual, W, w)[:2]).any())
    assert not bool(torch.cat(evidence._measure_some(silent, residual, W, w)[:2]).any())


@pytest.mark.parametrize("way", ["some", "firings"])
@pytest.mark.parametrize("room", [0, 1, 300, 301, 302, 303])
def test_a_batch_of_too_many_firings_says_what_its_first_tokens_say(
    room: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As much as fits, whole tokens only; the target is that of the same tokens."""
    for name in ("MOST_FIRINGS", "MOST_READ"):
        monkeypatch.setattr(module, name, room)
    codes, residual, _, W = world(5)
    evidence = MergeEvidence(D_SAE, CPU)
    asked(evidence)
    residual[-1] = torch.nan
    sums, fired, looked_at = getattr(evidence, f"_measure_{way}")(codes, residual, W, None)
    told = int(looked_at.sum())
    assert bool(looked_at[:told].all())
    assert told < TOKENS
    followed = torch.isin(codes.indices, torch.cat([LEFT, RIGHT])) & (codes.values > 0)
    assert int(fired.sum()) == int(followed[: codes.row_ptr[told]].sum()) <= room
    assert int(followed[: codes.row_ptr[told + 1]].sum()) > room
    monkeypatch.setattr(module, "MOST_READ", TOKENS * D_SAE)
    wanted, all_fired, _ = evidence._measure_firings(
        SparseCodes.from_dense(codes.to_dense()[:told]), residual[:told], W, None
    )
    torch.testing.assert_close(sums, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(fired, all_fired)


def test_a_device_that_is_not_read_gives_the_same_verdicts() -> None:
    found = []
    for reads in (True, False):
        evidence = MergeEvidence(D_SAE, CPU)
        evidence._reads = reads
        asked(evidence)
        for seed in range(3):
            codes, residual, target, W = world(seed)
            evidence.add(evidence.measure(codes, residual, target, W))
        found.append(evidence.completed(MergeResult.untested(LEFT, RIGHT), W, None))
    torch.testing.assert_close(found[0].fvu_change, found[1].fvu_change, rtol=1e-9, atol=0)
    assert torch.equal(found[0].firings, found[1].firings)


def test_weights_weigh_the_tokens_and_zero_is_not_there() -> None:
    codes, residual, target, W = world(0)
    weights = torch.ones(TOKENS)
    weights[200:] = 0
    halves = [MergeEvidence(D_SAE, CPU) for _ in range(2)]
    for part in halves:
        asked(part)
    halves[0].add(halves[0].measure(codes, residual, target, W, weights))
    first = SparseCodes.from_dense(codes.to_dense()[:200])
    halves[1].add(halves[1].measure(first, residual[:200], target[:200], W))
    a, b = (part.completed(MergeResult.untested(LEFT, RIGHT), W, None) for part in halves)
    torch.testing.assert_close(a.cost_share, b.cost_share, rtol=1e-4, atol=1e-6)
    assert torch.equal(a.firings, b.firings)


def test_a_heldout_verdict_stands_and_its_pair_is_not_followed() -> None:
    evidence = MergeEvidence(D_SAE, CPU)
    asked(evidence)
    codes, residual, target, W = world(0)
    evidence.add(evidence.measure(codes, residual, target, W))
    given = MergeResult.untested(LEFT, RIGHT)
    given.firings[2] = 50
    given.fvu_without[2] = given.fvu_change[2] = 0.25
    found = evidence.completed(given, W, None)
    assert found.known.tolist() == [True] * 4
    assert float(found.cost_share[2]) == 1
    evidence.settle()
    assert len(evidence) == 3
    assert given.known.tolist() == [False, False, True, False]  # what came in is as it was


def test_sums_of_another_round_are_left_out_and_plenty_counts_half() -> None:
    evidence = MergeEvidence(D_SAE, CPU)
    asked(evidence)
    codes, residual, target, W = world(0)
    late = evidence.measure(codes, residual, target, W)
    asked(evidence)
    evidence.add(late)
    assert int(evidence._fired.sum()) == 0
    evidence.add(evidence.measure(codes, residual, target, W))
    before = evidence._fired.clone()
    assert int(before.min()) >= ENOUGH
    asked(evidence, LEFT[:2], RIGHT[:2])
    assert torch.equal(evidence._fired, before[:, :2] // 2)
    again = MergeEvidence(D_SAE, CPU)
    again.load_state_dict(evidence.state_dict())
    results = [part.completed(MergeResult.untested(LEFT, RIGHT), W, None) for part in (evidence, again)]
    assert torch.equal(results[0].cost_share, results[1].cost_share)
    assert results[0].known.tolist() == [True, True, False, False]
    evidence.forget(torch.tensor([9]))
    assert len(evidence) == 1
    assert MergeEvidence(D_SAE, CPU).measure(codes, residual, target, W) is None


@pytest.mark.parametrize("tokens", [0, 8])
def test_a_run_judges_by_training_tokens_what_heldout_ones_cannot(tokens: int, tmp_path: Path) -> None:
    """Eight held-out tokens judge nothing. Without any merge test nothing is judged at all, and every pair is acted on."""
    toy = Toy(independent(160, 5), 160, seed=0)
    config = RunConfig().replace(
        {
            "transcoder.d_sae": 256,
            "transcoder.k": 16,
            "transcoder.normalize": "rms",
            "training.steps": 60,
            "training.batch_size": 256,
            "training.lr": 3e-3,
            "antidup.positions.enabled": False,
            "antidup.samples.enabled": False,
            "antidup.monitor.correlation_threshold": 0.2,
            "antidup.monitor.release_threshold": 0.1,
            "antidup.monitor.correlation_save_frequency": 20,
            "antidup.monitor.merge_test_tokens": tokens,
            "checkpoint.every": 60,
            "logging.progress": False,
        }
    )
    heldout, _, _ = toy.tokens(8, 1 << 20)
    train_transcoder(config, tmp_path / "run", batches=toy.batches(), heldout=[heldout])
    reports = [
        json.loads((tmp_path / f"run/anti_duplication_logs/correlation_step_{step:08d}.json").read_text())
        for step in (20, 40, 60)
    ]
    assert reports[-1]["pairs_total"] >= 5
    if tokens:
        assert reports[-1]["pairs_untested"] < 0.5 * reports[-1]["pairs_total"]
        assert any(pair["mergeable"] is not None for pair in reports[-1]["pairs"])
    else:
        assert reports[-1]["pairs_untested"] == reports[-1]["pairs_total"]
