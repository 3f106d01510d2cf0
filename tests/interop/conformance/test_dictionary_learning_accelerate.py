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
from transcoder.interop.accelerate import DenseView, PeerVersionError, SparseActivations
from transcoder.interop.accelerate.dispatch import FEWEST_ROWS

from .makers import global_state

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


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_the_same_object_and_the_library_as_it_was(kind: str) -> None:
    trainer = make(kind)
    keys, cls, state = list(trainer.ae.state_dict()), type(trainer.ae), global_state("dictionary_learning")
    transcoder.accelerate(trainer.ae, always=True)
    trainer.update(5, data())
    after = global_state("dictionary_learning")
    assert {name: after.get(name) for name in state} == state
    assert type(make(kind).ae) is cls
    assert list(trainer.ae.state_dict()) == keys


@pytest.mark.parametrize("kind", ["topk", "batch_topk"])
def test_hooks_on_the_encoder_and_the_decoder_are_heard(kind: str) -> None:
    theirs, ours = make(kind).ae, make(kind).ae
    transcoder.accelerate(ours, always=True)
    settings = {} if kind == "topk" else {"use_threshold": False}
    for sae in (theirs, ours):
        sae.encoder.register_forward_hook(lambda module, args, out: out.flip(-1))
        sae.decoder.register_forward_hook(lambda module, args, out: 2 * out)
    with pytest.warns(DenseView, match="hooks on the encoder"):
        acts = ours.encode(data(), **settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseView)
        ours.encode(data(), **settings)  # announced once
    torch.testing.assert_close(acts, theirs.encode(data(), **settings), **CLOSE)
    torch.testing.assert_close(ours.decode(acts), theirs.decode(acts), **CLOSE)
    ours.encoder._forward_hooks.clear()
    theirs.encoder._forward_hooks.clear()
    left, right = (sae.decode(sae.encode(data(), **settings)) for sae in (theirs, ours))
    torch.testing.assert_close(right, left, **CLOSE)


def test_few_rows_take_the_librarys_own_path() -> None:
    sae = AutoEncoderTopK(D, 2048, K)
    transcoder.accelerate(sae)
    x = torch.randn(FEWEST_ROWS, D)
    assert type(sae.encode(x[1:])) is torch.Tensor
    assert type(sae.encode(x)) is SparseActivations
    assert type(transcoder.accelerate(sae, always=True).encode(x[1:])) is SparseActivations


def test_an_untested_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.2.0")
    with pytest.raises(PeerVersionError, match=r"tested with dictionary-learning 0\.1\.0, found 0\.2\.0"):
        transcoder.accelerate(make("topk").ae, always=True)


def test_a_missing_part_is_named_with_the_tested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from dictionary_learning.trainers import top_k

    sae = make("topk").ae
    monkeypatch.delattr(top_k, "AutoEncoderTopK")
    with pytest.raises(PeerVersionError, match=r"tested with dictionary-learning 0\.1\.0, found .*AutoEncoderTopK"):
        transcoder.accelerate(sae)


@pytest.mark.parametrize("kind", ["batch_topk", "matryoshka"])
def test_input_that_is_not_finite_stays_visible(kind: str) -> None:
    theirs, ours = make(kind).ae, transcoder.accelerate(make(kind).ae, always=True)
    x = data()
    x[3, 5] = torch.nan
    for ae in (theirs, ours):
        ae.threshold.fill_(0.5)
    with pytest.warns(DenseView, match="not finite"):
        right = ours(x)
    torch.testing.assert_close(right, theirs(x), **CLOSE, equal_nan=True)


def test_what_encode_hands_out_can_be_changed() -> None:
    theirs, ours = make("topk").ae, transcoder.accelerate(make("topk").ae, always=True)
    found = []
    for ae in (theirs, ours):
        with torch.no_grad():
            acts, values, indices, _ = ae.encode(data(), return_topk=True)
            values.zero_()
            indices.zero_()
            found.append(ae.decode(acts))
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_hooks_on_the_encoders_gradient_are_run() -> None:
    grads = []
    for ae in (make("topk").ae, transcoder.accelerate(make("topk").ae, always=True)):
        ae.encoder.register_full_backward_pre_hook(lambda module, grad: (2 * grad[0],))
        ae(data()).square().sum().backward()
        grads.append(ae.encoder.weight.grad)
    torch.testing.assert_close(grads[1], grads[0], **CLOSE)
