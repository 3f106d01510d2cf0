"""A layer set: the same weights as runs of single layers, from a third of the passes; killed, resumed, one layer diverging."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder.activations import cache_activations
from transcoder.activations.language_model import HookedModel
from transcoder.config import ConfigError, RunConfig
from transcoder.layer_list import layer_folders
from transcoder.tensor_file import read_tensors
from transcoder.training import train_transcoder
from transcoder.training.trainer import Trainer

pytestmark = pytest.mark.usefixtures("shared_models")
SMALL: dict[str, Any] = {
    "name": "small",
    "training.steps": 12,
    "training.batch_size": 256,
    "training.evaluation_tokens": 512,
    "training.evaluation_ce_tokens": 512,
    "training.evaluation_every": 0,
    "training.similarity_tokens": 512,
    "transcoder.d_sae": 128,
    "transcoder.k": 8,
    "transcoder.widths": [64, 128],
    "transcoder.normalization_tokens": 1024,
    "activations.buffer_tokens": 2048,
    "activations.sequences_per_forward": 8,
    "antidup.monitor.correlation_save_frequency": 6,
    "antidup.verify_at_step": 12,
    "checkpoint.every": 4,
    "logging.report": False,
    "logging.progress": False,
}


def config(**more: Any) -> RunConfig:
    return RunConfig.load("demo", {**SMALL, **{name.replace("__", "."): value for name, value in more.items()}})


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    newest = max((run_dir / "checkpoints").glob("step_*"))
    return dict(read_tensors(newest / "transcoder.safetensors"))


def same_bits(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sequences of every pass that reads activations."""
    counted: list[int] = []
    inner = HookedModel.forward_pairs

    def spy(self: HookedModel, tokens: torch.Tensor) -> Any:
        counted.append(len(tokens))
        return inner(self, tokens)

    monkeypatch.setattr(HookedModel, "forward_pairs", spy)
    return counted


def test_each_layer_has_the_bits_of_a_run_of_its_own_from_a_third_of_the_passes(
    tmp_path: Path, passes: list[int]
) -> None:
    # Without threads no pass runs ahead, so that all that are made are counted.
    shared = config(activations__prefetch=0, antidup__samples__enabled=False)
    result = train_transcoder(shared.replace({"activations.layers": "0-2"}), tmp_path / "set")
    in_set = len(passes)
    assert list(result.layers) == [0, 1, 2]
    assert result.finished
    assert list(layer_folders(tmp_path / "set")) == [0, 1, 2]
    passes.clear()
    for layer in range(3):
        hooks = {"source_hook": f"blocks.{layer}.hook_resid_mid", "target_hook": f"blocks.{layer}.hook_mlp_out"}
        alone = tmp_path / f"alone{layer}"
        train_transcoder(shared.replace({f"activations.{name}": hook for name, hook in hooks.items()}), alone)
        folder = tmp_path / "set" / "layers" / f"{layer:02}"
        assert same_bits(weights(folder), weights(alone))
        ours, theirs = (json.loads((f / "summary.json").read_bytes()) for f in (folder, alone))
        assert {**ours, "name": "", "data": 0} == {**theirs, "name": "", "data": 0}
    print(in_set, len(passes))
    assert 3 * in_set == len(passes)
    summary = json.loads((tmp_path / "set" / "summary.json").read_bytes())
    assert list(summary["layers"]) == ["00", "01", "02"]
    assert summary["set/ce_transcoder"] > 0
    assert "evaluation/fvu" in summary


class Killed(BaseException):
    pass


def test_a_killed_set_resumes_to_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(activations__layers=[1, 2], checkpoint__asynchronous=False, activations__mask_norm_multiple=10.0)
    train_transcoder(settings, tmp_path / "whole")
    saves, inner = [], Trainer.save

    def killed(self: Trainer, *args: Any, **options: Any) -> None:
        saves.append(self.step)
        # Between the checkpoints of two layers: the first is at step 8, the second at step 4.
        if len(saves) == 4:
            raise Killed
        inner(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        with pytest.raises(Killed):
            train_transcoder(settings, tmp_path / "killed")
    result = train_transcoder(settings, tmp_path / "killed", resume=True)
    assert result.finished
    for layer in ("01", "02"):
        assert same_bits(*(weights(tmp_path / run / "layers" / layer) for run in ("whole", "killed")))


def test_a_signal_saves_every_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(
        activations__layers="1-2", training__steps=6, antidup__verify_at_step=6, activations__mask_norm_multiple=10.0
    )
    train_transcoder(settings, tmp_path / "whole")
    inner = Trainer.advance

    def stopping(self: Trainer) -> None:
        inner(self)
        if self.step == 3 and self.config.name.endswith("01"):
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "advance", stopping)
        result = train_transcoder(settings, tmp_path / "stopped")
    assert (result.finished, result.interrupted_by, result.step) == (False, "SIGTERM", 3)
    with pytest.raises(FileExistsError, match="--resume"):
        train_transcoder(settings, tmp_path / "stopped")
    assert train_transcoder(settings, tmp_path / "stopped", resume=True).finished
    for layer in ("01", "02"):
        assert same_bits(*(weights(tmp_path / run / "layers" / layer) for run in ("whole", "stopped")))


@pytest.mark.slow
def test_a_set_from_a_cache_that_holds_all_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = config(activations__layers=[1, 2], activations__mask_norm_multiple=10.0)
    cache_activations(made, tmp_path / "cache", tokens=65536, device=torch.device("cpu"))
    cached = {
        "activations.kind": "cached",
        "activations.cached_path": str(tmp_path / "cache"),
        "activations.heldout_fraction": 0.4,  # whole documents, of which a small cache has few
        "checkpoint.asynchronous": False,
    }
    settings = made.replace(cached)
    whole = train_transcoder(settings, tmp_path / "whole")
    assert whole.finished
    assert whole.summary["evaluation/fvu"] > 0

    # A layer reads its own matrices of the shared shards.
    hooks = {"activations.source_hook": "blocks.2.hook_resid_mid", "activations.target_hook": "blocks.2.hook_mlp_out"}
    train_transcoder(settings.replace({"activations.layers": None, **hooks}), tmp_path / "alone")
    assert same_bits(weights(tmp_path / "whole/layers/02"), weights(tmp_path / "alone"))

    saves, inner = [], Trainer.save

    def killed(self: Trainer, *args: Any, **options: Any) -> None:
        saves.append(self.step)
        if len(saves) == 4:
            raise Killed
        inner(self, *args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "save", killed)
        with pytest.raises(Killed):
            train_transcoder(settings, tmp_path / "killed")
    assert train_transcoder(settings, tmp_path / "killed", resume=True).finished
    for layer in ("01", "02"):
        assert same_bits(*(weights(tmp_path / run / "layers" / layer) for run in ("whole", "killed")))


def test_a_layer_that_diverges_ends_alone_by_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    settings = config(
        activations__layers="0-1",
        per_layer__lr=[1e-3, 1e38],
        training__max_bad_steps=0,
        activations__mask_norm_multiple=10.0,
    )
    result = train_transcoder(settings, tmp_path / "set")
    assert result.finished
    assert result.layers[0].finished
    assert not result.layers[1].finished
    assert "layer 1 ends" in caplog.text
    summary = json.loads((tmp_path / "set" / "summary.json").read_bytes())
    assert list(summary["ended"]) == ["01"]
    assert same_bits(weights(tmp_path / "set/layers/00"), dict(result.layers[0].transcoder.state_dict()))


def test_what_cannot_be_a_set_is_refused(tmp_path: Path) -> None:
    for layers in ("3-1", [1, 1], [], "all of them", [["blocks.1.hook_resid_mid"]]):
        with pytest.raises(ConfigError, match=r"activations\.layers: expected"):
            config(activations__layers=layers)
    with pytest.raises(ConfigError, match="per_layer"):
        config(per_layer__k=[1, 2])
    with pytest.raises(ConfigError, match=r"per_layer\.k: expected 2 values"):
        config(activations__layers="0-1", per_layer__k=[1, 2, 3])
    with pytest.raises(ConfigError, match="source_hook"):
        config(activations__layers="0-1", activations__source_hook="hook_embed")
    with pytest.raises(ValueError, match=r"blocks 0 to 3"):
        train_transcoder(config(activations__layers="2-9"), tmp_path / "set")
    assert not (tmp_path / "set").exists()
