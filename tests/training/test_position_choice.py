"""The position sampler chooses what samples are collected from and no training token is lost, or with `train` the training
tokens; usage.json proves either, and a run of the version without that setting goes on as it was."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from tests.training.planted import Planted, assert_same, weights
from tests.training.planted import config as planted
from transcoder import RunConfig, train_transcoder
from transcoder.antidup import ActivationSampleCollector, PositionSampler, UsageLedger
from transcoder.antidup.ledger import LedgerError
from transcoder.training.train import opened_run
from transcoder.usage import REQUIRED_EFFECTS

pytestmark = pytest.mark.usefixtures("shared_models")


def config(**overrides: Any) -> RunConfig:
    """A short run on the shipped language model."""
    return RunConfig.load("demo", {
        "model.device": "cpu",
        "transcoder.d_sae": 64,
        "transcoder.widths": None,
        "transcoder.normalization_tokens": 512,
        "activations.buffer_tokens": 2048,
        "activations.sequences_per_forward": 8,
        "activations.prefetch": 0,
        "activations.mask_norm_multiple": 10.0,
        "training.steps": 6,
        "training.batch_size": 256,
        "training.evaluation_tokens": 512,
        "training.evaluation_ce_tokens": 0,
        "training.evaluation_every": 0,
        "training.similarity_tokens": 0,
        "antidup.samples.collect_every": 2,
        "logging.report": False,
        "logging.progress": False,
        **{name.replace("__", "."): value for name, value in overrides.items()},
    })  # fmt: skip


def positions_json(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "anti_duplication_logs" / "positions.json").read_text())


def test_every_token_trains_unless_training_tokens_are_drawn(tmp_path: Path) -> None:
    """By default the batches are those of a run without a sampler."""
    ways = {
        "absent": config(antidup__positions__enabled=False),
        "samples": config(antidup__positions__keep_fraction=0.1),
        **{
            f"training {fraction}": config(antidup__positions__keep_fraction=fraction, antidup__positions__train=True)
            for fraction in (0.1, 0.5)
        },
    }
    with ExitStack() as stack:
        runs = {name: stack.enter_context(opened_run(way, tmp_path / name)) for name, way in ways.items()}
        data = {name: run.parts.data for name, run in runs.items()}
        for _ in range(12):
            absent, samples, *training = (next(data[name].source) for name in ways)
            for name in ("source", "target", "tokens", "positions", "sequences"):
                assert torch.equal(getattr(absent, name), getattr(samples, name)), name
            assert samples.weights is None
            assert all(batch.weights is not None for batch in training)
        left = {name: data[name].source.counters()["left_by_sampler"] for name in ways}
        seen = {name: data[name].source.counters()["tokens_seen"] for name in ways}
    assert left["absent"] == left["samples"] == 0
    assert seen["absent"] == seen["samples"]
    for fraction in (0.1, 0.5):
        way = f"training {fraction}"
        assert left[way] > 0.9 * (1 - fraction) * seen[way] * 0.95
    assert data["absent"].positions is None


@pytest.mark.parametrize("train", [False, True])
def test_the_ledger_and_the_file_show_what_was_chosen(
    tmp_path: Path, train: bool, caplog: pytest.LogCaptureFixture
) -> None:
    run_dir = tmp_path / "run"
    train_transcoder(config(antidup__positions__train=train), run_dir)
    part = json.loads((run_dir / "usage.json").read_text())["components"]["position_sampler"]
    assert part["enabled"]
    assert part["files"] == ["anti_duplication_logs/positions.json"]
    effect, drawn = part["effect"], positions_json(run_dir)
    assert drawn["chooses"] == ("training" if train else "samples")
    assert 0.4 < sum(drawn["drawn"]) / sum(drawn["seen"]) < 0.6
    assert effect["positions_resampled"] > 0
    assert effect["positions_drawn"] == sum(drawn["drawn"]) + drawn["special_drawn"]
    if train:
        assert "1536 training tokens are drawn from about 3072 tokens of the language model" in caplog.text
    else:
        assert (part["calls"], effect["positions_seen"]) == (3, 3 * 256)
        assert "language model" not in caplog.text


def test_a_run_whose_sampler_did_nothing_is_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(LedgerError, match=r"position_sampler: no effect \(positions_resampled is 0\)"):
        train_transcoder(planted(antidup__positions__keep_fraction=1.0), tmp_path / "all", batches=Planted())
    collect = ActivationSampleCollector.collect

    def never_asks(self: ActivationSampleCollector, *args: Any) -> None:
        self._positions = None
        collect(self, *args)

    monkeypatch.setattr(ActivationSampleCollector, "collect", never_asks)
    with pytest.raises(LedgerError, match=r"position_sampler: no calls, no effect \(positions_resampled was never"):
        train_transcoder(planted(), tmp_path / "none", batches=Planted())


def test_without_samples_the_sampler_is_off_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    train_transcoder(planted(antidup__samples__enabled=False), tmp_path / "run", batches=Planted())
    assert "the position sampler is off too" in caplog.text
    part = json.loads((tmp_path / "run" / "usage.json").read_text())["components"]["position_sampler"]
    assert part == {"enabled": False, "calls": 0, "effect": {}, "files": []}
    assert not (tmp_path / "run" / "anti_duplication_logs" / "positions.json").exists()


def test_the_choice_changes_samples_and_nothing_that_is_trained(tmp_path: Path) -> None:
    # Without a last look by the final weights, whose samples replace those of training.
    with_it = train_transcoder(planted(logging__report_tokens=0), tmp_path / "with", batches=Planted())
    without = train_transcoder(
        planted(antidup__positions__enabled=False, logging__report_tokens=0), tmp_path / "without", batches=Planted()
    )
    assert_same(weights(with_it), weights(without))
    kept = [json.loads((run.run_dir / "activation_samples" / "summary.json").read_text()) for run in (with_it, without)]
    assert 0 < kept[0]["samples_kept"] != kept[1]["samples_kept"]


def test_resumes_to_the_same_bits_and_a_run_without_the_setting_goes_on_drawing_its_training_tokens(
    tmp_path: Path,
) -> None:
    for train, name in ((False, "samples"), (True, "training")):
        # The default of the version that always drew training tokens; today's is 0.
        former = {"antidup__regularizer__orthogonality_weight": 0.01} if train else {}
        settings = config(antidup__positions__train=train, **former)
        whole, run_dir = train_transcoder(settings, tmp_path / f"{name} whole"), tmp_path / name
        with opened_run(settings, run_dir) as run:
            for _ in range(3):
                run.advance()
            run.save(wait=True)
        if train:
            # As the version before wrote it, which had no such setting.
            saved = yaml.safe_load((run_dir / "config.yaml").read_text())
            del saved["antidup"]["positions"]["train"]
            (run_dir / "config.yaml").write_text(yaml.safe_dump(saved))
        resumed = train_transcoder(config(), run_dir, resume=True)
        assert_same(weights(whole), weights(resumed))
        assert positions_json(run_dir) == positions_json(whole.run_dir)
        antidup = RunConfig.load(run_dir / "config.yaml").antidup
        assert antidup.positions.train is train
        assert antidup.regularizer.orthogonality_weight == (0.01 if train else 0)
        files = [folder / "activation_samples" / "samples.parquet" for folder in (run_dir, whole.run_dir)]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_the_collector_looks_at_drawn_tokens_alone(tmp_path: Path) -> None:
    """Each sample stands at a position that the sampler, asked again, draws."""
    result = train_transcoder(
        planted(training__accumulation=2, logging__report_tokens=0), tmp_path / "run", batches=Planted()
    )
    pq = pytest.importorskip("pyarrow.parquet")
    rows = pq.read_table(result.run_dir / "activation_samples" / "samples.parquet").to_pylist()
    settings = planted()
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), tmp_path / "usage.json")
    length = settings.activations.sequence_length
    again = PositionSampler(settings.antidup.positions, settings.training.seed, (), ledger, sequence_length=length)
    stream, drawn = Planted(), set()
    for _ in range(4):
        next(stream)
    for step in range(settings.training.steps):
        for micro in range(2):
            batch = next(stream)
            keep = again.sample_positions(batch.tokens[None], step, positions=batch.positions[None], micro=micro).keep
            for n in keep[0].nonzero().flatten().tolist():
                drawn.add((step, int(batch.sequences[n]), int(batch.positions[n])))
    assert rows
    assert all((row["step"], row["sequence"], row["position"]) in drawn for row in rows)
