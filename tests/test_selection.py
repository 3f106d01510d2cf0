"""JumpReLU training against a dense float64 version of its own, on every backend that runs here; what it does to a model.
TopK and BatchTopK are covered by tests/test_model.py."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transcoder.cli import main
from transcoder.config import RunConfig, TrainingSection
from transcoder.dictionary_config import ACTIVATIONS, JumpReLUSettings
from transcoder.interop.formats import import_transcoder
from transcoder.kernels import extension, use_backend
from transcoder.kernels.triton_support import interpreted
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.selection import SELECTIONS
from transcoder.training.optimizer import make_optimizer, optimizer_step

PENALTIES = ("l0_target", "l0", "tanh")
BACKENDS = ["triton"] if interpreted() or torch.cuda.is_available() else ["torch", *["cpp"] * extension.usable()]
SOME = "dense_float64 and (mse and l0_target or saelens and tanh)"
INTERPRETED = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-k", SOME, "tests/test_selection.py")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def jumprelu(d_in: int, d_out: int, d_sae: int, k: int, seed: int = 0, **settings: Any) -> Transcoder:
    names = set(JumpReLUSettings.__dataclass_fields__)
    own = JumpReLUSettings(**{name: value for name, value in settings.items() if name in names})
    others = {name: value for name, value in settings.items() if name not in names}
    return Transcoder(TranscoderConfig(d_in, d_out, d_sae, k, activation="jumprelu", jumprelu=own, **others), seed=seed)


class Jump(torch.autograd.Function):
    """h * (h > t), h > t: dense, the formulas of `JumpReLU` word for word."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, t: Tensor, bandwidth: float) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(h, t)
        ctx.bandwidth = bandwidth
        return h * (h > t), (h > t).to(h.dtype)

    @staticmethod
    def backward(ctx: Any, grad_z: Tensor, grad_step: Tensor) -> tuple[Tensor, Tensor, None]:
        h, t = ctx.saved_tensors
        # A pre-activation that is not positive is never stored: the window ends at 0.
        window = ((h - t).abs() < ctx.bandwidth / 2) & (h > 0)
        slope = window / ctx.bandwidth
        return grad_z * (h > t), (-t * slope * grad_z - slope * grad_step).sum(0), None


def dense_loss(model: Transcoder, x: Tensor, y: Tensor, token_weights: Tensor | None) -> Tensor:
    config, settings = model.config, model.config.jumprelu
    z, active = Jump.apply(x @ model.W_enc.T + model.b_enc, model.threshold, settings.bandwidth)
    w = torch.ones(len(x), dtype=x.dtype) if token_weights is None else token_weights
    errors = [(z[:, :n] @ model.W_dec[:n] + model.b_dec - y).square() * w[:, None] for n in model.widths]
    per_prefix = [e.mean() if config.loss == "mse" else e.sum(-1).mean() for e in errors]
    counted = torch.tanh(settings.tanh_scale * z) if settings.penalty == "tanh" else active
    share = (counted * w[:, None]).sum() / len(x) / config.k
    penalty = (share - 1) ** 2 if settings.penalty == "l0_target" else share
    if config.loss == "mse":
        return sum(per_prefix) / len(errors) + settings.coefficient * penalty
    return sum(per_prefix) + settings.coefficient * penalty * config.d_out * len(errors)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize(("weighted", "loss"), [(False, "mse"), (True, "saelens")])
def test_loss_and_every_gradient_match_a_dense_float64_version(
    backend: str, penalty: str, weighted: bool, loss: str
) -> None:
    model = jumprelu(6, 5, 40, 4, penalty=penalty, bandwidth=0.7, coefficient=0.3, widths=[16, 40], loss=loss)
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        # From 0, where the window is cut, to where nothing is active.
        model.threshold.copy_(torch.linspace(0, 3, 40))
        model.b_enc.copy_(0.3 * torch.randn(40, generator=g))
        model.b_dec.copy_(torch.randn(5, generator=g))
    x, y = torch.randn(30, 6, generator=g), torch.randn(30, 5, generator=g)
    w = torch.rand(30, generator=g) + 0.5 if weighted else None
    exact = Transcoder(model.config).double()
    exact.load_state_dict(model.state_dict())
    want = dense_loss(exact, x.double(), y.double(), None if w is None else w.double())
    wanted = torch.autograd.grad(want, list(exact.parameters()))
    model = model.to(DEVICE)
    with use_backend(backend):
        out = model.training_step(*(t.to(DEVICE) for t in (x, y)), token_weights=None if w is None else w.to(DEVICE))
        found = torch.autograd.grad(out.loss, list(model.parameters()))
    torch.testing.assert_close(out.loss.double().cpu(), want, rtol=1e-5, atol=0)
    for (name, _), a, b in zip(model.named_parameters(), found, wanted, strict=True):
        torch.testing.assert_close(a.double().cpu(), b, rtol=1e-4, atol=1e-5 * float(b.abs().max()), msg=name)
        assert float(b.abs().max()) > 0, name
    stored, active = out.codes.nnz, int((out.codes.values > 0).sum())
    assert 0 < active < stored < 30 * 40


@pytest.mark.skipif(BACKENDS == ["triton"], reason="the test above launches Triton's kernels already")
@pytest.mark.command(*INTERPRETED, TRITON_INTERPRET="1")
def test_gradients_in_tritons_interpreter(finished_command: subprocess.CompletedProcess[str]) -> None:
    assert finished_command.returncode == 0, finished_command.stdout[-8000:]
    assert "2 passed" in finished_command.stdout


def test_every_activation_has_its_selection() -> None:
    assert tuple(SELECTIONS) == ACTIVATIONS


def planted(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Targets that are sums of 3 of 24 directions each, of sources that are sums of the same 3 of 24 others."""
    fixed = torch.Generator().manual_seed(7)
    sources, targets = (torch.nn.functional.normalize(torch.randn(24, 16, generator=fixed)) for _ in range(2))
    g = torch.Generator().manual_seed(seed)
    z = torch.zeros(rows, 24).scatter(1, torch.rand(rows, 24, generator=g).topk(3).indices, 1.0)
    z = z * (1 + torch.rand(rows, 24, generator=g))
    return z @ sources, z @ targets


def train(model: Transcoder, steps: int, first: int = 0, optimizer: Any = None) -> torch.optim.Adam:
    optimizer = optimizer or make_optimizer(model, TrainingSection(), 3e-3)
    for step in range(first, first + steps):
        model.training_step(*planted(256, step)).loss.backward()
        optimizer_step(model, optimizer, 3e-3, 1.0)
    return optimizer


@pytest.mark.parametrize("initial_threshold", [None, 0.3])
def test_the_mean_number_of_active_latents_goes_to_k(initial_threshold: float | None) -> None:
    model = jumprelu(16, 16, 48, 5, initial_threshold=initial_threshold)
    model.set_normalization(*planted(4096, 10**6), "standardize")
    train(model, 400)
    x, y = planted(2048, 10**6 + 1)
    with torch.no_grad():
        codes = model.eval().encode(x)
        fvu = float((model(x) - y).square().sum() / (y - y.mean(0)).square().sum())
    assert codes.nnz / len(x) == pytest.approx(5, rel=0.1)
    assert fvu < 0.2
    assert float(model.threshold.detach().min()) >= 0


def test_evaluation_keeps_what_is_above_each_threshold_and_training_marks_it() -> None:
    model = jumprelu(10, 7, 30, 4)
    with torch.no_grad():
        model.threshold.copy_(torch.linspace(0, 2, 30))
    x = torch.randn(40, 10, generator=torch.Generator().manual_seed(0))
    pre = x @ model.W_enc.T + model.b_enc
    want = torch.where(pre > model.threshold, pre, 0)
    torch.testing.assert_close(model.encode(x).to_dense(), want)
    torch.testing.assert_close(model.eval().encode(x).to_dense(), want)
    assert bool((model.encode(x).values > 0).all())


def test_a_nan_in_the_source_reaches_the_loss() -> None:
    model = jumprelu(10, 7, 30, 4)
    x, y = torch.randn(8, 10), torch.randn(8, 7)
    x[3, 2] = torch.nan
    assert bool(model.training_step(x, y).loss.isnan())


@pytest.mark.parametrize("penalty", PENALTIES)
def test_the_penalty_is_scaled_told_and_absent_from_other_selections(penalty: str) -> None:
    model = jumprelu(10, 7, 30, 4, penalty=penalty)
    x, y = torch.randn(20, 10), torch.randn(20, 7)
    whole, none = model.training_step(x, y), model.training_step(x, y, penalty_factor=0.0)
    torch.testing.assert_close(whole.loss.detach() - none.loss.detach(), whole.penalty)
    assert float(none.penalty) == 0 < float(whole.penalty)
    assert Transcoder(TranscoderConfig(10, 7, 30, 4)).training_step(x, y).penalty is None


@pytest.mark.parametrize("backend", BACKENDS)
def test_thresholds_learn_faster_than_the_weights_and_stay_at_zero_or_above(backend: str) -> None:
    model = jumprelu(10, 7, 30, 4, initial_threshold=0.05, learning_rate_ratio=8).to(DEVICE)
    optimizer = make_optimizer(model, TrainingSection(), 1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    with torch.no_grad():
        model.threshold[3] = 0.001
    with use_backend(backend):
        optimizer_step(model, optimizer, 1e-3, None)
    # Adam's first step is the learning rate, whatever the gradient.
    expected = torch.full((30,), 0.05 - 8 * 1e-3)
    expected[3] = 0
    torch.testing.assert_close(model.threshold.detach().cpu(), expected, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(model.b_enc.detach().cpu(), torch.full((30,), -1e-3), rtol=1e-3, atol=1e-6)


def test_saved_weights_and_a_stopped_training_go_on_to_the_bit(tmp_path: Path) -> None:
    whole, stopped = (jumprelu(16, 16, 48, 3, widths=[16, 48]) for _ in range(2))
    train(whole, 12)
    moments = train(stopped, 6).state_dict()
    stopped.save_pretrained(tmp_path)
    loaded = Transcoder.from_pretrained(tmp_path).train()
    assert loaded.config == stopped.config
    assert isinstance(loaded.threshold, torch.nn.Parameter)
    optimizer = make_optimizer(loaded, TrainingSection(), 3e-3)
    optimizer.load_state_dict(moments)
    train(loaded, 6, 6, optimizer)
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name


def test_recycling_scales_the_kept_latents_threshold_with_its_encoder() -> None:
    model = jumprelu(10, 7, 30, 4, initial_threshold=0.5)
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(0))
    before = model.eval().encode(x).to_dense()[:, 3] > 0
    model.recycle(torch.tensor([3]), torch.tensor([8]), torch.tensor([0.7]), seed=0)
    assert torch.equal(model.encode(x).to_dense()[:, 3] > 0, before)
    assert float(model.threshold[3]) != 0.5
    assert float(model.threshold[8]) == 0.5


@pytest.mark.slow
def test_the_demo_trains_it_with_every_anti_duplication_part(tmp_path: Path) -> None:
    settings = {
        "transcoder.activation": "jumprelu",
        "training.steps": 24,
        "training.warmup_steps": 4,
        "antidup.monitor.correlation_save_frequency": 8,
        "antidup.monitor.block_tokens": 4096,
        "antidup.verify_at_step": 16,
        "checkpoint.every": 12,
        "logging.progress": "false",
        "logging.report": "false",
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    assert main(["demo", "--out", str(tmp_path / "run"), *flags]) == 0
    used = json.loads((tmp_path / "run" / "usage.json").read_text())["components"]
    assert len(used) == 4
    assert all(part["calls"] > 0 and part["files"] for part in used.values()), used
    assert main(["export", str(tmp_path / "run"), "--to", "saelens", "--out", str(tmp_path / "saelens")]) == 0
    ours = Transcoder.from_pretrained(tmp_path / "run" / "checkpoints" / "step_00000024")
    assert torch.equal(import_transcoder("saelens", tmp_path / "saelens").threshold, ours.threshold)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        ({"penalty": "l1"}, ValueError, "penalty: expected one of 'l0_target', 'l0', 'tanh', got 'l1'"),
        ({"bandwidth": 0.0}, ValueError, "bandwidth: expected positive, got 0.0"),
        ({"bandwidth": None}, TypeError, "bandwidth: expected a number, got None"),
        ({"coefficient": -1.0}, ValueError, "coefficient: expected at least 0, got -1.0"),
        ({"warmup_steps": 1.5}, TypeError, "warmup_steps: expected a whole number, got 1.5"),
        ({"warmup_steps": -1}, ValueError, "warmup_steps: expected at least 0, got -1"),
        ({"initial_threshold": -0.1}, ValueError, "initial_threshold: expected at least 0 or null, got -0.1"),
        ({"learning_rate_ratio": 0}, ValueError, "learning_rate_ratio: expected positive or null, got 0"),
        ({"tanh_scale": float("nan")}, ValueError, "tanh_scale: expected a finite number, got nan"),
    ],
)
def test_bad_settings_are_refused_by_name(change: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=rf"transcoder\.jumprelu\.{words}"):
        JumpReLUSettings(**change)
    with pytest.raises(kind, match=rf"transcoder\.jumprelu\.{words}"):
        RunConfig.from_dict({"transcoder": {"jumprelu": change}})


def test_files_hold_the_settings_of_jumprelu_for_jumprelu_alone() -> None:
    config = jumprelu(3, 3, 9, 2, bandwidth=0.25).config
    assert TranscoderConfig.from_dict(config.to_dict()) == config
    assert "jumprelu" not in TranscoderConfig(3, 3, 9, 2).to_dict()
    with pytest.raises(ValueError, match=r"unknown key 'TranscoderConfig\.jumprelu\.bandwith'; did you mean"):
        TranscoderConfig.from_dict({**config.to_dict(), "jumprelu": {"bandwith": 1}})
