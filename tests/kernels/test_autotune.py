"""The tuner refuses what is wrong before it times it, prints data that can be pasted, and says where it cannot run."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from transcoder.kernels import gather_config
from transcoder.kernels.encode import config, torch_backend
from transcoder.kernels.encode.config import ProductLaunch
from transcoder.kernels.gather_config import Gather

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def autotune(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench import autotune

    return autotune


def run(*words: str) -> tuple[int, str]:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-m", "bench.autotune", *words], cwd=ROOT, capture_output=True, text=True, env=environment
    )
    assert not done.stderr, done.stderr
    return done.returncode, done.stdout


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    assert run() == (1, "bench.autotune: no GPU here, so nothing can be timed (--list shows the candidates)\n")


def test_candidates_are_listed_anywhere() -> None:
    code, out = run("--list")
    assert code == 0
    for name in ("product-half", "product-float", "gather-4", "gather-2", "nested-slab", "pairs"):
        assert f"\n{name}: kernels/" in out
    assert out.count("<- in force") == 6
    assert out.count("ProductLaunch(") > 40


def test_a_wrong_candidate_is_refused_before_it_is_timed(autotune: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU with backend torch: the tuner's own steps need no kernel."""
    right = torch_backend._topk_ids

    @contextmanager
    def use(candidate: str) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            if candidate == "wrong":
                patch.setattr(
                    torch_backend, "_topk_ids", lambda a, k, *rest: right(a, min(k + 1, a.shape[1]), *rest)[:, -k:]
                )
            if candidate == "too large":
                patch.setattr(torch_backend, "select_topk", lambda *a: (_ for _ in ()).throw(RuntimeError("resources")))
            yield

    choice = replace(autotune.choices("sm_90")[1], candidates=("wrong", "fine", "too large"), current="fine", use=use)
    monkeypatch.setattr(autotune, "use_backend", lambda name: nullcontext())
    monkeypatch.setenv("TRANSCODER_BACKEND", "torch")
    outcomes = list(autotune.tune(choice, autotune.Size(64, 16, 64, 4), torch.device("cpu")))
    assert [o.candidate for o in outcomes] == ["fine", "wrong", "too large"]
    assert [o.seconds is not None for o in outcomes] == [True, False, False]
    assert "Mismatch" in (outcomes[1].problem or "")
    assert outcomes[2].problem == "RuntimeError: resources"
    assert "no candidate is right" in autotune.frozen(choice, outcomes[1:], "here")


def test_what_is_printed_can_be_pasted(autotune: ModuleType) -> None:
    product, *_ = autotune.choices("sm_90")
    slow, fast = product.candidates[:2]
    outcomes = [autotune.Outcome(slow, 2e-3, None), autotune.Outcome(fast, 1e-3, None)]
    text = autotune.frozen(product, outcomes, "a chip")
    place, pasted = text.split("\n    ")
    assert place == "kernels/encode/config.py, PRODUCT['sm_90']['half']:"
    assert eval(pasted, {"ProductLaunch": ProductLaunch}) == replace(
        fast, reason="median 1.000 ms, a chip; next best 2.000 ms"
    )
    gather = next(c for c in autotune.choices("sm_90") if c.name == "gather-4")
    text = autotune.frozen(gather, [autotune.Outcome(gather.current, 3e-3, None)], "a chip")
    assert text.startswith("kernels/gather_config.py, CHOICES[4] (as it is):")
    assert eval(text.split("\n    ")[1], {"Gather": Gather}) == gather_config.CHOICES[4]


def test_putting_a_candidate_in_force_reaches_the_launchers(autotune: ModuleType) -> None:
    for choice in autotune.choices("sm_90"):
        other = next(c for c in choice.candidates if c != choice.current)
        before = (config.product_launch("sm_90", "half"), dict(gather_config.CHOICES))
        with choice.use(other):
            if choice.name == "product-half":
                assert config.product_launch("sm_90", "half") == other
            if choice.name == "gather-4":
                assert gather_config.gather(torch.empty(1, 4096)) == other
        assert (config.product_launch("sm_90", "half"), dict(gather_config.CHOICES)) == before


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


@pytest.mark.interpreted
@pytest.mark.parametrize(
    "name",
    [pytest.param("gather-4", marks=pytest.mark.slow), pytest.param("nested-slab", marks=pytest.mark.slow), "pairs"],
)
def test_real_kernels_are_checked_and_timed(
    name: str, autotune: ModuleType, triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autotune, "CHECKED", (3, 16, 32, 3))
    monkeypatch.setattr(autotune, "ROUNDS", 1)
    monkeypatch.setattr(autotune, "WARM_UP", 0)
    choice = next(c for c in autotune.choices("interpreter") if c.name == name)
    choice = replace(choice, candidates=choice.candidates[:1])
    outcomes = list(autotune.tune(choice, autotune.Size(2, 16, 32, 2), triton_device))
    assert [o.problem for o in outcomes] == [None] * len(outcomes)
    assert len(outcomes) == 2
