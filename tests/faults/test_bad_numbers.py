"""NaN and Inf in batches, losses and gradients: the step is as if it had never been, and is on record."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.planted import Planted, assert_same, config, records, weights
from transcoder.activations import ActivationBatch
from transcoder.kernels import extension, use_backend
from transcoder.training import RunResult, TrainingDivergedError, layer_trainer, nonfinite, optimizer, train_transcoder
from transcoder.training.checkpoint import load_checkpoint
from transcoder.training.state_tree import pack_state
from transcoder.training.trainer import Trainer

HELD_OUT = 4
"""Batches that `Planted` gives to evaluation in a run of `config()`."""
BAD = 12
"""Step (from 0) that is bad: `samples` collect at it, and it lies within a logging interval."""


Poison = Callable[[ActivationBatch], ActivationBatch]


class Poisoned(Planted):
    """As `Planted`; what some batches of training hold is changed."""

    def __init__(self, poisons: dict[int, Poison] | None = None, **planted: Any) -> None:
        super().__init__(**planted)
        self.poisons = poisons or {}

    def __next__(self) -> ActivationBatch:
        step = self.index - HELD_OUT
        batch = super().__next__()
        batch = dataclasses.replace(batch, weights=torch.ones(self.rows))
        return self.poisons[step](batch) if step in self.poisons else batch


def put(name: str, value: float) -> Poison:
    def poison(batch: ActivationBatch) -> ActivationBatch:
        field = getattr(batch, name).clone()
        field.view(len(batch), -1)[3, -1] = value
        return dataclasses.replace(batch, **{name: field})

    return poison


def huge(batch: ActivationBatch) -> ActivationBatch:
    """Finite, and its square is not."""
    return dataclasses.replace(batch, target=batch.target * 1e25)


def huge_source(batch: ActivationBatch) -> ActivationBatch:
    return dataclasses.replace(batch, source=batch.source * 1e30)


POISONS = {
    "NaN in source": put("source", float("nan")),
    "Inf in source": put("source", float("inf")),
    "NaN in target": put("target", float("nan")),
    "Inf in target": put("target", -float("inf")),
    "NaN in weights": put("weights", float("nan")),
    "loss overflows": huge,
    "everything overflows": huge_source,
}


class Late:
    """A verdict that arrives only when somebody waits for it, as from a GPU."""

    def __init__(self, bad: torch.Tensor) -> None:
        self.bad = bad.clone()

    def arrived(self) -> bool:
        return False

    def read(self) -> int:
        return int(self.bad)


@pytest.fixture(params=["host", "device"])
def flag(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Read by the host at once, or acted on without being read, as on a GPU."""
    if request.param == "device":
        monkeypatch.setattr(nonfinite, "host_is_device", lambda tensor: False)
        monkeypatch.setattr(optimizer, "host_is_device", lambda tensor: False)
        monkeypatch.setattr(nonfinite, "DeferredSize", Late)
    return str(request.param)


def state_of(run_dir: Path, step: int = 30) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    loaded = load_checkpoint(run_dir / "checkpoints" / f"step_{step:08d}")
    tree = {name: part for name, part in loaded.trainer_tree.items() if name != "bad_steps"}
    tensors, rest = pack_state(tree)
    return {**loaded.model, **tensors}, rest


def assert_same_state(first: Path, second: Path, step: int = 30) -> None:
    (ours, our_rest), (theirs, their_rest) = state_of(first, step), state_of(second, step)
    assert_same(ours, theirs)
    assert our_rest == their_rest


def without_step(monkeypatch: pytest.MonkeyPatch, *steps: int) -> None:
    """A trainer that draws the batches of these steps and does nothing with them."""
    whole = Trainer._train_step

    def step(self: Trainer) -> None:
        if self.step not in steps:
            whole(self)
            return
        for _ in range(self.config.training.accumulation):
            next(self.source)
        if self.layers[0].regularizer is not None:
            self.layers[0].regularizer._begin(self.step)

    monkeypatch.setattr(Trainer, "_train_step", step)


def assert_bad_steps_leave_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any
) -> None:
    """Each poison in a step of its own, some right after another and some after good ones, against a run without them."""
    changed = config(
        antidup__regularizer__all_pairs_weight=0.01, antidup__regularizer__position_entropy_weight=0.01, **settings
    )
    each = changed.training.accumulation
    steps = [7, 9, 10, 12, 15, 19, 28]
    poisons = {step * each + each - 1: poison for step, poison in zip(steps, POISONS.values(), strict=True)}
    result = train_transcoder(changed, tmp_path / "bad", batches=Poisoned(poisons))
    without_step(monkeypatch, *steps)
    train_transcoder(changed, tmp_path / "left out", batches=Poisoned())
    assert_same_state(tmp_path / "bad", tmp_path / "left out")
    assert result.summary["bad_steps"] == len(steps)
    noted = [r["payload"] for r in records(tmp_path / "bad") if r.get("event") == "bad_step"]
    assert [r["step"] for r in noted] == [step + 1 for step in steps]
    assert [[*b["not_finite"]] for r in noted for b in r["batches"][-1:]] == [
        *(["source"], ["source"], ["target"], ["target"], ["weights"], [], [])
    ]
    assert not any("nonfinite" in r for r in records(tmp_path / "bad"))
    assert "NaN" not in (tmp_path / "bad" / "anti_duplication_logs" / "regularizer.jsonl").read_text()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_bad_step_leaves_every_part_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulation: int, flag: str
) -> None:
    with use_backend("torch"):
        assert_bad_steps_leave_everything_as_it_was(tmp_path, monkeypatch, training__accumulation=accumulation)


@pytest.mark.skipif(not extension.usable(), reason="needs a compiler")
def test_the_fused_step_is_left_out_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("cpp"):
        assert_bad_steps_leave_everything_as_it_was(tmp_path, monkeypatch)


@pytest.mark.parametrize("backend", ["torch", "cpp"] if extension.usable() else ["torch"])
def test_a_bad_gradient_of_a_finite_loss(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str, flag: str
) -> None:
    """In each parameter; in the very first step too, before Adam has a state."""
    inside = Trainer._train_step
    broken = [(name, bad) for name in ("W_enc", "b_enc", "W_dec", "b_dec") for bad in (float("nan"), float("inf"))]
    steps = [0, 1, 3, 4, 6, 8, 9, 11]

    def step(self: Trainer) -> None:
        if self.step not in steps:
            inside(self)
            return
        parameter, bad = broken[steps.index(self.step)]

        def break_one(gradient: torch.Tensor) -> torch.Tensor:
            gradient = gradient.clone()
            gradient.view(-1)[-1] = bad
            return gradient

        hook = getattr(self.layers[0].transcoder, parameter).register_hook(break_one)
        inside(self)
        hook.remove()

    short = config(training__steps=16, antidup__verify_at_step=16)
    with use_backend(backend):
        monkeypatch.setattr(Trainer, "_train_step", step)
        result = train_transcoder(short, tmp_path / "broken", batches=Poisoned())
        monkeypatch.setattr(Trainer, "_train_step", inside)
        without_step(monkeypatch, *steps)
        train_transcoder(short, tmp_path / "left out", batches=Poisoned())
    assert result.summary["bad_steps"] == len(steps)
    assert_same_state(tmp_path / "broken", tmp_path / "left out", 16)


def test_overflow_of_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest fp32 numbers round to infinity in bf16."""
    settings = config(training__compute_dtype="bfloat16", transcoder__normalize="none")

    def beyond(batch: ActivationBatch) -> ActivationBatch:
        return dataclasses.replace(batch, source=torch.full_like(batch.source, torch.finfo(torch.float32).max))

    result = train_transcoder(settings, tmp_path / "overflow", batches=Poisoned({BAD: beyond}))
    assert result.summary["bad_steps"] == 1
    without_step(monkeypatch, BAD)
    train_transcoder(settings, tmp_path / "left out", batches=Poisoned())
    assert_same_state(tmp_path / "overflow", tmp_path / "left out")


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec"])
def test_weights_beyond_bfloat16_stop_the_run_with_a_diagnosis(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Finite as fp32 masters, infinite in the products: every step from then on is bad, though batches and masters are not."""
    inside = Trainer._train_step

    def step(self: Trainer) -> None:
        if self.step == BAD:
            with torch.no_grad():
                getattr(self.layers[0].transcoder, name).fill_(torch.finfo(torch.float32).max)
        inside(self)

    monkeypatch.setattr(Trainer, "_train_step", step)
    settings = config(training__compute_dtype="bfloat16", training__max_bad_steps=3, transcoder__normalize="none")
    with pytest.raises(
        TrainingDivergedError, match=r"max_bad_steps = 3.*finite batches and a loss or gradients that over"
    ):
        train_transcoder(settings, tmp_path / "run", batches=Poisoned())
    events = [r["step"] for r in records(tmp_path / "run") if r.get("event") == "bad_step"]
    assert events[:3] == [BAD + 1, BAD + 2, BAD + 3]
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000010").model
    assert bool(kept[name].abs().max() < 100), "the checkpoint before is still there"


def test_without_bad_numbers_both_ways_give_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with use_backend("torch"):
        train_transcoder(config(), tmp_path / "host", batches=Planted())
        for module in (nonfinite, optimizer):
            monkeypatch.setattr(module, "host_is_device", lambda tensor: False)
        monkeypatch.setattr(nonfinite, "DeferredSize", Late)
        train_transcoder(config(), tmp_path / "device", batches=Planted())
    assert_same_state(tmp_path / "host", tmp_path / "device")


def test_a_bad_step_is_on_record_with_its_batch(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_transcoder(config(), run_dir, batches=Poisoned({BAD: POISONS["NaN in source"]}))
    (event,) = [r for r in records(run_dir) if r.get("event") == "bad_step"]
    batches = Planted()
    batches.index = HELD_OUT + BAD
    batch = next(batches)
    (said,) = event["payload"]["batches"]
    places = torch.stack([batch.tokens, batch.positions]).numpy().tobytes()
    assert event["step"] == event["payload"]["step"] == BAD + 1
    assert said["number"] == BAD
    assert said["sha256"] == hashlib.sha256(places).hexdigest()
    assert batch.sequences is not None
    assert said["sequences"] == batch.sequences.unique().tolist()
    assert said["not_finite"] == {
        "source": {
            "rows": 1,
            "first_row": 3,
            "token": int(batch.tokens[3]),
            "position": int(batch.positions[3]),
            "sequence": int(batch.sequences[3]),
        }
    }
    logged = {r["step"]: r["details/bad_steps"] for r in records(run_dir) if "details/bad_steps" in r}
    assert logged == {5: 0, 10: 0, 15: 1, 20: 1, 25: 1, 30: 1}
    assert json.loads((run_dir / "summary.json").read_text())["bad_steps"] == 1


def test_too_many_stop_the_run_and_more_may_be_allowed_on_resume(tmp_path: Path) -> None:
    bad = (11, 12, 16, 17)
    with pytest.raises(TrainingDivergedError, match=r"4 of 20 steps .*max_bad_steps = 3.*step 12: source.*--resume"):
        train_transcoder(
            config(training__max_bad_steps=3),
            tmp_path / "run",
            batches=Poisoned(dict.fromkeys(bad, POISONS["NaN in source"])),
        )
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / "step_00000020")
    assert all(bool(torch.isfinite(t).all()) for t in kept.model.values())
    with pytest.raises(TrainingDivergedError, match="4 of 24 steps"):
        resumed(tmp_path / "run", 3, *bad)
    second = resumed(tmp_path / "run", 4, *bad)
    assert second.finished
    whole = train_transcoder(
        config(), tmp_path / "whole", batches=Poisoned(dict.fromkeys(bad, POISONS["NaN in source"]))
    )
    assert_same(weights(whole), weights(second))
    events = [r["step"] for r in records(tmp_path / "run") if r.get("event") == "bad_step"]
    assert events == [12, 13, 17, 18], "each once, also after a resume"


def resumed(run_dir: Path, allowed: int, *bad: int) -> RunResult:
    held = [next(b) for b in [Poisoned()] for _ in range(HELD_OUT)]
    return train_transcoder(
        config(training__max_bad_steps=allowed),
        run_dir,
        resume=True,
        batches=Poisoned(dict.fromkeys(bad, POISONS["NaN in source"])),
        heldout=held,
    )


@pytest.mark.parametrize("stop_at", [BAD, BAD + 1])
def test_a_run_with_a_bad_step_resumes_to_the_same_bits(tmp_path: Path, stop_at: int) -> None:
    whole = train_transcoder(config(), tmp_path / "whole", batches=Poisoned({BAD: POISONS["Inf in target"]}))
    first = train_transcoder(
        config(), tmp_path / "run", batches=Poisoned({BAD: POISONS["Inf in target"]}, stop_at=HELD_OUT + stop_at)
    )
    assert not first.finished
    second = train_transcoder(
        config(),
        tmp_path / "run",
        resume=True,
        batches=Poisoned({BAD: POISONS["Inf in target"]}),
        heldout=list(whole.heldout),
    )
    assert second.summary["bad_steps"] == 1
    assert_same_state(tmp_path / "whole", tmp_path / "run")


def test_a_rate_that_carries_the_weights_to_infinity_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    """Adam moves each number by about the rate, whatever the gradient: here the gradients of the step are still finite."""
    settings = config(training__lr=3e38, training__warmup_steps=0, checkpoint__every=1, checkpoint__keep_last=2)
    inside = layer_trainer.learning_rate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layer_trainer, "learning_rate", lambda s, *a: inside(s, *a) * 1.1 if s == 7 else 1e-3)
        with pytest.raises(TrainingDivergedError, match=r"step 8: W_enc.* overflowed"):
            train_transcoder(settings, tmp_path / "run", batches=Planted())
    kept = sorted((tmp_path / "run" / "checkpoints").iterdir())
    assert [path.name for path in kept] == ["step_00000006", "step_00000007"]
    assert all(bool(torch.isfinite(load_checkpoint(path).model["W_enc"]).all()) for path in kept)
