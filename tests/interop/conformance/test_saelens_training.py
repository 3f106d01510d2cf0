"""Our transcoders inside SAELens: registry, runner, trainer, files that it loads by itself; its store inside our trainer."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed here: python tests/interop/run.py saelens")

from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput  # noqa: E402
from sae_lens.training.sae_trainer import SAETrainer  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from transcoder import RunConfig, train_transcoder  # noqa: E402
from transcoder.interop import saelens_training as ours  # noqa: E402
from transcoder.interop.accelerate import PeerVersionError  # noqa: E402
from transcoder.interop.formats import ChangedFunctionError, read_transcoder  # noqa: E402

from .makers import global_state  # noqa: E402

D_IN, D_OUT, N, K = 24, 20, 96, 5
SOURCE, TARGET = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


def config(kind: str, d_out: int = D_OUT, **settings: Any) -> Any:
    if kind.startswith("Matryoshka"):
        settings = {"matryoshka_widths": [8, 40, N], **settings}
    return getattr(ours, f"{kind}TranscoderConfig")(d_in=D_IN, d_out=d_out, d_sae=N, k=K, **settings)


def tiny_model() -> Any:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    return HookedTransformer(
        HookedTransformerConfig(
            n_layers=1, d_model=D_IN, n_ctx=16, d_head=8, n_heads=3, d_mlp=32, d_vocab=50, act_fn="relu", seed=0
        )
    )


def runner_config(sae: Any, folder: Path, **settings: Any) -> Any:
    defaults = {"training_tokens": 64 * 60, "n_checkpoints": 0, "output_path": str(folder / "final")}
    values: dict[str, Any] = {**defaults, **settings}
    return sae_lens.LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny",
        hook_name=SOURCE,
        dataset_path="",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=16,
        train_batch_size_tokens=64,
        store_batch_size_prompts=8,
        n_batches_in_buffer=4,
        lr=3e-3,
        dead_feature_window=20,
        prepend_bos=False,
        device="cpu",
        checkpoint_path=str(folder / "checkpoints"),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        verbose=False,
        **values,
    )


def dataset() -> Any:
    from datasets import Dataset

    rows = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"tokens": rows.tolist()})


def runner(sae: Any, folder: Path, **settings: Any) -> Any:
    cfg = runner_config(sae, folder, **settings)
    return ours.TranscoderTrainingRunner(cfg, TARGET, override_dataset=dataset(), override_model=tiny_model())


KINDS = ["TopK", "BatchTopK", "MatryoshkaBatchTopK"]


@pytest.mark.parametrize("always", [True, False])
@pytest.mark.parametrize("skip", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_are_those_of_plain_autograd(kind: str, skip: bool, always: bool) -> None:
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(config(kind, skip=skip).to_dict())
    assert type(sae) is getattr(ours, f"{kind}Transcoder")
    sae.__dict__["_transcoder_always"] = always
    x, y = torch.randn(33, D_IN), torch.randn(33, D_OUT)
    if skip:
        torch.nn.init.normal_(sae.W_skip, std=0.1)
    step = TrainStepInput(torch.cat([x, y], 1), {}, torch.arange(N) >= N - 7, 0, False)
    out = sae.training_forward_pass(step)
    out.loss.backward()
    W_enc, W_dec = (p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec))
    W_skip = (sae.W_skip.detach().clone() if skip else torch.zeros(D_OUT, D_IN)).requires_grad_()
    pre = (x @ W_enc) * W_dec.norm(dim=1)
    if kind == "TopK":
        kept = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0)
    else:
        kept = torch.zeros(pre.numel()).scatter(0, pre.flatten().topk(K * 33).indices, 1.0).view_as(pre)
    acts = pre.relu() * kept
    levels = [8, 40, N] if kind.startswith("Matryoshka") else [N]
    # The skip connection is in every prefix.
    recons = [acts[:, :w] / W_dec[:w].norm(dim=1) @ W_dec[:w] + x @ W_skip.T for w in levels]
    loss = sum((r - y).square().sum(1).mean() for r in recons)
    dead = pre[:, -7:] / W_dec[-7:].norm(dim=1) @ W_dec[-7:]
    loss = loss + 7 / (D_OUT // 2) * (dead - (y - recons[-1]).detach()).square().sum(1).mean()
    loss.backward()
    pairs = [(out.loss, loss), (sae.W_enc.grad, W_enc.grad), (sae.W_dec.grad, W_dec.grad)]
    pairs += [(sae.W_skip.grad, W_skip.grad)] if skip else []
    # What SAELens logs as explained variance is of the target and of the whole output.
    pairs += [(out.sae_in, y), (out.sae_out, recons[-1])]
    for found, wanted in pairs:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
    if kind == "TopK":
        torch.testing.assert_close(sae(x), out.sae_out, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"24 \+ 20 wide, got 24; train with TranscoderTrainingRunner"):
        sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))


CHANGED = {"allow_changed_function": True}
SAVED: list[tuple[str, str | None, dict[str, Any]]] = [
    ("TopK", None, CHANGED),
    ("TopK", "topk", {}),
    ("TopK", "skip_transcoder", {"skip": True, **CHANGED}),
    ("BatchTopK", None, {}),
    ("BatchTopK", "transcoder", CHANGED),
    ("MatryoshkaBatchTopK", None, {"skip": True}),
]


@pytest.mark.parametrize(("kind", "saved", "settings"), SAVED)
def test_a_run_of_their_runner_and_the_files_it_saves(
    kind: str, saved: str | None, settings: dict[str, Any], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    training = runner(config(kind, D_IN, inference_architecture=saved, **settings), tmp_path, n_checkpoints=1)
    first = next(training.activations_store)
    x, y = first[:, :D_IN], first[:, D_IN:]
    before = (training.sae(x) - y).square().mean()
    sae = training.run()
    assert (sae(x) - y).square().mean() < 0.5 * before
    plain = SAE.load_from_disk(tmp_path / "final")
    skip = settings.get("skip", False)
    name = saved or ("jumprelu_skip_transcoder" if skip else "jumprelu_transcoder")
    assert plain.cfg.architecture() == name
    assert type(plain).__module__.startswith("sae_lens.")
    assert (plain.cfg.metadata.hook_name, plain.cfg.metadata.hook_name_out) == (SOURCE, TARGET)
    # Another function than the trained one only where it was asked for: TopK's one threshold, a ReLU's shrunken activations.
    record = json.loads((tmp_path / "final" / "conversion.json").read_text())
    assert record["function"] == ("changed" if settings.get("allow_changed_function") else "same up to rounding")
    assert (plain(x) - y).square().mean() < (1.0 if record["function"] == "changed" else 0.6) * before
    norms = sae.W_dec.norm(dim=1)
    pre = (x @ sae.W_enc + sae.b_enc) * norms
    limit = sae.topk_threshold.float()
    if name == "topk":
        acts = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, pre.topk(K).values.relu())
    else:
        acts = torch.where(pre > limit, pre if name.startswith("jumprelu") else pre - limit, 0.0)
    wanted = acts / norms @ sae.W_dec + sae.b_dec + (x @ sae.W_skip.T if skip else 0)
    torch.testing.assert_close(plain(x), wanted, rtol=1e-3, atol=1e-4)
    # The same folder, and a checkpoint of the training, without SAELens.
    imported = read_transcoder("saelens", tmp_path / "final").transcoder
    torch.testing.assert_close(imported(x), wanted, rtol=1e-3, atol=1e-4)
    (checkpoint,) = (tmp_path / "checkpoints").rglob("trainer_state.pt")
    found = read_transcoder("saelens", checkpoint.parent)
    assert (found.hooks.source, found.hooks.target) == (SOURCE, TARGET)
    assert found.transcoder.config.k == K
    assert found.transcoder.widths == ((8, 40, N) if kind.startswith("Matryoshka") else (N,))
    again = TrainingSAE.load_from_disk(checkpoint.parent)
    assert type(again) is type(sae)
    assert not torch.equal(again.W_enc, sae.W_enc)
    if kind == "TopK":
        torch.testing.assert_close(found.transcoder(x), again(x), rtol=1e-3, atol=1e-4)
    else:
        again.cfg.inference_architecture = None
        again.save_inference_model(tmp_path / "halfway")
        halfway = SAE.load_from_disk(tmp_path / "halfway")
        torch.testing.assert_close(found.transcoder(x), halfway(x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["TopK", "MatryoshkaBatchTopK"])
def test_their_runner_resumes_a_checkpoint(kind: str, tmp_path: Path) -> None:
    sae = config(kind, D_IN, skip=True, **(CHANGED if kind == "TopK" else {}))
    torch.manual_seed(0)
    runner(sae, tmp_path, n_checkpoints=1, training_tokens=64 * 10).run()
    (state,) = (tmp_path / "checkpoints").rglob("trainer_state.pt")
    kept = load_file(state.parent / "sae_weights.safetensors")
    settings = {"resume_from_checkpoint": str(state.parent), "training_tokens": torch.load(state)["n_training_samples"]}
    # With nothing left to train, what was resumed is what was saved, its tracked threshold too.
    resumed = runner(sae, tmp_path / "nothing-left", **settings).run()
    for name, tensor in kept.items():
        assert torch.equal(resumed.state_dict()[name], tensor), name
    assert float(resumed.topk_threshold) > 0
    # With steps left, Adam and the schedule go on where they were.
    settings["training_tokens"] = 64 * 10
    last = runner(sae, tmp_path / "on", **settings, save_final_checkpoint=True).run()
    (after,) = (tmp_path / "on" / "checkpoints").rglob("trainer_state.pt")
    assert torch.load(after)["n_training_samples"] == 64 * 10
    assert {float(s["step"]) for s in torch.load(after)["optimizer"]["state"].values()} == {10.0}
    assert not torch.equal(last.W_enc, kept["W_enc"])
    # A new training from it (`from_pretrained_path`): SAELens loads the threshold in the weights' type, and it goes on too.
    afresh = runner(sae, tmp_path / "new", from_pretrained_path=str(state.parent), training_tokens=64 * 3).run()
    assert 0 < abs(float(afresh.topk_threshold) - float(kept["topk_threshold"])) < float(kept["topk_threshold"])


def test_what_changes_the_function_is_refused_before_training(tmp_path: Path) -> None:
    for kind, settings, message in (
        ("TopK", {}, "inference_architecture='topk' keeps it"),
        ("BatchTopK", {"inference_architecture": "transcoder"}, "it has no thresholds"),
    ):
        asked = config(kind, D_IN, **settings)
        with pytest.raises(ChangedFunctionError, match=message):
            runner(asked, tmp_path)
        runner(asked, tmp_path, output_path=None)
        sae = TrainingSAE.from_dict(asked.to_dict())
        with pytest.raises(ChangedFunctionError, match="allow_changed_function=True"):
            sae.save_inference_model(tmp_path / "no")
        assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("hooks", ["two", "one"])
def test_their_store_feeds_our_trainer(hooks: str, tmp_path: Path) -> None:
    """Two hooks through ours, and SAELens' own ActivationsStore, whose rows are source and target both."""
    if hooks == "two":
        cfg = runner_config(config("BatchTopK", d_out=D_IN), tmp_path)
        store: Any = ours.PairedActivationsStore.reading(tiny_model(), cfg, TARGET, dataset())
    else:
        cfg = runner_config(sae_lens.TopKTrainingSAEConfig(d_in=D_IN, d_sae=N, k=K), tmp_path)
        store = sae_lens.ActivationsStore.from_config(tiny_model(), cfg, override_dataset=dataset())
    settings = {
        "transcoder.d_sae": N,
        "transcoder.k": K,
        "transcoder.widths": [8, 40, N],
        "training.steps": 30,
        "training.batch_size": 64,
        "antidup.positions.enabled": False,
        "logging.progress": False,
    }
    run = RunConfig.load("demo", settings)
    result = train_transcoder(run, tmp_path / "run", batches=ours.activation_batches(store, D_IN))
    assert result.summary["finished"]


def test_their_trainer_takes_pairs_from_anywhere(tmp_path: Path) -> None:
    """SAETrainer without a language model: batches of pairs, or dicts by hook name as its multi-hook loader gives them."""
    generator = torch.Generator().manual_seed(0)
    mix = 0.1 * torch.randn(D_IN, D_OUT, generator=generator)

    def batches() -> Iterator[Any]:
        while True:
            x = torch.randn(64, D_IN, generator=generator)
            yield {"in": x, "out": x @ mix}

    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(config("MatryoshkaBatchTopK", skip=True).to_dict())
    cfg = runner_config(sae.cfg, tmp_path, training_tokens=64 * 120, output_path=None).to_sae_trainer_config()
    trainer: Any = SAETrainer(cfg, sae, ours.paired(batches(), "in", "out"))
    trainer.fit()
    # The target is linear in the source: the skip connection learns it.
    pair = next(batches())
    assert (sae(pair["in"]) - pair["out"]).square().mean() < 0.2 * pair["out"].square().mean()


def test_settings_that_a_transcoder_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="apply_b_dec_to_input"):
        config("TopK", apply_b_dec_to_input=True)
    with pytest.raises(ValueError, match="normalize_activations"):
        config("BatchTopK", normalize_activations="layer_norm")
    with pytest.raises(ValueError, match="d_out"):
        config("TopK", d_out=0)
    with pytest.raises(ValueError, match="expected jumprelu_skip_transcoder, skip_transcoder"):
        config("BatchTopK", skip=True, inference_architecture="transcoder")
    for settings in ({}, {"d_out": D_IN, "skip": True}):
        with pytest.raises(ValueError, match="inference_architecture"):
            config("TopK", inference_architecture="topk", **settings)
    sae = TrainingSAE.from_dict(config("BatchTopK").to_dict())
    sae.use_error_term = True
    with pytest.raises(ValueError, match="use_error_term"):
        sae(torch.zeros(2, D_IN))


def test_the_registry_has_three_more_and_nothing_else_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY
    from sae_lens.saes.topk_sae import TopKTrainingSAE

    mine = {name for name, (cls, _) in SAE_TRAINING_CLASS_REGISTRY.items() if cls.__module__.startswith("transcoder")}
    assert mine == {"topk_transcoder", "batchtopk_transcoder", "matryoshka_batchtopk_transcoder"}
    assert SAE_TRAINING_CLASS_REGISTRY["topk"][0] is TopKTrainingSAE
    assert not any(cls.__module__.startswith("transcoder") for cls, _ in SAE_CLASS_REGISTRY.values())
    before = global_state("sae_lens")
    # Imported once more: the same entries. With another version or without a part: which ones were tested.
    monkeypatch.delitem(sys.modules, ours.__name__)
    importlib.import_module(ours.__name__)
    assert global_state("sae_lens") == before
    for target, value in (("importlib.metadata.version", lambda name: "7.0.0"), ("sae_lens.saes.transcoder", None)):
        with monkeypatch.context() as broken:
            broken.delitem(sys.modules, ours.__name__)
            if value is None:
                broken.delattr(f"{target}.SkipTranscoderConfig")
            else:
                broken.setattr(target, value)
            with pytest.raises(PeerVersionError, match=r"saelens_training: tested with sae-lens 6\.54, found"):
                importlib.import_module(ours.__name__)
