from __future__ import annotations

import pytest
import torch

from transcoder.kernels import active_backend, extension, topk_encode, use_backend


def run() -> None:
    topk_encode(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), 1)


def test_auto_serves_the_cpu() -> None:
    assert active_backend("cpu") == ("cpp" if extension.usable() else "torch")
    run()


def test_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_reason", "no C++ compiler")
    monkeypatch.setattr(extension, "_tried", True)
    assert active_backend("cpu") == "torch"
    with use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was asked for by name"):
        run()
    run()


def test_environment_variable_chooses_and_the_context_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSCODER_BACKEND", "triton")
    with pytest.raises(RuntimeError, match="triton"):
        run()
    with use_backend("torch"):
        run()


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(ValueError, match="expected one of auto, triton, cpp, torch, got 'cuda'"),
        use_backend("cuda"),
    ):
        pass
    monkeypatch.setenv("TRANSCODER_BACKEND", "fast")
    with pytest.raises(ValueError, match="TRANSCODER_BACKEND"):
        run()
