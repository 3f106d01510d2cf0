"""The trainer hands each anti-duplication part what the batch says: the project that this one repairs had all of them
configured and called none."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder import ActivationBatch, RunConfig, Transcoder, train_transcoder
from transcoder.antidup import ActivationSampleCollector, CorrelationMonitor, DiversityRegularizer
from transcoder.antidup.merge_cost_streaming import MergeEvidence

ROWS, D = 64, 12
CALLS = {
    Transcoder: ("training_step",),
    DiversityRegularizer: ("apply_penalty",),
    CorrelationMonitor: ("update_correlations", "refresh_targets", "report"),
    ActivationSampleCollector: ("collect",),
    MergeEvidence: ("add",),
}


def batches() -> Iterator[ActivationBatch]:
    """Batch n has weights 1 + n / 10 and 0 in turn, and sequences of its own."""
    n = 0
    while True:
        g = torch.Generator().manual_seed(n)
        source = torch.randn(ROWS, D, generator=g)
        yield ActivationBatch(
            source,
            source.roll(1, 1).relu(),
            torch.randint(0, 50, (ROWS,), generator=g),
            torch.arange(ROWS) % 16,
            sequences=1000 * n + torch.arange(ROWS) // 4,
            weights=torch.where(torch.arange(ROWS) % 2 == 0, 1 + n / 10, 0.0),
        )
        n += 1


def config() -> RunConfig:
    return RunConfig().replace({
        "name": "wiring",
        "model.device": "cpu",
        "transcoder.d_sae": 32,
        "transcoder.k": 4,
        "training.steps": 14,
        "training.accumulation": 2,
        "training.batch_size": ROWS,
        "training.lr": 1e-3,
        "transcoder.normalize": "none",
        "antidup.positions.enabled": False,
        # Anything that fires together is a candidate, and a handful of held-out tokens has no verdict for any.
        "antidup.monitor.correlation_threshold": 0.05,
        "antidup.monitor.release_threshold": 0.01,
        "antidup.monitor.min_support": 10,
        "antidup.monitor.act_on_untested": True,
        "antidup.samples.collect_every": 1,
        "checkpoint.every": 14,
        "logging.report": False,
        "logging.report_tokens": 0,
        "logging.progress": False,
    })  # fmt: skip


def test_every_part_is_given_what_the_batch_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = defaultdict(list)

    def listen(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def heard(self: Any, *args: Any, **named: Any) -> Any:
            calls[name].append((args, named))
            return real(self, *args, **named)

        monkeypatch.setattr(owner, name, heard)

    for owner, names in CALLS.items():
        for name in names:
            listen(owner, name)
    stream = batches()
    held = [next(stream)]
    train_transcoder(config(), tmp_path / "run", batches=stream, heldout=held)

    fed = batches()
    next(fed)
    given = [next(fed) for _ in range(28)]
    for name in ("training_step", "apply_penalty", "update_correlations", "collect"):
        assert len(calls[name]) == 28, name
    for n, batch in enumerate(given):
        step, micro = divmod(n, 2)
        (_, training), (_, penalty) = calls["training_step"][n], calls["apply_penalty"][n]
        assert torch.equal(training["token_weights"], batch.weights)
        assert torch.equal(penalty["batch"].weights, batch.weights)
        assert (penalty["step"], penalty["micro"]) == (step, micro)
        (counted, correlations), (collected, _) = calls["update_correlations"][n], calls["collect"][n]
        assert torch.equal(correlations["sequences"], batch.sequences)
        assert torch.equal(correlations["weights"], batch.weights)
        assert torch.equal(collected[1].tokens, batch.tokens)
        assert counted[1] == collected[2] == step
        assert collected[3] == micro

    # Pairs are looked for after 10 steps, long before the first report, and put before the merge test.
    (judge,), _ = calls["refresh_targets"][0]
    assert judge is not None
    found = [named["pairs"][0].numel() for _, named in calls["apply_penalty"]]
    assert not any(found[:20])
    assert all(found[20:])
    # What held-out tokens could not say is asked of the training tokens from then on.
    # These are more than 64 pairs, which are looked at in every fourth step.
    asked = [n >= 20 and n // 2 % 4 == 0 for n in range(28)]
    assert [args[0] is not None for args, _ in calls["add"]] == asked
    (_, decoder, judge), _ = calls["report"][0]
    assert decoder.shape == (32, D)
    assert judge is not None


def test_special_tokens_are_known_to_every_part(tmp_path: Path) -> None:
    """On the shipped language model, whose tokenizer says which they are."""
    settings = {
        "transcoder.d_sae": 64,
        "transcoder.widths": None,
        "activations.buffer_tokens": 4096,
        "activations.prefetch": 0,
        "activations.mask_norm_multiple": 10.0,
        # Else nothing but ordinary tokens would come to training.
        "activations.mask_bos": False,
        "training.steps": 4,
        "training.batch_size": 256,
        "training.evaluation_tokens": 512,
        "training.evaluation_ce_tokens": 0,
        "antidup.regularizer.sink_mass_weight": 1.0,
        "antidup.regularizer.sink_mass_allowed": 0.0,
        "antidup.samples.collect_every": 1,
        "logging.report": False,
        "logging.progress": False,
    }
    train_transcoder(RunConfig.load("demo", settings), tmp_path / "run")
    drawn = json.loads((tmp_path / "run" / "anti_duplication_logs" / "positions.json").read_text())
    assert 0 < drawn["special_drawn"] < 0.5 * drawn["special_seen"]
    samples = json.loads((tmp_path / "run" / "activation_samples" / "summary.json").read_text())
    assert 0 < samples["sink_fraction"] <= 0.2
    figures = (tmp_path / "run" / "anti_duplication_logs" / "regularizer.jsonl").read_text().splitlines()
    assert json.loads(figures[-1])["regularizer/sink_mass_penalty"] > 0
