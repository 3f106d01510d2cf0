from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from transcoder.kernels import active_backend, backend, extension, nested_loss, sparse_decode, topk_encode, use_backend
from transcoder.kernels.backend import requested_backend


def run() -> None:
    topk_encode(torch.ones(2, 3), torch.ones(4, 3), torch.zeros(4), 1)


def test_auto_serves_the_cpu() -> None:
    assert active_backend("cpu") == ("cpp" if extension.usable() else "torch")
    run()


def test_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(extension, "_reason", "no C++ compiler")
    monkeypatch.setattr(extension, "_tried", True)
    assert active_backend("cpu") == "torch"
    with use_backend("cpp"), pytest.raises(RuntimeError, match="'cpp' was requested by name"):
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


def test_auto_on_a_gpu_gives_a_dtype_to_a_backend_that_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "has_backend", lambda name, family: backend.backend_module(family, name) is not None)
    monkeypatch.setattr("transcoder.kernels.gpu_selftest.proven", lambda family, device: True)
    for dtype in (None, torch.float32, torch.bfloat16, torch.float16):
        assert active_backend("cuda", "encode", dtype) == "triton"
    assert active_backend("cuda", "encode", torch.float64) == "torch"
    # Their kernels take it.
    assert (
        active_backend("cuda", "decode", torch.float64)
        == active_backend("cuda", "correlation", torch.float64)
        == "triton"
    )
    with use_backend("triton"):
        assert active_backend("cuda", "encode", torch.float64) == "triton", "a backend by name never falls back"


def in_a_thread(run: Callable[[], object]) -> object:
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()


def test_a_choice_is_the_threads_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSCODER_BACKEND", raising=False)
    with use_backend("torch"):
        assert in_a_thread(requested_backend) == "auto"
        monkeypatch.setenv("TRANSCODER_BACKEND", "cpp")
        assert in_a_thread(requested_backend) == "cpp"
        assert requested_backend() == "torch"

        def elsewhere() -> None:
            with use_backend("triton"):
                assert requested_backend() == "triton"

        in_a_thread(elsewhere)
        assert requested_backend() == "torch"


def test_choices_nest_and_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRANSCODER_BACKEND", raising=False)
    with use_backend("torch"):
        with pytest.raises(KeyError), use_backend("cpp"):
            raise KeyError
        assert requested_backend() == "torch"
        with use_backend("auto"):
            assert requested_backend() == "auto"
    assert requested_backend() == "auto"


@pytest.mark.parametrize("where", ["here", "another thread"])
def test_a_gradient_runs_on_the_backend_of_its_forward(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd's threads for CUDA see no `use_backend` of ours; a thread of our own stands for them."""
    x, W, b = torch.randn(3, 4), torch.randn(9, 4, requires_grad=True), torch.zeros(9)
    with use_backend("torch"):
        codes = topk_encode(x, W, b, 2)
        loss = sparse_decode(codes, W, torch.zeros(4)).sum() + nested_loss(codes, W, torch.zeros(4), x, [4, 9]).value
    # Not here on a CPU without a GPU or an interpreter: asking for it raises.
    monkeypatch.setenv("TRANSCODER_BACKEND", "triton")
    if where == "here":
        loss.backward()
    else:
        in_a_thread(loss.backward)
    assert bool(torch.isfinite(W.grad).all())
