"""Our files in circuit-tracer's TranscoderSet and its files in ours: the same function both ways."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from transcoder import Transcoder, TranscoderConfig
from transcoder.interop.formats import ChangedFunctionError, export_transcoder, read_transcoder

from .makers import HOOKS, check_same, inputs, transcoder

circuit_tracer = pytest.importorskip(
    "circuit_tracer", reason="circuit-tracer is not installed here: python tests/interop/run.py circuit-tracer"
)


def their_activations() -> Any:
    from circuit_tracer.transcoder import activation_functions

    return activation_functions


def needs_topk() -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_transcoder_set

    if "activation" not in inspect.signature(load_transcoder_set).parameters:
        pytest.skip("this circuit-tracer reads no TopK sets: it would take them for ReLU")


def loaded(folder: Path, lazy: bool = False) -> Any:
    from circuit_tracer.utils.hf_utils import load_transcoders

    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    layers = len(list(folder.glob("layer_*.safetensors")))
    config["transcoders"] = [str(folder / f"layer_{layer}.safetensors") for layer in range(layers)]
    return load_transcoders(config, device=torch.device("cpu"), lazy_encoder=lazy, lazy_decoder=lazy)


@pytest.mark.parametrize("lazy", [False, True])
@torch.no_grad()
def test_ours_is_a_set_with_gaps_widths_and_skips_padded(tmp_path: Path, lazy: bool) -> None:
    wide, narrow = transcoder("batch_topk", d_sae=96, widths=[24, 96]), transcoder("batch_topk", d_sae=64, skip=True)
    record = export_transcoder({1: wide, 3: narrow}, "circuit-tracer", tmp_path / "out", n_layers=5, **HOOKS)
    assert record.function == "same up to rounding"
    found, x = loaded(tmp_path / "out", lazy), inputs(50, 16)
    assert (len(found), found.d_transcoder, found.skip_connection) == (5, 96, True)
    assert (found.feature_input_hook, found.feature_output_hook) == ("ln2.hook_normalized", "hook_mlp_out")
    for layer, model in ((1, wide), (3, narrow)):
        acts = found[layer].encode(x)
        check_same(model.encode(x).to_dense(), acts[:, : model.config.d_sae], x)
        assert not acts[:, model.config.d_sae :].any()
        check_same(model(x), found[layer](x), x)
    for layer in (0, 2, 4):
        assert not found[layer](x).any()
    # What attribution asks for, empty layers included.
    parts = found.compute_attribution_components(x.expand(5, -1, -1))
    assert parts["activation_matrix"].shape == (5, 50, 96)


@torch.no_grad()
def test_our_topk_stays_relu_topk_where_few_latents_are_positive(tmp_path: Path) -> None:
    needs_topk()
    model = transcoder("topk", d_sae=32)
    model.b_enc.sub_(1.2)
    export_transcoder(model, "circuit-tracer", tmp_path / "out", layer=0, activation="topk", **HOOKS)
    theirs, x = loaded(tmp_path / "out")[0], inputs(200, 16)
    positive = (model.normalize_source(x) @ model.W_enc.T + model.b_enc > 0).sum(1)
    assert int(positive.min()) < model.config.k < int(positive.max())
    mine = model.encode(x).to_dense()
    check_same(mine, theirs.encode(x)[:, :32], x)
    check_same(model(x), theirs(x), x)
    again = read_transcoder("circuit-tracer", tmp_path / "out")
    assert (again.record.function, again.transcoder.config.d_sae) == ("same", 32)
    check_same(model(x), again.transcoder(x), x)


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_theirs_is_the_same_function_here(tmp_path: Path, kind: str, skip: bool) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import SingleLayerTranscoder, TranscoderSet

    activations = their_activations()
    if kind == "topk":
        needs_topk()
    function = {
        "relu": lambda: torch.nn.functional.relu,
        "jumprelu": lambda: activations.JumpReLU(torch.linspace(0, 2.5, 96), 0.1),
        "topk": lambda: activations.TopK(5),
    }[kind]()
    cpu = torch.device("cpu")
    theirs = SingleLayerTranscoder(16, 96, function, 0, skip_connection=skip, device=cpu, dtype=torch.float32)
    generator = torch.Generator().manual_seed(2)
    for name, parameter in theirs.named_parameters():
        if "threshold" not in name:
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    TranscoderSet({0: theirs}, "hook_resid_mid", "hook_mlp_out", scan="test").to_safetensors(str(tmp_path))
    config = {
        "model_kind": "transcoder_set",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
    }
    config |= {"activation": "topk", "k": 5} if kind == "topk" else {}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    if kind == "topk":
        with pytest.raises(ChangedFunctionError, match="no ReLU"):
            read_transcoder("circuit-tracer", tmp_path)
    found = read_transcoder("circuit-tracer", tmp_path, allow_changed_function=kind == "topk")
    assert found.hooks.source == "blocks.0.hook_resid_mid"
    # With 96 latents and k = 5, no token here has fewer than 5 positive ones, so TopK agrees too.
    x = inputs(200, 16)
    check_same(theirs.encode(x), found.transcoder.encode(x).to_dense(), x)
    check_same(theirs(x), found.transcoder(x), x)


@torch.no_grad()
def test_gemma_scope_files_read_the_same_in_both(tmp_path: Path) -> None:
    from circuit_tracer.transcoder.single_layer_transcoder import load_gemma_scope_transcoder

    model = transcoder("batch_topk")
    export_transcoder(model, "gemma-scope", tmp_path / "out", **HOOKS)
    theirs = load_gemma_scope_transcoder(str(tmp_path / "out" / "params.npz"), 0, device=torch.device("cpu"))
    x = inputs(200, 16)
    check_same(model(x), theirs(x), x)
    check_same(theirs(x), read_transcoder("gemma-scope", tmp_path / "out").transcoder(x), x)


@torch.no_grad()
def test_our_cross_layer_transcoder_is_theirs(tmp_path: Path) -> None:
    from circuit_tracer.transcoder.cross_layer_transcoder import load_clt

    from transcoder.training.cross_layer import confine

    layers, width = 3, 16
    config = TranscoderConfig(layers * width, layers * width, d_sae=96, k=12, activation="batch_topk")
    model = Transcoder(config, seed=1)
    confine(model, layers)
    model.threshold.fill_(0.4)
    model.b_dec.copy_(torch.randn(layers * width, generator=torch.Generator().manual_seed(3)))
    x = inputs(50, layers * width)
    model.set_normalization(x, 2 * x + 1, "standardize")
    model.eval().save_pretrained(tmp_path / "run")
    hooks = {"source_hook": "blocks.0.hook_resid_mid", "target_hook": "blocks.0.hook_mlp_out"}
    run = {"activations": {"cross_layer": True, "layers": [0, 1, 2], **hooks}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(run), encoding="utf-8")
    record = export_transcoder(tmp_path / "run", "circuit-tracer", tmp_path / "out")
    assert record.function == "same up to rounding"
    theirs = load_clt(str(tmp_path / "out"), device=torch.device("cpu"), dtype=torch.float32)
    by_layer = x.unflatten(1, (layers, width)).transpose(0, 1)
    features = torch.stack([theirs.encode_layer(by_layer[n], n) for n in range(layers)])
    # Theirs has the latents of a layer in a row, ours has latent i at layer i mod 3.
    check_same(model.encode(x).to_dense(), features.permute(1, 2, 0).flatten(1), x)
    found = theirs.decode(features.to_sparse(), by_layer)
    check_same(model(x), found.transpose(0, 1).flatten(1), x)
