"""Weights that exist are a beginning: more steps for a finished run, and runs that begin from trained or imported weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.planted import ALL_OFF, D_IN, D_OUT, Planted, config, records
from transcoder.config import ConfigError
from transcoder.interop.formats import export_transcoder, read_transcoder
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training import train_transcoder
from transcoder.training.initial_weights import begin_from


def test_a_finished_run_trains_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(**ALL_OFF, training__steps=6)
    first = train_transcoder(settings, tmp_path / "run", batches=Planted())
    again = train_transcoder(settings, tmp_path / "run", resume=True, batches=Planted())
    assert (first.step, again.step) == (6, 6)
    assert "a larger training.steps trains on" in caplog.text
    more = train_transcoder(settings.replace({"training.steps": 14}), tmp_path / "run", resume=True, batches=Planted())
    assert (more.step, more.finished, more.summary["step"]) == (14, True, 14)
    assert "training.steps is 14, it was 6: schedule cosine goes on" in caplog.text
    steps = [record["step"] for record in records(tmp_path / "run") if "losses/overall_loss" in record]
    assert steps == sorted(set(steps))
    assert not torch.equal(first.transcoder.W_enc, more.transcoder.W_enc)
    with pytest.raises(ConfigError, match="this run has done 14 steps: expected at least as many, got 6"):
        train_transcoder(settings, tmp_path / "run", resume=True, batches=Planted())


def test_an_extended_run_that_is_stopped_is_not_called_finished(tmp_path: Path) -> None:
    class Ending(Planted):
        def __next__(self) -> Any:
            if self.index > 20:
                raise KeyboardInterrupt
            return super().__next__()

    settings = config(**ALL_OFF, training__steps=6)
    train_transcoder(settings, tmp_path / "run", batches=Planted())
    with pytest.raises(KeyboardInterrupt):
        train_transcoder(settings.replace({"training.steps": 30}), tmp_path / "run", resume=True, batches=Ending())
    assert not (tmp_path / "run" / "summary.json").exists()


def given(activation: str, uneven: bool = False, **more: Any) -> Transcoder:
    """A transcoder with statistics, thresholds and biases of its own."""
    generator = torch.Generator().manual_seed(3)
    shape = TranscoderConfig(D_IN, D_OUT, 24, 4, activation=activation, **more)
    model = Transcoder(shape, seed=2)
    x, y = torch.randn(64, D_IN, generator=generator) + 1, 3 * torch.randn(64, D_OUT, generator=generator) - 2
    model.set_normalization(x, y, "standardize")
    with torch.no_grad():
        for bias in (model.b_enc, model.b_dec):
            bias.copy_(0.1 * torch.randn(bias.shape, generator=generator))
        if model.W_skip is not None:
            model.W_skip.copy_(0.1 * torch.randn(model.W_skip.shape, generator=generator))
        if activation != "topk":
            model.threshold.copy_(torch.rand(model.threshold.shape, generator=generator))
        if uneven:
            model.W_dec.mul_(torch.rand(24, 1, generator=generator) + 0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("activation", "uneven", "more"),
    [
        ("topk", False, {}),
        ("topk", False, {"skip": True}),
        ("batch_topk", False, {}),
        ("jumprelu", False, {"skip": True}),
        ("jumprelu", True, {}),
    ],
)
def test_the_function_is_kept_in_the_units_of_the_new_run(
    activation: str, uneven: bool, more: dict[str, Any], tmp_path: Path
) -> None:
    old = given(activation, uneven, **more)
    old.save_pretrained(tmp_path / "old")
    new = Transcoder(old.config, seed=9)
    generator = torch.Generator().manual_seed(5)
    x = 2 * torch.randn(200, D_IN, generator=generator) - 1
    new.set_normalization(x, torch.randn(200, D_OUT, generator=generator) + 5, "standardize")
    begin_from(new, str(tmp_path / "old"), [])
    new.eval()
    torch.testing.assert_close(new(x), old(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(new.W_dec.norm(dim=1), torch.ones(24))


def test_a_run_begins_from_a_run_and_from_imported_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    settings = config(**ALL_OFF, training__steps=8)
    first = train_transcoder(settings, tmp_path / "first", batches=Planted())
    export_transcoder(first.run_dir, "saelens", tmp_path / "saelens")
    read_transcoder("saelens", tmp_path / "saelens").save(tmp_path / "imported")
    for name in ("first", "imported"):
        begun = settings.replace({"training.init_from": str(tmp_path / name), "training.steps": 2})
        result = train_transcoder(begun, tmp_path / f"from-{name}", batches=Planted())
        (record,) = [r["payload"] for r in records(result.run_dir) if r.get("event") == "begun_from"]
        # Other batches are held out of the same stream after other numbers of steps: the same ones here.
        assert record["evaluation/fvu"] == pytest.approx(first.summary["evaluation/fvu"], rel=1e-3)
        assert result.summary["evaluation/fvu"] < 1.2 * record["evaluation/fvu"]
        assert "begins from the weights of" in caplog.text
        resumed = train_transcoder(begun, result.run_dir, resume=True, batches=Planted())
        assert torch.equal(resumed.transcoder.W_enc, result.transcoder.W_enc)


def test_weights_of_another_shape_are_refused_with_the_settings(tmp_path: Path) -> None:
    Transcoder(TranscoderConfig(D_IN, D_OUT, 7, 2, skip=True)).save_pretrained(tmp_path / "old")
    settings = config(**ALL_OFF, training__init_from=str(tmp_path / "old"))
    with pytest.raises(ConfigError, match=r"d_sae 7, this run \d+ \(transcoder.d_sae\); skip True, this run False"):
        train_transcoder(settings, tmp_path / "run", batches=Planted())
    assert not (tmp_path / "run").exists()
    with pytest.raises(FileNotFoundError):
        train_transcoder(
            config(**ALL_OFF, training__init_from=str(tmp_path / "none")), tmp_path / "run", batches=Planted()
        )
