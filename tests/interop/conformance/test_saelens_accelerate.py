"""`transcoder.accelerate` on SAELens' own classes: outputs, losses, gradients, optimizer steps, hooks, saving, a real run."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed here: python tests/interop/run.py saelens")

from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput  # noqa: E402

import transcoder  # noqa: E402
from transcoder.interop.accelerate import DenseView, PeerVersionError, SparseActivations  # noqa: E402
from transcoder.interop.accelerate.dispatch import OWN_CODE_BELOW  # noqa: E402

from .makers import global_state  # noqa: E402

B, D, N, K = 33, 24, 96, 5
KINDS = ("TopK", "BatchTopK", "MatryoshkaBatchTopK")
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
"""fp32 sums of 24 to 96 terms in another order, through a step's products."""


def make(kind: str, **settings: Any) -> Any:
    torch.manual_seed(0)
    if kind == "MatryoshkaBatchTopK":
        settings = {"matryoshka_widths": [8, 40, N], **settings}
    config = getattr(sae_lens, f"{kind}TrainingSAEConfig")(d_in=D, d_sae=N, **{"k": K, **settings})
    sae = getattr(sae_lens, f"{kind}TrainingSAE")(config)
    with torch.no_grad():
        # Decoder norms that differ, and biases that matter.
        sae.W_dec.mul_(torch.rand(N, 1) + 0.5)
        sae.b_enc.uniform_(-0.1, 0.1)
        sae.b_dec.uniform_(-0.1, 0.1)
    return sae


def step(sae: Any, x: torch.Tensor, dead: torch.Tensor | None = None) -> Any:
    return sae.training_forward_pass(
        TrainStepInput(sae_in=x, coefficients={}, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    )


def data(rows: int = B, seed: int = 1) -> torch.Tensor:
    return torch.randn(rows, D, generator=torch.Generator().manual_seed(seed))


def quiet(sae: Any) -> Any:
    """Accelerated; a dense view is an error."""
    warnings.simplefilter("error", DenseView)
    return transcoder.accelerate(sae, always=True)


@pytest.fixture(autouse=True)
def _warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        yield


@pytest.mark.parametrize("dead", [0, 7, 40])
@pytest.mark.parametrize("rescale", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_outputs_losses_and_gradients(kind: str, rescale: bool, dead: int) -> None:
    theirs = make(kind, rescale_acts_by_decoder_norm=rescale)
    ours = quiet(copy.deepcopy(theirs))
    mask = torch.arange(N) >= N - dead
    left, right = step(theirs, data(), mask), step(ours, data(), mask)
    assert left.losses.keys() == right.losses.keys()
    for name in left.losses:
        torch.testing.assert_close(right.losses[name], left.losses[name], **CLOSE)
    torch.testing.assert_close(right.loss, left.loss, **CLOSE)
    torch.testing.assert_close(right.sae_out, left.sae_out, **CLOSE)
    left.loss.backward()
    right.loss.backward()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, **CLOSE, msg=lambda m, name=name: f"{name}: {m}")
    warnings.simplefilter("default", DenseView)
    torch.testing.assert_close(right.feature_acts.dense(), left.feature_acts, **CLOSE)
    torch.testing.assert_close(right.hidden_pre.dense(), left.hidden_pre, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_and_in_16_bit(kind: str) -> None:
    """To 16-bit rounding: theirs multiplies in bf16 there, ours accumulates in fp32."""
    mask = torch.arange(N) >= N - 20
    for dtype, autocast in (("float32", True), ("bfloat16", False)):
        theirs = make(kind, dtype=dtype)
        ours = quiet(copy.deepcopy(theirs))
        losses = []
        for sae in (theirs, ours):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                out = step(sae, data(), mask)
            out.loss.backward()
            losses.append(out.loss)
            assert sae.W_enc.grad.dtype == sae.W_enc.dtype
        assert losses[1].dtype == losses[0].dtype
        torch.testing.assert_close(losses[1], losses[0], rtol=1e-2, atol=0.0)
        torch.testing.assert_close(ours.W_dec.grad.norm(), theirs.W_dec.grad.norm(), rtol=5e-2, atol=0.0)


@pytest.mark.parametrize("k", [4.5, 1.03])
def test_a_fractional_k(k: float) -> None:
    theirs = make("BatchTopK", k=k)
    ours = quiet(copy.deepcopy(theirs))
    left, right = step(theirs, data()), step(ours, data())
    assert int((right.feature_acts > 0).sum()) == int(k * B)
    torch.testing.assert_close(right.loss, left.loss, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_optimizer_steps_side_by_side(kind: str) -> None:
    theirs = make(kind)
    ours = copy.deepcopy(theirs)
    # An optimizer made before acceleration goes on with the same parameters.
    optimizers = [torch.optim.Adam(sae.parameters(), lr=1e-3) for sae in (theirs, ours)]
    quiet(ours)
    for seed in range(10):
        for sae, optimizer in zip((theirs, ours), optimizers, strict=True):
            optimizer.zero_grad()
            step(sae, data(seed=seed), torch.arange(N) >= N - 10).loss.backward()
            optimizer.step()
    for (name, p), q in zip(theirs.named_parameters(), ours.parameters(), strict=True):
        # Adam divides by the gradient's size: where that is near 0, rounding alone decides up to a step of lr.
        far = (q - p).abs() > 1e-4
        assert far.float().mean() < 0.01, f"{name}: {int(far.sum())} of {far.numel()}"
    if kind != "TopK":
        torch.testing.assert_close(ours.topk_threshold, theirs.topk_threshold, **CLOSE)


@pytest.mark.parametrize("kind", KINDS)
def test_small_batches_take_the_librarys_own_path(kind: str) -> None:
    theirs = make(kind)
    ours = transcoder.accelerate(copy.deepcopy(theirs))
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseView)
        left, right = (step(sae, data()) for sae in (theirs, ours))
        assert type(right.feature_acts) is torch.Tensor
        assert torch.equal(left.loss, right.loss)
        enough = -(-OWN_CODE_BELOW // N)
        for rows, path in ((enough - 1, torch.Tensor), (enough, SparseActivations)):
            assert type(step(ours, data(rows)).feature_acts) is path
    assert type(transcoder.accelerate(ours, always=True).encode(data())) is SparseActivations


@pytest.mark.parametrize("kind", KINDS)
def test_it_stays_the_same_object(kind: str) -> None:
    sae = make(kind)
    before = {n: (p, p.data_ptr(), tuple(p.shape), p.stride()) for n, p in sae.named_parameters()}
    keys, cls, state = list(sae.state_dict()), type(sae), global_state("sae_lens")
    assert transcoder.accelerate(sae, always=True) is sae
    assert transcoder.accelerate(sae, always=True) is sae
    step(sae, data(), torch.arange(N) >= N - 7).loss.backward()
    sae.zero_grad()
    after = global_state("sae_lens")
    assert {name: after.get(name) for name in state} == state
    assert isinstance(sae, cls)
    assert type(make(kind)) is cls, "the library's class was changed"
    assert list(sae.state_dict()) == keys
    for name, p in sae.named_parameters():
        assert before[name] == (p, p.data_ptr(), tuple(p.shape), p.stride())
    again = copy.deepcopy(sae)
    assert type(again) is type(sae)
    assert again.W_enc.data_ptr() != sae.W_enc.data_ptr()
    torch.testing.assert_close(step(again, data()).loss, step(sae, data()).loss)


@pytest.mark.parametrize("kind", KINDS)
def test_saved_by_one_and_loaded_by_the_other(kind: str, tmp_path: Path) -> None:
    ours, theirs = quiet(make(kind)), make(kind)
    step(ours, data())
    step(theirs, data())
    ours.save_model(tmp_path / "ours")
    loaded = TrainingSAE.load_from_disk(tmp_path / "ours")
    assert type(loaded) is type(theirs)
    torch.testing.assert_close(step(loaded, data()).loss, step(theirs, data()).loss, **CLOSE)
    theirs.save_inference_model(tmp_path / "theirs")
    plain = SAE.load_from_disk(tmp_path / "theirs")
    quick = transcoder.accelerate(SAE.load_from_disk(tmp_path / "theirs"), always=True)
    torch.testing.assert_close(quick(data()), plain(data()), **CLOSE)
    acts = quick.encode(data())
    torch.testing.assert_close(acts.dense(), plain.encode(data()), **CLOSE)
    three = data(12).view(3, 4, D)
    torch.testing.assert_close(quick(three), plain(three), **CLOSE)


@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
def test_normalised_activations(normalize: str) -> None:
    theirs = make("MatryoshkaBatchTopK", normalize_activations=normalize, matryoshka_widths=[N])
    theirs_plain = make("BatchTopK", normalize_activations=normalize)
    for sae in (theirs_plain, theirs):
        ours = quiet(copy.deepcopy(sae))
        left, right = step(sae, data()), step(ours, data())
        torch.testing.assert_close(right.loss, left.loss, **CLOSE)


def test_a_hook_on_the_activations_gets_them_dense_and_may_change_them() -> None:
    def ablate(acts: torch.Tensor, hook: object) -> torch.Tensor:
        assert type(acts) is torch.Tensor
        acts[..., :60] = 0
        return acts

    theirs = make("TopK")
    ours = transcoder.accelerate(copy.deepcopy(theirs), always=True)
    left = theirs.run_with_hooks(data(), fwd_hooks=[("hook_sae_acts_post", ablate)])
    with pytest.warns(DenseView, match="hook_sae_acts_post"):
        right = ours.run_with_hooks(data(), fwd_hooks=[("hook_sae_acts_post", ablate)])
    torch.testing.assert_close(right, left, **CLOSE)
    with warnings.catch_warnings():
        warnings.simplefilter("error", DenseView)
        ours.run_with_hooks(data(), fwd_hooks=[("hook_sae_acts_post", ablate)])  # announced once
    assert not torch.allclose(ours(data()), right), "the hook had no effect"


def test_a_hook_on_the_pre_activations_decides_the_selection() -> None:
    theirs = make("TopK")
    ours = transcoder.accelerate(copy.deepcopy(theirs), always=True)
    hooks: Any = [("hook_sae_acts_pre", lambda pre, hook: pre.flip(-1))]
    with pytest.warns(DenseView, match="hook_sae_acts_pre"):
        right = ours.run_with_hooks(data(), fwd_hooks=hooks)
    torch.testing.assert_close(right, theirs.run_with_hooks(data(), fwd_hooks=hooks), **CLOSE)
    _, left_cache = theirs.run_with_cache(data())
    _, right_cache = ours.run_with_cache(data())
    assert left_cache.keys() == right_cache.keys()
    for name in left_cache:
        torch.testing.assert_close(right_cache[name], left_cache[name], **CLOSE)


def test_what_needs_the_dense_tensor_gets_it_in_the_graph() -> None:
    theirs = make("TopK")
    ours = transcoder.accelerate(copy.deepcopy(theirs), always=True)
    grads = []
    for sae in (theirs, ours):
        acts = sae.encode(data())
        (acts.exp().sum() + sae.decode(acts).square().sum()).backward()
        grads.append(sae.W_enc.grad)
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-3, atol=1e-4)
    acts = ours.encode(data())
    acts[:, : N // 2] = 0  # a change in place is not lost
    changed = theirs.encode(data())
    changed[:, : N // 2] = 0
    torch.testing.assert_close(ours.decode(acts), theirs.decode(changed), **CLOSE)
    late = ours.encode(data())
    ours.decode(late)
    with pytest.raises(RuntimeError, match="dense"):
        late.retain_grad()


def test_the_matryoshka_auxiliary_loss() -> None:
    theirs = make("MatryoshkaBatchTopK", use_matryoshka_aux_loss=True)
    ours = transcoder.accelerate(copy.deepcopy(theirs), always=True)
    mask = torch.arange(N) % 3 == 0
    left = step(theirs, data(), mask)
    with pytest.warns(DenseView):
        right = step(ours, data(), mask)
    torch.testing.assert_close(right.loss, left.loss, **CLOSE)


def test_what_cannot_be_accelerated_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Own(sae_lens.TopKTrainingSAE):  # type: ignore[misc, name-defined]
        def encode_with_hidden_pre(self, x: torch.Tensor) -> Any:
            return super().encode_with_hidden_pre(2 * x)

    with pytest.raises(TypeError, match="its own encode_with_hidden_pre"):
        transcoder.accelerate(Own(sae_lens.TopKTrainingSAEConfig(d_in=D, d_sae=N, k=K)), always=True)
    standard = sae_lens.StandardTrainingSAE(sae_lens.StandardTrainingSAEConfig(d_in=D, d_sae=N))
    with pytest.raises(TypeError, match="expected one of"):
        transcoder.accelerate(standard, always=True)
    with pytest.raises(TypeError, match="SAELens, sparsify or dictionary_learning"):
        transcoder.accelerate(torch.nn.Linear(2, 2), always=True)
    monkeypatch.setattr("importlib.metadata.version", lambda name: "7.0.0")
    with pytest.raises(PeerVersionError, match=r"tested with sae-lens 6\.54, found 7\.0\.0"):
        transcoder.accelerate(make("TopK"), always=True)
    assert isinstance(transcoder.accelerate(make("TopK"), allow_untested=True, always=True), sae_lens.TopKTrainingSAE)


def test_a_missing_part_is_named_with_the_tested_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.saes import topk_sae

    sae = make("TopK")
    monkeypatch.delattr(topk_sae, "TopKSAE")
    with pytest.raises(PeerVersionError, match=r"tested with sae-lens 6\.54, found .*a part is missing: .*TopKSAE"):
        transcoder.accelerate(sae)


def tokens() -> Any:
    from datasets import Dataset

    rows = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"tokens": rows.tolist()})


def tiny_model() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    config = HookedTransformerConfig(
        n_layers=1, d_model=D, n_ctx=16, d_head=8, n_heads=3, d_mlp=32, d_vocab=50, act_fn="relu", seed=0
    )
    return HookedTransformer(config)


def test_a_real_run_of_their_trainer(tmp_path: Path) -> None:
    """Their runner, their store, their trainer, with the accelerated SAE and with theirs: the same training."""
    saes = {}
    for name in ("theirs", "ours"):
        torch.manual_seed(0)
        sae = make("MatryoshkaBatchTopK")
        if name == "ours":
            quiet(sae)
        config = sae_lens.LanguageModelSAERunnerConfig(
            sae=sae.cfg,
            model_name="tiny",
            hook_name="blocks.0.hook_mlp_out",
            dataset_path="",
            is_dataset_tokenized=True,
            streaming=False,
            context_size=16,
            training_tokens=64 * 20,
            train_batch_size_tokens=64,
            store_batch_size_prompts=8,
            n_batches_in_buffer=4,
            lr=1e-3,
            dead_feature_window=2,
            prepend_bos=False,
            device="cpu",
            seed=0,
            n_checkpoints=0,
            checkpoint_path=str(tmp_path / name),
            output_path=str(tmp_path / name / "final"),
            logger=sae_lens.LoggingConfig(log_to_wandb=False),
            verbose=False,
        )
        runner = sae_lens.LanguageModelSAETrainingRunner(
            config, override_dataset=tokens(), override_model=tiny_model(), override_sae=sae
        )
        torch.manual_seed(1)
        saes[name] = runner.run()
    x = data()
    torch.testing.assert_close(saes["ours"](x), saes["theirs"](x), rtol=1e-2, atol=1e-3)
    plain = SAE.load_from_disk(tmp_path / "ours" / "final")
    assert type(plain) is sae_lens.JumpReLUSAE


@pytest.mark.parametrize("kind", KINDS)
def test_decode_takes_the_decoder_of_now(kind: str) -> None:
    base = make(kind)
    found = []
    for quick in (False, True):
        one, other, folded, stepped = (copy.deepcopy(base) for _ in range(4))
        with torch.no_grad():
            other.W_dec.data.mul_(torch.linspace(0.3, 3, N)[:, None])
            if quick:
                for sae in (one, other, folded, stepped):
                    transcoder.accelerate(sae, always=True)
            outs = [other.decode(one.encode(data()))]
            acts = folded.encode(data())
            folded.fold_W_dec_norm()
            outs.append(folded.decode(acts))
            acts = stepped.encode(data())
            stepped.W_dec.data.mul_(torch.linspace(0.3, 3, N)[:, None])
            outs.append(stepped.decode(acts))
        found.append(outs)
    torch.testing.assert_close(found[1], found[0], **CLOSE)


def test_modules_and_hooks_in_the_way_are_run() -> None:
    class Twice(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    def post(sae: Any) -> None:
        sae.hook_sae_acts_post = Twice()

    def pre(sae: Any) -> None:
        sae.hook_sae_acts_pre = Twice()

    def activation(sae: Any) -> None:
        sae.activation_fn.register_forward_hook(lambda module, given, out: 2 * out)

    for change in (post, pre, activation):
        theirs = make("TopK")
        ours = transcoder.accelerate(copy.deepcopy(theirs), always=True)
        change(theirs)
        change(ours)
        torch.testing.assert_close(ours(data()), theirs(data()), **CLOSE)


def test_a_latent_without_a_decoder_and_no_rows() -> None:
    theirs = make("BatchTopK")
    theirs.W_dec.data[:60] = 0
    ours = transcoder.accelerate(copy.deepcopy(theirs), always=True)
    torch.testing.assert_close(ours.encode(data()).dense(), theirs.encode(data()), **CLOSE)
    torch.testing.assert_close(ours(data()), theirs(data()), **CLOSE, equal_nan=True)
    assert ours.encode(data(0)).shape == (0, N)
