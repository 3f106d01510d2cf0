"""Layouts of published weights, and of what trainers leave, made here by hand: each against its library's formula."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from transcoder import Transcoder, TranscoderConfig, export_transcoder
from transcoder.cli import main
from transcoder.interop.formats import ChangedFunctionError, read_transcoder

D, N, K = 6, 20, 4
X = 2 * torch.randn(64, D, generator=torch.Generator().manual_seed(1)) + 1
GEMMA_2 = {
    "hf_hook_point_in": "model.layers.5.pre_feedforward_layernorm.output",
    "hf_hook_point_out": "model.layers.5.post_feedforward_layernorm.output",
    "width": N,
    "model_name": "gemma-v3-1b-pt",
    "architecture": "jump_relu",
    "l0": 20,
    "type": "transcoder",
}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-4, atol=1e-5)


def top_k(acts: Tensor, k: int = K) -> Tensor:
    chosen = acts.topk(k, dim=-1)
    return torch.zeros_like(acts).scatter(-1, chosen.indices, chosen.values)


def write(
    folder: Path, tensors: dict[str, Any], config: dict[str, Any] | None, file: str, name: str = "config.json"
) -> Path:
    (folder / file).parent.mkdir(parents=True, exist_ok=True)
    (save_file if file.endswith(".safetensors") else torch.save)(tensors, folder / file)
    if config is not None:
        (folder / name).write_text(json.dumps(config), encoding="utf-8")
    return folder


def gemma_2(affine: bool = False) -> dict[str, Tensor]:
    tensors = {"w_enc": draw(D, N), "w_dec": draw(N, D), "b_enc": draw(N), "b_dec": draw(D)}
    tensors["threshold"] = torch.linspace(0, 1, N)
    return tensors | ({"affine_skip_connection": draw(D, D)} if affine else {})


# --- Gemma Scope 2 ---


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("config", [GEMMA_2, None])
@torch.no_grad()
def test_gemma_scope_2(affine: bool, config: dict[str, Any] | None, tmp_path: Path) -> None:
    w = gemma_2(affine)
    folder = tmp_path / "gemma-scope-2-1b-pt" / "transcoder_all" / "layer_5_width_16k_l0_small"
    write(folder, w, config and {**config, "affine_connection": affine}, "params.safetensors")
    for path in (folder, folder / "params.safetensors", tmp_path):
        found = read_transcoder("gemma-scope", path)
        pre = X @ w["w_enc"] + w["b_enc"]
        want = ((pre > w["threshold"]) * pre.relu()) @ w["w_dec"] + w["b_dec"]
        check(found.transcoder(X), want + (X @ w["affine_skip_connection"] if affine else 0))
        assert found.hooks.source == "blocks.5.mlp.hook_in"
        assert found.hooks.target == "blocks.5.hook_mlp_out"
        assert found.hooks.model_name == "google/gemma-3-1b-pt"
        assert found.transcoder.config.k == (20 if config else N)


@pytest.mark.parametrize(
    ("place", "config", "hooks"),
    [
        ("layer_9/mlp_out_x/transcoder/layer_5_width_16k", None, ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")),
        ("attn_out_all/layer_5_width_16k_l0_small", None, ("blocks.5.attn.hook_z", "blocks.5.attn.hook_z")),
        ("resid_post/layer_5_width_16k_l0_small", None, ("blocks.5.hook_resid_post", "blocks.5.hook_resid_post")),
        ("x", {"hf_hook_point_in": "model.layers.3.output", "type": "sae"}, ("blocks.3.hook_resid_post",) * 2),
        (
            "x",
            {
                "hf_hook_point_in": "model.language_model.layers.3.pre_feedforward_layernorm.output",
                "type": "transcoder",
            },
            ("blocks.3.mlp.hook_in", "blocks.3.hook_mlp_out"),
        ),
        ("x", {**GEMMA_2}, ("blocks.5.mlp.hook_in", "blocks.5.hook_mlp_out")),
    ],
)
def test_where_gemma_scope_2_belongs(
    place: str, config: dict[str, Any] | None, hooks: tuple[str, str], tmp_path: Path
) -> None:
    write(tmp_path / place, gemma_2(), config, "params.safetensors")
    found = read_transcoder("gemma-scope", tmp_path / place)
    assert (found.hooks.source, found.hooks.target) == hooks


@torch.no_grad()
def test_gemma_scope_2_at_the_norm_before_its_weight(tmp_path: Path) -> None:
    w, norm = gemma_2(True), 1 + draw(D)
    write(tmp_path / "layer_5", w, None, "params.safetensors")
    own = read_transcoder("gemma-scope", tmp_path).transcoder
    options = {"source_hook": "blocks.5.ln2.hook_normalized", "norm_weight": norm}
    moved = read_transcoder("gemma-scope", tmp_path, **options)
    check(moved.transcoder(X), own(X * norm))
    assert moved.hooks.source == "blocks.5.ln2.hook_normalized"


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"w_dec": draw(N, 3, D)},
            None,
            r"one layer of a cross-layer transcoder \(w_dec \[20, 3, 6\]\).*transcoder_all",
        ),
        ({"w_enc": draw(3, D, N)}, None, "a crosscoder"),
        ({}, {**GEMMA_2, "affine_connection": True}, "affine_connection: expected False"),
        ({}, {**GEMMA_2, "architecture": "topk"}, "architecture: expected jump_relu"),
        ({}, {**GEMMA_2, "width": 7}, "width = 7, the weights have 20"),
    ],
)
def test_gemma_scope_2_that_is_something_else(
    tensors: dict[str, Tensor], config: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    write(tmp_path / "layer_5", {**gemma_2(), **tensors}, config, "params.safetensors")
    with pytest.raises(ValueError, match=rf"gemma-scope import: .*{message}"):
        read_transcoder("gemma-scope", tmp_path)


@pytest.mark.parametrize(
    ("place", "hook"),
    [
        ("gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_82", "hook_resid_post"),
        ("gemma-scope-2b-pt-att/layer_3/width_16k/average_l0_82", "attn.hook_z"),
        ("gemma-scope-2b-pt-mlp/layer_3/width_16k/average_l0_82", "hook_mlp_out"),
    ],
)
def test_an_autoencoder_of_gemma_scope_has_its_own_hook(place: str, hook: str, tmp_path: Path) -> None:
    (tmp_path / place).mkdir(parents=True)
    arrays = {"W_enc": draw(D, N), "W_dec": draw(N, D), "b_enc": draw(N), "b_dec": draw(D), "threshold": draw(N).abs()}
    numpy.savez(tmp_path / place / "params.npz", **{name: tensor.numpy() for name, tensor in arrays.items()})
    found = read_transcoder("gemma-scope", tmp_path)
    assert found.hooks.source == found.hooks.target == f"blocks.3.{hook}"
    assert found.transcoder.config.k == N  # L0 of more latents than there are here


# --- Llama Scope and its library ---


def linear() -> dict[str, Tensor]:
    return {
        "encoder.weight": draw(N, D),
        "encoder.bias": draw(N),
        "decoder.weight": draw(D, N),
        "decoder.bias": draw(D),
    }


@pytest.mark.parametrize("decoder_norm", [False, True])
@pytest.mark.parametrize("transcodes", [False, True])
@torch.no_grad()
def test_llama_scope(decoder_norm: bool, transcodes: bool, tmp_path: Path) -> None:
    """As its own loader does it: the dataset's norms into the weights, then the decoder's, then one threshold."""
    w = linear()
    config = {
        "hook_point_in": "blocks.3.ln2.hook_normalized" if transcodes else "blocks.3.hook_resid_post",
        "hook_point_out": "blocks.3.hook_mlp_out" if transcodes else "blocks.3.hook_resid_post",
        "d_model": D,
        "d_sae": N,
        "act_fn": "topk",
        "top_k": 50,
        "jump_relu_threshold": 0.3,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 5.0, "out": 3.0 if transcodes else 5.0},
        "sparsity_include_decoder_norm": decoder_norm,
        "use_decoder_bias": True,
        "apply_decoder_bias_to_pre_encoder": not transcodes,
    }
    write(tmp_path, w, config, "checkpoints/final.safetensors", "hyperparams.json")
    f_in, f_out = (math.sqrt(D) / config["dataset_average_activation_norm"][side] for side in ("in", "out"))  # type: ignore[index]
    b_dec, W_dec = w["decoder.bias"] / f_out, w["decoder.weight"].T * f_in / f_out
    norms = W_dec.norm(dim=1) if decoder_norm else torch.ones(N)
    read = X if transcodes else X - b_dec
    pre = (read @ w["encoder.weight"].T + w["encoder.bias"] / f_in) * norms
    want = torch.where(pre > 0.3, pre, 0.0) @ (W_dec / norms[:, None]) + b_dec
    found = read_transcoder("llama-scope", tmp_path)
    check(found.transcoder(X), want)
    assert (found.hooks.source, found.hooks.target) == (config["hook_point_in"], config["hook_point_out"])


@pytest.mark.parametrize("act_fn", ["jumprelu", "topk", "relu", "batchtopk"])
@pytest.mark.parametrize("layout", ["R1-Distill", "today"])
@torch.no_grad()
def test_llama_scopes_library_today(act_fn: str, layout: str, tmp_path: Path) -> None:
    w = linear() if layout == "R1-Distill" else {"W_E": draw(D, N), "b_E": draw(N), "W_D": draw(N, D), "b_D": draw(D)}
    hook_in, hook_out = "blocks.2.ln2.hook_normalized", "blocks.2.hook_mlp_out"
    norms = {hook_in: 5.0, hook_out: 3.0}
    state = {**w, **{f"dataset_average_activation_norm.{hook}": torch.tensor(norm) for hook, norm in norms.items()}}
    if act_fn == "jumprelu":
        state["log_jumprelu_threshold" if layout == "R1-Distill" else "activation_function.log_jumprelu_threshold"] = (
            draw(N) - 1
        )
    config = {"sae_type": "sae", "hook_point_in": hook_in, "hook_point_out": hook_out, "d_model": D, "act_fn": act_fn}
    config |= {"top_k": K, "norm_activation": "dataset-wise", "sparsity_include_decoder_norm": True}
    write(tmp_path, state, config, "sae_weights.safetensors")
    f_in, f_out = math.sqrt(D) / 5.0, math.sqrt(D) / 3.0
    W_enc, W_dec = (w["encoder.weight"].T, w["decoder.weight"].T) if layout == "R1-Distill" else (w["W_E"], w["W_D"])
    b_enc, b_dec = (w["encoder.bias"], w["decoder.bias"]) if layout == "R1-Distill" else (w["b_E"], w["b_D"])
    scored = ((X * f_in) @ W_enc + b_enc) * W_dec.norm(dim=1)
    options: dict[str, Any] = {}
    if act_fn == "jumprelu":
        kept = torch.where(scored > (draw(N) - 1).exp(), scored, 0.0)
    elif act_fn == "topk":
        kept = top_k(scored.relu())
    elif act_fn == "relu":
        kept = scored.relu()
    else:
        with pytest.raises(ChangedFunctionError, match=r"without a tracked threshold.*--threshold"):
            read_transcoder("llama-scope", tmp_path)
        options, kept = {"threshold": 0.7}, torch.where(scored > 0.7, scored, 0.0)
    want = ((kept / W_dec.norm(dim=1)) @ W_dec + b_dec) / f_out
    found = read_transcoder("llama-scope", tmp_path, **options)
    check(found.transcoder(X), want)
    assert found.record.function == "same up to rounding"


def test_llama_scope_that_is_something_else(tmp_path: Path) -> None:
    base = {"sae_type": "sae", "hook_point_in": "a", "act_fn": "relu", "norm_activation": "inference"}
    for values, message in (
        ({"sae_type": "clt"}, "sae_type: expected 'sae'"),
        ({"use_glu_encoder": True}, "use_glu_encoder"),
        ({"norm_activation": "dataset-wise"}, "dataset_average_activation_norm: expected the mean norm at a"),
        ({"norm_activation": "token-wise"}, "token-wise"),
        ({"act_fn": "jumprelu"}, "no log_jumprelu_threshold"),
        ({"act_fn": "topk"}, "top_k.*--k"),
    ):
        write(tmp_path, linear(), {**base, **values}, "sae_weights.safetensors")
        with pytest.raises(ValueError, match=f"llama-scope import: .*{message}"):
            read_transcoder("llama-scope", tmp_path)
    with pytest.raises(ValueError, match="only read"):
        export_transcoder(Transcoder(TranscoderConfig(D, D, N, K)), "llama-scope", tmp_path / "out")


# --- BatchTopK and matryoshka_sae ---


@pytest.mark.parametrize("kind", ["topk", "batchtopk", "batch-topk", "global-matryoshka-topk", "vanilla", "jumprelu"])
@torch.no_grad()
def test_the_repositories_that_the_original_grew_out_of(kind: str, tmp_path: Path) -> None:
    w = {"W_enc": draw(D, N), "b_enc": torch.zeros(N), "W_dec": draw(N, D), "b_dec": draw(D)}
    if kind in ("vanilla", "jumprelu"):
        w["b_enc"] = draw(N)
    state = dict(w)
    if kind == "jumprelu":
        state["jumprelu.log_threshold"] = draw(N) - 1
    if kind in ("batch-topk", "global-matryoshka-topk"):
        state["threshold"] = torch.tensor(0.4)
    config = {"model_name": "gpt2-small", "hook_point": "blocks.8.hook_resid_pre", "act_size": D, "dict_size": N}
    config |= {
        "top_k": K,
        "sae_type": kind,
        "input_unit_norm": "False",
        "dtype": "torch.float32",
        "group_sizes": "[5, 7, 8]",
    }
    write(tmp_path, state, config, "sae.pt")
    pre = ((X if kind == "jumprelu" else X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
    options: dict[str, Any] = {}
    if kind == "topk":
        kept = top_k(pre)
    elif kind == "vanilla":
        kept = pre
    elif kind == "jumprelu":
        kept = torch.where(pre > (draw(N) - 1).exp(), pre, 0.0)
    elif "threshold" in state:
        kept = torch.where(pre > 0.4, pre, 0.0)
    else:
        with pytest.raises(ChangedFunctionError, match=r"without a tracked threshold.*--threshold"):
            read_transcoder("original", tmp_path)
        check(
            read_transcoder("original", tmp_path, allow_changed_function=True).transcoder(X),
            top_k(pre) @ w["W_dec"] + w["b_dec"],
        )
        options, kept = {"threshold": 0.4}, torch.where(pre > 0.4, pre, 0.0)
    found = read_transcoder("original", tmp_path, **options)
    check(found.transcoder(X), kept @ w["W_dec"] + w["b_dec"])
    assert found.hooks.source == found.hooks.target == "blocks.8.hook_resid_pre"
    assert found.transcoder.widths == ((5, 12, N) if "matryoshka" in kind else (N,))


# --- dictionary_learning ---


def dictionary(**more: Tensor) -> dict[str, Tensor]:
    return {
        "encoder.weight": draw(N, D),
        "encoder.bias": draw(N),
        "decoder.weight": draw(D, N),
        "b_dec": draw(D),
        **more,
    }


def trainer(name: str, **values: Any) -> dict[str, Any]:
    return {"trainer": {"dict_class": name, "activation_dim": D, "dict_size": N, "k": K, **values}}


@torch.no_grad()
def test_dictionaries_without_a_threshold_or_k(tmp_path: Path) -> None:
    w = dictionary()
    write(tmp_path / "topk", w, trainer("AutoEncoderTopK"), "ae.pt")
    acts = top_k(((X - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu())
    check(
        read_transcoder("dictionary-learning", tmp_path / "topk").transcoder(X),
        acts @ w["decoder.weight"].T + w["b_dec"],
    )
    write(tmp_path / "no-k", w, trainer("AutoEncoderTopK", k=None), "ae.pt")
    with pytest.raises(ValueError, match="--k"):
        read_transcoder("dictionary-learning", tmp_path / "no-k")
    assert read_transcoder("dictionary-learning", tmp_path / "no-k", k=3).transcoder.config.k == 3
    write(tmp_path / "batch", w, trainer("<class 'dictionary_learning.trainers.BatchTopKSAE'>"), "ae.pt")
    with pytest.raises(ChangedFunctionError, match="without a tracked threshold"):
        read_transcoder("dictionary-learning", tmp_path / "batch")
    assert float(read_transcoder("dictionary-learning", tmp_path / "batch", threshold=0.5).transcoder.threshold) == 0.5


@torch.no_grad()
def test_states_that_a_training_leaves_on_its_way(tmp_path: Path) -> None:
    w = dictionary(k=torch.tensor(9, dtype=torch.int32), threshold=torch.tensor(0.5))
    root = tmp_path / "run"
    for number in (0, 1):
        for step in (500, 1000):
            write(root / f"trainer_{number}", w, trainer("BatchTopKSAE"), f"checkpoints/ae_{step}.pt")
    with pytest.raises(ValueError, match=r"run has no .*but trainer_0(/checkpoints)?, trainer_1(/checkpoints)? have"):
        read_transcoder("dictionary-learning", root)
    for path in (root / "trainer_0" / "checkpoints" / "ae_1000.pt", root / "trainer_0"):
        found = read_transcoder("dictionary-learning", path)
        # k was annealed, and on its way to the config's.
        assert found.transcoder.config.k == 9
        assert any("on its way" in what for what, _ in found.record.steps)
    # What an interrupted training keeps in ae.pt, for activations that were divided by norm_factor.
    whole = {"step": 3, "ae": w, "optimizer": {}, "config": trainer("BatchTopKSAE")["trainer"], "norm_factor": 2.0}
    write(tmp_path / "interrupted", whole, None, "ae.pt")
    pre = ((X / 2 - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    want = torch.where(pre > 0.5, pre, 0.0) @ w["decoder.weight"].T + w["b_dec"]
    check(read_transcoder("dictionary-learning", tmp_path / "interrupted").transcoder(X), 2 * want)


@torch.no_grad()
def test_files_of_other_publishers_without_a_config(tmp_path: Path) -> None:
    w = {"encoder_linear.weight": draw(N, D), "encoder_linear.bias": draw(N)}
    w |= {"decoder_linear.weight": draw(D, N), "decoder_linear.bias": draw(D)}
    file = write(tmp_path / "Llama-3.1-8B-Instruct-SAE-l19", w, None, "Llama-3.1-8B-Instruct-SAE-l19.pth")
    found = read_transcoder("dictionary-learning", file / "Llama-3.1-8B-Instruct-SAE-l19.pth")
    acts = (X @ w["encoder_linear.weight"].T + w["encoder_linear.bias"]).relu()
    check(found.transcoder(X), acts @ w["decoder_linear.weight"].T + w["decoder_linear.bias"])
    assert found.hooks.source == "blocks.19.hook_resid_post"
    w = {"W_enc": draw(N, D), "b_enc": draw(N), "W_dec": draw(D, N), "b_dec": draw(D)}
    folder = write(tmp_path / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}", w, None, "layer3.sae.pt")
    found = read_transcoder("dictionary-learning", folder / "layer3.sae.pt")
    check(found.transcoder(X), top_k((X @ w["W_enc"].T + w["b_enc"]).relu()) @ w["W_dec"].T + w["b_dec"])
    assert found.hooks.source == "blocks.3.hook_resid_post"


# --- circuit-tracer ---


def layer() -> dict[str, Tensor]:
    return {"W_enc": draw(N, D), "W_dec": draw(N, D, seed=3), "b_enc": draw(N), "b_dec": draw(D)}


@torch.no_grad()
def test_a_set_without_a_config_and_one_without_k(tmp_path: Path) -> None:
    w = layer()
    for number in (0, 1):
        write(tmp_path / "qwen3-14b", w, None, f"layer_{number}.safetensors")
    found = read_transcoder("circuit-tracer", tmp_path / "qwen3-14b", layer=1)
    check(found.transcoder(X), (X @ w["W_enc"].T + w["b_enc"]).relu() @ w["W_dec"] + w["b_dec"])
    assert found.hooks.source is None
    hooks = {"source_hook": "blocks.1.mlp.hook_in", "target_hook": "blocks.1.hook_mlp_out"}
    assert (
        read_transcoder("circuit-tracer", tmp_path / "qwen3-14b", layer=1, **hooks).hooks.source == hooks["source_hook"]
    )
    (tmp_path / "qwen3-14b" / "config.yaml").write_text(
        yaml.safe_dump({"model_kind": "transcoder_set", "activation": "topk"})
    )
    with pytest.raises(ValueError, match="--k"):
        read_transcoder("circuit-tracer", tmp_path / "qwen3-14b", layer=1)
    options = {"layer": 1, "k": 3, "allow_changed_function": True}
    assert read_transcoder("circuit-tracer", tmp_path / "qwen3-14b", **options).transcoder.config.k == 3


@torch.no_grad()
def test_a_set_that_lists_where_its_layers_are(tmp_path: Path) -> None:
    w, v = layer(), gemma_2()
    write(tmp_path / "files", w, None, "layer_0.safetensors")
    write(tmp_path / "files" / "layer_1", v, None, "params.safetensors")
    config: dict[str, Any] = {"model_kind": "transcoder_set", "model_name": "google/gemma-3-1b-pt"}
    config |= {"feature_input_hook": "mlp.hook_in", "feature_output_hook": "hook_mlp_out"}
    listed = [
        "files/layer_0.safetensors",
        "files/layer_1/params.safetensors",
        "hf://owner/missing/layer_2/params.npz?revision=x",
    ]
    for transcoders in (
        listed,
        [{"id": "x", "layer": n, "filepath": path} for n, path in reversed(list(enumerate(listed)))],
    ):
        (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "transcoders": transcoders}))
        with pytest.raises(ValueError, match=r"layer: expected one of \[0, 1, 2\]"):
            read_transcoder("circuit-tracer", tmp_path)
        found = read_transcoder("circuit-tracer", tmp_path, layer=0)
        check(found.transcoder(X), (X @ w["W_enc"].T + w["b_enc"]).relu() @ w["W_dec"] + w["b_dec"])
        found = read_transcoder("circuit-tracer", tmp_path / "config.yaml", layer=1)
        pre = X @ v["w_enc"] + v["b_enc"]
        check(found.transcoder(X), ((pre > v["threshold"]) * pre.relu()) @ v["w_dec"] + v["b_dec"])
        assert (found.hooks.source, found.hooks.model_name) == ("blocks.1.mlp.hook_in", "google/gemma-3-1b-pt")


def test_a_link_that_cannot_be_fetched_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    config = {"model_kind": "transcoder_set", "transcoders": ["hf://owner/missing/layer_0/params.npz"]}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(
        FileNotFoundError, match=r"hf://owner/missing/layer_0/params\.npz could not be fetched.*by hand"
    ):
        read_transcoder("circuit-tracer", tmp_path)


# --- sparsify ---


@pytest.mark.parametrize(
    ("name", "source", "target"),
    [
        ("layers.7.mlp", "blocks.7.mlp.hook_in", "blocks.7.mlp.hook_out"),
        ("h.7.attn", "blocks.7.attn.hook_in", "blocks.7.attn.hook_out"),
        ("model.layers.7.self_attn", "blocks.7.attn.hook_in", "blocks.7.attn.hook_out"),
        ("layers.7", "blocks.7.hook_resid_pre", "blocks.7.hook_resid_post"),
        ("layers.7.mlp.act_fn", None, None),
        ("embed_tokens", None, None),
    ],
)
def test_a_hookpoint_of_sparsify_is_a_pair_of_hooks(name: str, source: str, target: str, tmp_path: Path) -> None:
    w = {"encoder.weight": draw(N, D), "encoder.bias": draw(N), "W_dec": draw(N, D, seed=9), "b_dec": draw(D)}
    config = {"activation": "topk", "num_latents": N, "k": K, "transcode": True, "d_in": D}
    (tmp_path / "config.json").write_text('{"model": "EleutherAI/pythia-160m", "ctx_len": 2048}')
    write(tmp_path / name, w, config, "sae.safetensors", "cfg.json")
    found = read_transcoder("sparsify", tmp_path)
    assert (found.hooks.source, found.hooks.target) == (source, target)
    assert found.hooks.model_name == "EleutherAI/pythia-160m"
    # Out again, and in: under any folder's name.
    found.save(tmp_path / "in")
    export_transcoder(tmp_path / "in", "sparsify", tmp_path / "out")
    again = read_transcoder("sparsify", tmp_path / "out")
    assert (again.hooks.source, again.hooks.target, again.hooks.model_name) == (
        source,
        target,
        "EleutherAI/pythia-160m",
    )
    write(tmp_path / name, w, {**config, "transcode": False}, "sae.safetensors", "cfg.json")
    hooks = read_transcoder("sparsify", tmp_path / name).hooks
    assert hooks.source == hooks.target == ("hook_embed" if name == "embed_tokens" else target)


def test_a_run_of_sparsify_lists_what_is_inside(tmp_path: Path) -> None:
    w = {"encoder.weight": draw(N, D), "encoder.bias": draw(N), "W_dec": draw(N, D, seed=9), "b_dec": draw(D)}
    for number in (0, 2, 10):
        config = {"activation": "topk", "num_latents": N, "transcode": True, "d_in": D}
        write(tmp_path / f"layers.{number}.mlp", w, config, "sae.safetensors", "cfg.json")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp, layers\.2\.mlp, layers\.10\.mlp have: give one"):
        read_transcoder("sparsify", tmp_path)
    with pytest.raises(ValueError, match="--k"):
        read_transcoder("sparsify", tmp_path / "layers.2.mlp")
    assert read_transcoder("sparsify", tmp_path / "layers.2.mlp", k=5).transcoder.config.k == 5


# --- SAELens ---


@torch.no_grad()
def test_a_finetuned_sae_of_saelens_and_its_extra_files(tmp_path: Path) -> None:
    w = {"W_enc": draw(D, N), "b_enc": draw(N), "W_dec": draw(N, D), "b_dec": draw(D)}
    factor = 1 + draw(N)
    config = {
        "d_in": D,
        "d_sae": N,
        "hook_point": "blocks.8.hook_resid_pre",
        "activation_fn": "relu",
        "dtype": "torch.float32",
    }
    config |= {"model_name": "gpt2-small", "finetuning_scaling_factor": True}
    state = {
        **w,
        "scaling_factor": factor,
        "log_feature_sparsity": torch.zeros(N),
        "n_forward_passes_since_fired": torch.zeros(N),
    }
    write(tmp_path / "checkpoints" / "abc" / "final_500", state, config, "sae_weights.safetensors", "cfg.json")
    save_file({"sparsity": torch.zeros(N)}, tmp_path / "checkpoints" / "abc" / "final_500" / "sparsity.safetensors")
    found = read_transcoder("saelens", tmp_path)
    acts = ((X - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu() * factor
    check(found.transcoder(X), acts @ w["W_dec"] + w["b_dec"])
    assert any("n_forward_passes_since_fired" in what for what, _ in found.record.steps)


# --- any format ---


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "sae.", "model.module."])
@torch.no_grad()
def test_prefixes_of_wrappers_are_taken_off(prefix: str, tmp_path: Path) -> None:
    w = dictionary(k=torch.tensor(K), threshold=torch.tensor(0.5))
    plain = read_transcoder("dictionary-learning", write(tmp_path / "plain", w, trainer("BatchTopKSAE"), "ae.pt"))
    wrapped = {prefix + name: tensor for name, tensor in w.items()}
    for state in (wrapped, {"state_dict": wrapped, "epoch": 3}):
        found = read_transcoder(
            "dictionary-learning", write(tmp_path / "other", state, trainer("BatchTopKSAE"), "ae.pt")
        )
        assert torch.equal(found.transcoder(X), plain.transcoder(X))
    found = read_transcoder("dictionary-learning", write(tmp_path / "st", w, trainer("BatchTopKSAE"), "ae.safetensors"))
    assert torch.equal(found.transcoder(X), plain.transcoder(X))


def test_an_error_names_the_format_that_fits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "layer_5", gemma_2(), GEMMA_2, "params.safetensors")
    for name in ("saelens", "sparsify", "dictionary-learning", "original", "llama-scope"):
        assert main(["import", name, str(tmp_path), "--out", str(tmp_path / "out")]) == 2
        assert "These files are of the format gemma-scope: transcoder import gemma-scope" in capsys.readouterr().err
    write(
        tmp_path / "run", dictionary(k=torch.tensor(K), threshold=torch.tensor(0.5)), trainer("BatchTopKSAE"), "ae.pt"
    )
    with pytest.raises(FileNotFoundError, match="of the format dictionary-learning"):
        read_transcoder("saelens", tmp_path / "run")


def test_what_no_format_reads_is_told_apart(tmp_path: Path) -> None:
    Transcoder(TranscoderConfig(D, D, N, K)).save_pretrained(tmp_path / "own")
    with pytest.raises(FileNotFoundError, match=r"Transcoder\.from_pretrained reads as it is"):
        read_transcoder("saelens", tmp_path / "own")
    assert Transcoder.from_pretrained(tmp_path / "own" / "transcoder.safetensors").config.d_sae == N
    write(tmp_path / "clt", {"W_enc_0": draw(N, D)}, None, "W_enc_0.safetensors")
    with pytest.raises(FileNotFoundError, match="cross-layer transcoder"):
        read_transcoder("circuit-tracer", tmp_path / "clt")
    write(tmp_path / "clt2", gemma_2(), None, "params_layer_0.safetensors")
    with pytest.raises(FileNotFoundError, match="transcoder_all/"):
        read_transcoder("gemma-scope", tmp_path / "clt2")
    with pytest.raises(FileNotFoundError, match="transcoder import FORMAT"):
        Transcoder.from_pretrained(tmp_path / "clt")
