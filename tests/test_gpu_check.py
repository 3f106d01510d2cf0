"""The native check must pass on what is right and see what is wrong."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

from transcoder.kernels.codes import SparseCodes
from transcoder.kernels.encode import torch_backend

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def gpu_check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "bench" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(gpu_check: ModuleType) -> dict[str, str | None]:
    return dict(gpu_check.checks(torch.device("cpu"), gpu_check.SMALL, seed=3))


def test_every_op_passes_in_every_dtype(gpu_check: ModuleType) -> None:
    found = run(gpu_check)
    assert len(found) >= 30
    assert sum(name.startswith("compiled step") for name in found) >= 2
    assert {name: problem for name, problem in found.items() if problem is not None} == {}


def test_a_left_out_winner_and_a_wrong_gradient_are_seen(
    gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANSCODER_BACKEND", "torch")
    right = torch_backend._topk_ids

    def second_best(activations: torch.Tensor, k: int) -> torch.Tensor:
        return right(activations, min(k + 1, activations.shape[1]))[:, -k:]

    monkeypatch.setattr(torch_backend, "_topk_ids", second_best)
    original = torch_backend.gradients

    def no_bias_gradient(
        grad: torch.Tensor, x: torch.Tensor, W: torch.Tensor, codes: SparseCodes, needs: tuple
    ) -> tuple:
        grad_x, grad_W, grad_b = original(grad, x, W, codes, needs)
        return grad_x, grad_W, torch.zeros_like(grad_b)

    monkeypatch.setattr(torch_backend, "gradients", no_bias_gradient)
    found = {name: problem for name, problem in run(gpu_check).items() if " torch " in name}
    # Wrong alike in both modes: that is not for this check to see.
    assert found["compiled step torch topk"] is None
    topk = [problem or "" for name, problem in found.items() if name.startswith("topk_encode")]
    assert sum("left out" in problem for problem in topk) >= 3
    threshold = [problem or "" for name, problem in found.items() if name.startswith("threshold_encode")]
    assert sum("db_enc" in problem for problem in threshold) >= 3


def test_a_compiled_step_that_differs_is_seen(gpu_check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    right = torch_backend.gradients

    def other_the_second_time(*arguments: object) -> tuple:
        nonlocal calls
        calls += 1
        grad_x, grad_W, grad_b = right(*arguments)
        return grad_x, grad_W, grad_b if calls == 1 else grad_b + 1

    monkeypatch.setattr(torch_backend, "gradients", other_the_second_time)
    check = lambda: gpu_check.check_compiled(torch.device("cpu"), "topk", 0)  # noqa: E731
    assert "compiled gradients: result 1 differs" in gpu_check.outcome("torch", check)
