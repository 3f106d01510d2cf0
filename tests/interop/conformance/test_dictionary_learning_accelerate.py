"""`transcoder.accelerate` on dictionary_learning's classes, inside the library's own trainers."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip(
    "dictionary_learning",
    reason="dictionary_learning is not installed here: python tests/interop/run.py dictionary-learning",
)

from dictionary_learning.trainers.batch_top_k import BatchTopKSAE, BatchTopKTrainer
from dictionary_learning.trainers.matryoshka_batch_top_k import (
    MatryoshkaBatchTopKSAE,
    MatryoshkaBatchTopKTrainer,
)
from dictionary_learning.trainers.top_k import AutoEncoderTopK, TopKTrainer

import transcoder
from transcoder.interop.accelerate import DenseView, PeerVersionError

B, D, N, K = 33, 24, 96, 5
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
KINDS: dict[str, Any] = {
    "topk": (TopKTrainer, AutoEncoderTopK, {}),
    "batch_topk": (BatchTopKTrainer, BatchTopKSAE, {}),
    "matryoshka": (MatryoshkaBatchTopKTrainer, MatryoshkaBatchTopKSAE, {"group_fractions": [0.25, 0.25, 0.5]}),
}


def make(kind: str) -> Any:
    trainer_class, _, settings = KINDS[kind]
    trainer = trainer_class(
        steps=100,
        activation_dim=D,
        dict_size=N,
        k=K,
        layer=0,
        lm_name="none",
        lr=1e-3,
        warmup_steps=0,
        threshold_start_step=2,
        seed=0,
        device="cpu",
        **settings,
    )
    bias = trainer.ae.b_enc if kind == "matryoshka" else trainer.ae.encoder.bias
    bias.data.uniform_(-0.1, 0.1)
    trainer.ae.b_dec.data.uniform_(-0.1, 0.1)
    return trainer


def data(seed: int = 1) -> torch.Tensor:
    return torch.randn(B, D, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients(kind: str) -> None:
    theirs, ours = make(kind), make(kind)
    before = {n: (p, p.data_ptr(), tuple(p.shape)) for n, p in ours.ae.named_parameters()}
    assert transcoder.accelerate(ours.ae, always=True) is ours.ae
    assert isinstance(ours.ae, KINDS[kind][1])
    assert {n: (p, p.data_ptr(), tuple(p.shape)) for n, p in ours.ae.named_parameters()} == before
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseView)
        left, right = theirs.loss(data(), step=5), ours.loss(data(), step=5)
        torch.testing.assert_close(right, left, **CLOSE)
        left.backward()
        right.backward()
    torch.testing.assert_close(ours.ae.threshold, theirs.ae.threshold, **CLOSE)
    assert torch.equal(ours.num_tokens_since_fired, theirs.num_tokens_since_fired)
    for (name, p), q in zip(theirs.ae.named_parameters(), ours.ae.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_auxk(kind: str) -> None:
    losses, grads = [], []
    for quick in (False, True):
        trainer = make(kind)
        if quick:
            transcoder.accelerate(trainer.ae, always=True)
        trainer.num_tokens_since_fired[-30:] = trainer.dead_feature_threshold + 1
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DenseView)
            loss = trainer.loss(data(), step=5)
        loss.backward()
        losses.append(loss)
        grads.append([p.grad for p in trainer.ae.parameters()])
    torch.testing.assert_close(losses[1], losses[0], **CLOSE)
    torch.testing.assert_close(grads[1], grads[0], **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_updates_of_their_trainer_side_by_side(kind: str) -> None:
    theirs, ours = make(kind), make(kind)
    transcoder.accelerate(ours.ae, always=True)
    for n in range(10):
        left, right = theirs.update(n, data(n)), ours.update(n, data(n))
    assert right == pytest.approx(left, rel=1e-3)
    for (name, p), q in zip(theirs.ae.named_parameters(), ours.ae.named_parameters(), strict=True):
        far = (q[1] - p).abs() > 1e-4
        assert far.float().mean() < 0.01, f"{name}: {int(far.sum())} of {far.numel()}"


@pytest.mark.parametrize("kind", KINDS)
def test_inference_saving_and_loading(kind: str, tmp_path: Path) -> None:
    theirs, ours = make(kind), make(kind)
    transcoder.accelerate(ours.ae, always=True)
    for n in range(5):
        theirs.update(n, data(n))
        ours.update(n, data(n))
    cls = KINDS[kind][1]
    torch.save(ours.ae.state_dict(), tmp_path / "ours.pt")
    torch.save(theirs.ae.state_dict(), tmp_path / "theirs.pt")
    plain = cls.from_pretrained(tmp_path / "ours.pt")
    assert type(plain) is cls
    quick = transcoder.accelerate(cls.from_pretrained(tmp_path / "theirs.pt"), always=True)
    reference = cls.from_pretrained(tmp_path / "theirs.pt")
    x = data(99)
    torch.testing.assert_close(quick(x), reference(x), **CLOSE)
    _, acts = quick(x, output_features=True)
    torch.testing.assert_close(acts.dense(), reference.encode(x), **CLOSE)
    torch.testing.assert_close(plain(x), ours.ae(x), **CLOSE)
    if kind != "topk":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DenseView)
            fresh = make(kind).ae
            torch.testing.assert_close(transcoder.accelerate(copy.deepcopy(fresh), always=True)(x), fresh(x), **CLOSE)


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.2.0")
    with pytest.raises(PeerVersionError, match=r"tested with dictionary-learning 0\.1\.0, found 0\.2\.0"):
        transcoder.accelerate(make("topk").ae, always=True)
