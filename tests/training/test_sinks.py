"""FVU with and without sinks, the mask that a resumed run goes on with, and the weights that a run begins with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch

from transcoder import ActivationBatch, RunConfig, Transcoder, TranscoderConfig
from transcoder.training.evaluation import evaluate
from transcoder.training.layer_trainer import LayerTrainer
from transcoder.training.nonfinite import StepLedger
from transcoder.training.sources import BatchSource
from transcoder.training.start_checks import as_started, changed_settings
from transcoder.usage import REQUIRED_EFFECTS


def batch(count: int, times: float, seed: int) -> ActivationBatch:
    g = torch.Generator().manual_seed(seed)
    source, target = (times * torch.randn(count, 8, generator=g) for _ in range(2))
    place = torch.arange(count)
    return ActivationBatch(source, target, place % 50, place % 16, place // 16)


def fvu(transcoder: Transcoder, part: ActivationBatch) -> float:
    error = transcoder(part.source) - part.target
    return float(error.square().sum() / (part.target - part.target.mean(0)).square().sum())


def joined(a: ActivationBatch, b: ActivationBatch) -> ActivationBatch:
    names = ("source", "target", "tokens", "positions", "sequences")
    return ActivationBatch(*(torch.cat([getattr(a, name), getattr(b, name)]) for name in names))


def test_fvu_is_said_with_and_without_sinks_masked_or_not() -> None:
    transcoder = Transcoder(TranscoderConfig(d_in=8, d_out=8, d_sae=16, k=4, activation="topk"), seed=0).eval()
    ordinary, sinks = batch(2000, 1.0, 0), batch(60, 12.0, 1)
    without, every = fvu(transcoder, ordinary), fvu(transcoder, joined(ordinary, sinks))
    for heldout, masked in (([ordinary], sinks), ([joined(ordinary, sinks)], None)):
        found = evaluate(transcoder, heldout, masked)
        assert found["evaluation/fvu_without_sinks"] == pytest.approx(without, rel=1e-4)
        assert found["evaluation/fvu_with_sinks"] == pytest.approx(every, rel=1e-4)
    alone = evaluate(transcoder, [ordinary])
    assert alone["evaluation/fvu_with_sinks"] == pytest.approx(alone["evaluation/fvu"], rel=1e-6)


@pytest.mark.parametrize("saved", [1.567, 10.0, None])
def test_a_resumed_run_goes_on_with_the_mask_it_was_started_with(tmp_path: Path, saved: float | None) -> None:
    before = RunConfig().replace({"activations.mask_norm_multiple": saved})
    (tmp_path / "config.yaml").write_text(before.to_yaml())
    resumed = as_started(RunConfig(), tmp_path, resume=True)
    assert resumed.activations.mask_norm_multiple == saved
    assert changed_settings(tmp_path / "config.yaml", resumed) == []
    other = as_started(RunConfig().replace({"activations.mask_norm_multiple": 3.0}), tmp_path, resume=True)
    assert changed_settings(tmp_path / "config.yaml", other) == ["activations.mask_norm_multiple"]
    assert as_started(RunConfig(), tmp_path, resume=False).activations.mask_norm_multiple == "auto"


def test_an_earlier_run_keeps_the_bos_that_stood_in(tmp_path: Path) -> None:
    lines = RunConfig().to_yaml().splitlines()
    (tmp_path / "config.yaml").write_text("\n".join(line for line in lines if "eos_as_bos" not in line))
    assert as_started(RunConfig(), tmp_path, resume=True).activations.eos_as_bos
    (tmp_path / "config.yaml").write_text("\n".join(lines))
    assert not as_started(RunConfig(), tmp_path, resume=True).activations.eos_as_bos


@pytest.mark.parametrize("same", [True, False])
def test_an_autoencoder_begins_with_a_tied_encoder(same: bool, tmp_path: Path) -> None:
    config = RunConfig().replace({"transcoder.d_sae": 16, "transcoder.k": 4})
    ledger = StepLedger(dict.fromkeys(REQUIRED_EFFECTS, False), tmp_path / "usage.json")
    layer = LayerTrainer(config, 8, 8, torch.device("cpu"), ledger, None, (), tmp_path)
    found = batch(600, 1.0, 0)
    found = replace(found, target=found.source.clone()) if same else found
    before = {name: tensor.clone() for name, tensor in layer.transcoder.state_dict().items()}
    layer.fit_normalization(cast(BatchSource, SimpleNamespace(look_ahead=lambda tokens: [found])))
    assert torch.equal(layer.transcoder.W_dec, before["W_dec"])
    assert torch.equal(layer.transcoder.W_enc, before["W_dec" if same else "W_enc"])
