"""Our transcoders inside SAELens: registry, runner, trainer, files that it loads by itself; its store inside our trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed here: python tests/interop/run.py saelens")

from sae_lens.saes.sae import SAE, TrainingSAE, TrainStepInput  # noqa: E402

from transcoder import RunConfig, train_transcoder  # noqa: E402
from transcoder.interop import saelens_training as ours  # noqa: E402

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


def runner_config(sae: Any, folder: Path) -> Any:
    return sae_lens.LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="tiny",
        hook_name=SOURCE,
        dataset_path="",
        is_dataset_tokenized=True,
        streaming=False,
        context_size=16,
        training_tokens=64 * 60,
        train_batch_size_tokens=64,
        store_batch_size_prompts=8,
        n_batches_in_buffer=4,
        lr=3e-3,
        dead_feature_window=20,
        prepend_bos=False,
        device="cpu",
        n_checkpoints=0,
        checkpoint_path=str(folder / "checkpoints"),
        output_path=str(folder / "final"),
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        verbose=False,
    )


def dataset() -> Any:
    from datasets import Dataset

    rows = torch.randint(0, 50, (64, 16), generator=torch.Generator().manual_seed(0))
    return Dataset.from_dict({"tokens": rows.tolist()})


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "MatryoshkaBatchTopK"])
def test_losses_and_gradients_are_those_of_plain_autograd(kind: str) -> None:
    torch.manual_seed(0)
    sae = TrainingSAE.from_dict(config(kind).to_dict())
    assert type(sae) is getattr(ours, f"{kind}Transcoder")
    x, y = torch.randn(33, D_IN), torch.randn(33, D_OUT)
    step = TrainStepInput(torch.cat([x, y], 1), {}, torch.arange(N) >= N - 7, 0, False)
    out = sae.training_forward_pass(step)
    out.loss.backward()
    W_enc, W_dec = (p.detach().clone().requires_grad_() for p in (sae.W_enc, sae.W_dec))
    pre = (x @ W_enc) * W_dec.norm(dim=1)
    if kind == "TopK":
        kept = torch.zeros_like(pre).scatter(1, pre.topk(K).indices, 1.0)
    else:
        kept = torch.zeros(pre.numel()).scatter(0, pre.flatten().topk(K * 33).indices, 1.0).view_as(pre)
    acts = pre.relu() * kept
    levels = [8, 40, N] if kind.startswith("Matryoshka") else [N]
    recons = [acts[:, :w] / W_dec[:w].norm(dim=1) @ W_dec[:w] for w in levels]
    loss = sum((r - y).square().sum(1).mean() for r in recons)
    dead = pre[:, -7:] / W_dec[-7:].norm(dim=1) @ W_dec[-7:]
    loss = loss + 7 / (D_OUT // 2) * (dead - (y - recons[-1]).detach()).square().sum(1).mean()
    loss.backward()
    torch.testing.assert_close(out.loss, loss, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_enc.grad, W_enc.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(sae.W_dec.grad, W_dec.grad, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"24 \+ 20 wide, got 24; train with TranscoderTrainingRunner"):
        sae.training_forward_pass(TrainStepInput(x, {}, None, 0, False))


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "MatryoshkaBatchTopK"])
def test_a_run_of_their_runner_and_the_file_it_saves(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    cfg = runner_config(config(kind, d_out=D_IN), tmp_path)
    runner = ours.TranscoderTrainingRunner(cfg, TARGET, override_dataset=dataset(), override_model=tiny_model())
    first = next(runner.activations_store)
    x, y = first[:, :D_IN], first[:, D_IN:]
    before = (runner.sae(x) - y).square().mean()
    sae = runner.run()
    assert (sae(x) - y).square().mean() < 0.5 * before
    plain = SAE.load_from_disk(tmp_path / "final")
    assert type(plain) is sae_lens.saes.transcoder.JumpReLUTranscoder
    assert plain.cfg.metadata.hook_name == SOURCE
    assert plain.cfg.metadata.hook_name_out == TARGET
    # TopK's one threshold only approximates k a token.
    assert (plain(x) - y).square().mean() < (1.0 if kind == "TopK" else 0.6) * before
    if kind != "TopK":
        # One threshold in the place of the batch's: the same function of the pre-activations above it.
        pre = (x @ sae.W_enc + sae.b_enc) * sae.W_dec.norm(dim=1)
        acts = torch.where(pre > sae.topk_threshold, pre, 0.0) / sae.W_dec.norm(dim=1)
        torch.testing.assert_close(plain(x), acts @ sae.W_dec + sae.b_dec, rtol=1e-3, atol=1e-4)


def test_their_store_feeds_our_trainer(tmp_path: Path) -> None:
    cfg = runner_config(config("BatchTopK", d_out=D_IN), tmp_path)
    store = ours.PairedActivationsStore.reading(tiny_model(), cfg, TARGET, dataset())
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


def test_settings_that_a_transcoder_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="apply_b_dec_to_input"):
        config("TopK", apply_b_dec_to_input=True)
    with pytest.raises(ValueError, match="normalize_activations"):
        config("BatchTopK", normalize_activations="layer_norm")
    with pytest.raises(ValueError, match="d_out"):
        config("TopK", d_out=0)
