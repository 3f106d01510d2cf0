"""Files as the peers write them, made here by hand; the runs of this project; the command line."""

from __future__ import annotations

import json
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
from transcoder.interop.gemma_scope import norm_weight

from . import peers

D, N = 6, 20
X = 2 * torch.randn(64, D, generator=torch.Generator().manual_seed(1)) + 1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def check(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=1e-5, atol=1e-5)


SAELENS_SAE = {"normalize_activations": "none", "reshape_activations": "none", "dtype": "float32", "device": "cpu"}
SAELENS: dict[str, tuple[dict[str, Any], dict[str, Tensor]]] = {
    "standard": ({}, {}),
    "jumprelu": ({}, {"threshold": torch.linspace(-0.1, 1, N)}),
    "jumprelu_transcoder": ({"apply_b_dec_to_input": False}, {"threshold": torch.linspace(0, 1, N)}),
    "transcoder": ({"apply_b_dec_to_input": False}, {}),
    "skip_transcoder": ({"apply_b_dec_to_input": False}, {"W_skip": draw(4, D)}),
    "topk": ({"k": 3, "rescale_acts_by_decoder_norm": False}, {}),
    "matryoshka_batchtopk": (
        {"k": 3.0, "matryoshka_widths": [5, N], "rescale_acts_by_decoder_norm": True, "use_matryoshka_aux_loss": False},
        {"topk_threshold": torch.tensor(0.6, dtype=torch.float64)},
    ),
    # Checkpoints that SAELens' trainer writes of our classes in its registry.
    "topk_transcoder": (
        {"k": 3, "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True, "skip": True},
        {"topk_threshold": torch.tensor(0.6, dtype=torch.float64), "W_skip": draw(4, D)},
    ),
    "matryoshka_batchtopk_transcoder": (
        {"k": 3.0, "matryoshka_widths": [5, N], "apply_b_dec_to_input": False, "rescale_acts_by_decoder_norm": True},
        {"topk_threshold": torch.tensor(0.6, dtype=torch.float64)},
    ),
}


@pytest.mark.parametrize("architecture", SAELENS)
@torch.no_grad()
def test_saelens(architecture: str, tmp_path: Path) -> None:
    settings, extra = SAELENS[architecture]
    d_out = 4 if "transcoder" in architecture else D
    metadata = {
        "sae_lens_version": "6.54.12",
        "model_name": "gpt2",
        "hook_name": "blocks.4.hook_resid_pre",
        "context_size": 128,
        "training_architecture_details": {"k": 7, "matryoshka_widths": [8, N]},
    }
    config = {"d_in": D, "d_sae": N, "apply_b_dec_to_input": True, **SAELENS_SAE, "metadata": metadata, **settings}
    config |= {"architecture": architecture} | ({"d_out": d_out} if d_out == 4 else {})
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    weights = {"W_enc": draw(D, N), "b_enc": draw(N), "W_dec": draw(N, d_out), "b_dec": draw(d_out), **extra}
    save_file({name: tensor.clone() for name, tensor in weights.items()}, tmp_path / "sae_weights.safetensors")
    found = read_transcoder("saelens", tmp_path)
    check(found.transcoder(X), peers.saelens(tmp_path, X))
    if "topk_threshold" in extra:
        assert float(found.transcoder.threshold) == pytest.approx(0.6)
    assert found.hooks.source == "blocks.4.hook_resid_pre"
    assert (found.hooks.model_name, found.hooks.context_size) == ("gpt2", 128)
    assert found.transcoder.config.k == (3 if "topk" in architecture else 7)
    assert found.transcoder.widths == ((5, N) if "matryoshka" in architecture else (8, N))


@torch.no_grad()
def test_saelens_of_the_layout_before_version_six(tmp_path: Path) -> None:
    config = {"d_in": D, "d_sae": N, "hook_point": "blocks.1.hook_resid_pre", "activation_fn_str": "topk"}
    (tmp_path / "cfg.json").write_text(json.dumps({**config, "activation_fn_kwargs": {"k": 3}}))
    weights = {
        "W_enc": draw(D, N),
        "b_enc": draw(N),
        "W_dec": draw(N, D),
        "b_dec": draw(D),
        "scaling_factor": torch.ones(N),
    }
    save_file(weights, tmp_path / "sae_weights.safetensors")
    found = read_transcoder("saelens", tmp_path)
    pre = (X - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    check(found.transcoder(X), peers.top_k(pre.relu(), 3) @ weights["W_dec"] + weights["b_dec"])
    assert found.hooks.source == "blocks.1.hook_resid_pre"
    save_file({**weights, "scaling_factor": 2 * torch.ones(N)}, tmp_path / "sae_weights.safetensors")
    with pytest.raises(ValueError, match="scaling_factor"):
        read_transcoder("saelens", tmp_path)


@torch.no_grad()
def test_topk_leaves_as_saelens_sae_on_request(tmp_path: Path) -> None:
    _, model = saved_run(tmp_path / "run", activation="topk")
    with pytest.raises(ChangedFunctionError, match="--architecture topk"):
        export_transcoder(model, "saelens", tmp_path / "out")
    record = export_transcoder(model, "saelens", tmp_path / "out", architecture="topk")
    assert record.function == "same up to rounding"
    check(peers.saelens(tmp_path / "out", X), model(X))
    check(read_transcoder("saelens", tmp_path / "out").transcoder(X), model(X))
    for settings, message in (
        ({"d_out": 4}, "one width"),
        ({"activation": "batch_topk"}, "this transcoder is BatchTopK"),
    ):
        _, other = saved_run(tmp_path / message, **{"activation": "topk", "d_out": D} | settings)
        with pytest.raises(ValueError, match=message):
            export_transcoder(other, "saelens", tmp_path / "no", architecture="topk")


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
@pytest.mark.parametrize("skip", [False, True])
@torch.no_grad()
def test_a_plain_relu_of_saelens_is_refused_unless_asked_for(activation: str, skip: bool, tmp_path: Path) -> None:
    model = Transcoder(TranscoderConfig(D, 4, N, 3, activation=activation, skip=skip), seed=2)  # type: ignore[arg-type]
    model.b_enc.copy_(draw(N))
    model.threshold.fill_(0.5)
    model.eval()
    kind = "skip_transcoder" if skip else "transcoder"
    with pytest.raises(ChangedFunctionError):
        export_transcoder(model, "saelens", tmp_path / "no", architecture=kind)
    record = export_transcoder(model, "saelens", tmp_path / "out", architecture=kind, allow_changed_function=True)
    assert record.function == "changed"
    assert sum(effect == "changed" for _, effect in record.steps) == (2 if activation == "topk" else 1)
    assert any("subtracted from b_enc" in what for what, effect in record.steps if effect == "changed")
    # The latents above the threshold act, each by 0.5 less.
    acts = ((X @ model.W_enc.T + model.b_enc) - 0.5).relu()
    dense = acts @ model.W_dec + model.b_dec + (X @ model.W_skip.T if model.W_skip is not None else 0)
    check(peers.saelens(tmp_path / "out", X), dense)
    check(read_transcoder("saelens", tmp_path / "out").transcoder(X), dense)
    if activation == "batch_topk":
        # With a threshold of 0 a ReLU is the same function.
        model.threshold.fill_(0)
        assert export_transcoder(model, "saelens", tmp_path / "same", architecture=kind).function == "same"


@torch.no_grad()
def test_a_skip_form_asked_for_without_a_skip_connection_has_one_of_zeros(tmp_path: Path) -> None:
    _, model = saved_run(tmp_path / "run")
    record = export_transcoder(model, "saelens", tmp_path / "out", architecture="jumprelu_skip_transcoder")
    assert json.loads((tmp_path / "out" / "cfg.json").read_text())["architecture"] == "jumprelu_skip_transcoder"
    assert ("a skip connection of zeros added", "layout") in record.steps
    check(peers.saelens(tmp_path / "out", X), model(X))


@pytest.mark.parametrize("transcode", [False, True])
@torch.no_grad()
def test_sparsify(transcode: bool, tmp_path: Path) -> None:
    config = {"activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": N, "k": 4}
    config |= {"multi_topk": False, "skip_connection": True, "transcode": transcode, "d_in": D}
    (tmp_path / "cfg.json").write_text(json.dumps(config))
    weights = {"encoder.weight": draw(N, D), "encoder.bias": draw(N), "W_dec": draw(N, D, seed=9), "b_dec": draw(D)}
    save_file({**weights, "W_skip": draw(D, D)}, tmp_path / "sae.safetensors")
    check(read_transcoder("sparsify", tmp_path).transcoder(X), peers.sparsify(tmp_path, X))


LINEAR = {"encoder.weight": draw(N, D), "encoder.bias": draw(N), "decoder.weight": draw(D, N)}
FLAT = {"W_enc": draw(D, N), "b_enc": draw(N), "W_dec": draw(N, D), "b_dec": draw(D)}
COUNTERS = {"k": torch.tensor(3, dtype=torch.int), "threshold": torch.tensor(0.7)}
DICTIONARIES: dict[str, dict[str, Tensor]] = {
    "AutoEncoder": {**LINEAR, "bias": draw(D)},
    "AutoEncoderNew": {**LINEAR, "decoder.bias": draw(D)},
    "AutoEncoderTopK": {**COUNTERS, **LINEAR, "b_dec": draw(D)},
    "BatchTopKSAE": {**COUNTERS, **LINEAR, "b_dec": draw(D)},
    "MatryoshkaBatchTopKSAE": {**COUNTERS, **FLAT, "group_sizes": torch.tensor([5, 7, 8])},
    "JumpReluAutoEncoder": {**FLAT, "threshold": torch.linspace(-0.2, 1, N)},
}


@pytest.mark.parametrize("name", DICTIONARIES)
@torch.no_grad()
def test_dictionary_learning(name: str, tmp_path: Path) -> None:
    torch.save(DICTIONARIES[name], tmp_path / "ae.pt")
    trainer = {
        "dict_class": name,
        "lm_name": "EleutherAI/pythia-70m",
        "submodule_name": "resid_post_layer_3",
        "layer": 3,
    }
    (tmp_path / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    found = read_transcoder("dictionary_learning", tmp_path)
    check(found.transcoder(X), peers.dictionary_learning(tmp_path, X))
    assert found.transcoder.widths == ((5, 12, 20) if "Matryoshka" in name else (N,))
    assert found.hooks.source == found.hooks.target == "blocks.3.hook_resid_post"
    # Group sizes and back again.
    export_transcoder(found.transcoder, "dictionary_learning", tmp_path / "out")
    again = torch.load(tmp_path / "out" / "ae.pt", weights_only=True)
    if name in ("MatryoshkaBatchTopKSAE", "AutoEncoderTopK", "BatchTopKSAE"):
        assert set(again) == set(DICTIONARIES[name])
        assert all(torch.equal(again[key], tensor) for key, tensor in DICTIONARIES[name].items())


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
@torch.no_grad()
def test_circuit_tracer(kind: str, tmp_path: Path) -> None:
    weights = {"W_enc": draw(N, D), "b_enc": draw(N), "W_dec": draw(N, D, seed=3), "b_dec": draw(D)}
    config: dict[str, Any] = {"model_kind": "transcoder_set", "model_name": "google/gemma-2-2b"}
    config |= {"feature_input_hook": "ln2.hook_normalized", "feature_output_hook": "hook_mlp_out"}
    if kind == "jumprelu":
        weights["activation_function.threshold"] = torch.linspace(0, 1, N)
    if kind == "topk":
        config |= {"activation": "topk", "k": 12}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    save_file(weights, tmp_path / "layer_0.safetensors")
    save_file({**weights, "b_dec": draw(D, seed=50)}, tmp_path / "layer_1.safetensors")
    if kind == "topk":
        # Fewer than 12 of 20 are positive in most rows: their TopK keeps negative ones.
        with pytest.raises(ChangedFunctionError, match="no ReLU"):
            read_transcoder("circuit-tracer", tmp_path, layer=1)
        return
    found = read_transcoder("circuit-tracer", tmp_path, layer=1)
    check(found.transcoder(X), peers.circuit_tracer(tmp_path, X, 1))
    assert found.hooks.target == "blocks.1.hook_mlp_out"
    if kind == "jumprelu":
        save_file(
            {**weights, "activation_function.threshold": torch.linspace(-1, 1, N)}, tmp_path / "layer_0.safetensors"
        )
        with pytest.raises(ChangedFunctionError, match="negative"):
            read_transcoder("circuit-tracer", tmp_path, layer=0)


@pytest.mark.parametrize("layout", ["checkpoints/final.pt", "checkpoint.pt", "sae.pt", "checkpoints/step_3000.pt"])
@torch.no_grad()
def test_the_original_project(layout: str, tmp_path: Path) -> None:
    state = {**FLAT, "threshold": torch.tensor(0.4)}
    state = {name: tensor.bfloat16() for name, tensor in state.items()}
    file = tmp_path / layout
    file.parent.mkdir(exist_ok=True)
    wrapped = {"model_state_dict": state} if layout == "checkpoint.pt" else state
    torch.save(wrapped, file)
    config = {
        "prefix_sizes": [4, 6, 10],
        "top_k": 5,
        "input_unit_norm": False,
        "dtype": "torch.bfloat16",
        "model_name": "gemma-2-2b",
    }
    config |= {"source_hook_point": "blocks.8.hook_resid_mid", "target_hook_point": "blocks.8.hook_mlp_out"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for path in (tmp_path, file):
        found = read_transcoder("original", path)
        assert (found.transcoder.widths, found.transcoder.config.k) == ((4, 10, 20), 5)
        w = {name: tensor.double() for name, tensor in state.items()}
        acts = (X.double() @ w["W_enc"] + w["b_enc"]).relu()
        check(found.transcoder(X), torch.where(acts > w["threshold"], acts, 0.0) @ w["W_dec"] + w["b_dec"])
        assert found.hooks.target == "blocks.8.hook_mlp_out"


@torch.no_grad()
def test_gemma_scope_reads_behind_the_norm_with_its_weight_folded(tmp_path: Path) -> None:
    """Both readings of one token, by the norm's own definition, give the same latents."""
    folder = tmp_path / "layer_3" / "width_16k" / "average_l0_70"
    folder.mkdir(parents=True)
    weights = {
        "W_enc": draw(D, N),
        "W_dec": draw(N, D),
        "b_enc": draw(N),
        "b_dec": draw(D),
        "threshold": torch.linspace(0, 1, N),
    }
    numpy.savez(folder / "params.npz", **{name: tensor.numpy() for name, tensor in weights.items()})
    w = torch.linspace(0.5, 3, D)
    normalized = X / (X.square().mean(1, keepdim=True) + 1e-6).sqrt()
    plain = read_transcoder("gemma-scope", folder)
    assert plain.hooks.source == "blocks.3.ln2.hook_normalized"
    assert plain.transcoder.config.k == N  # 70 is more than there are
    check(plain.transcoder(normalized), peers.gemma_scope(folder, normalized))
    behind = read_transcoder("gemma-scope", folder, source_hook="blocks.3.mlp.hook_in", norm_weight=w)
    assert (behind.hooks.source, behind.record.function) == ("blocks.3.mlp.hook_in", "same up to rounding")
    check(behind.transcoder(normalized * w), peers.gemma_scope(folder, normalized))
    # And back: what reads behind the weight is written as this format reads.
    behind.save(tmp_path / "saved")
    numpy.save(tmp_path / "w.npy", w.numpy())
    export_transcoder(tmp_path / "saved", "gemma-scope", tmp_path / "out", norm_weight=tmp_path / "w.npy")
    check(peers.gemma_scope(tmp_path / "out", normalized), peers.gemma_scope(folder, normalized))
    with pytest.raises(ChangedFunctionError, match="RMSNorm"):
        read_transcoder("gemma-scope", folder, source_hook="blocks.3.hook_resid_mid")
    with pytest.raises(ValueError, match="expected no zeros"):
        read_transcoder("gemma-scope", folder, source_hook="blocks.3.mlp.hook_in", norm_weight=torch.zeros(D))


@torch.no_grad()
def test_the_norm_weight_of_a_model_folder_is_the_factor_between_its_hooks() -> None:
    """On the shipped Gemma-2 model: mlp.hook_in is ln2.hook_normalized times what `norm_weight` reads."""
    from transcoder.activations.language_model import HookedModel

    def values(hook: str) -> Tensor:
        model = HookedModel("demo", hook, "blocks.1.hook_mlp_out", torch.float32, torch.device("cpu"), progress=False)
        return model.forward(torch.arange(1, 40).view(1, 39))[0][0].double()

    before, behind = values("blocks.1.ln2.hook_normalized"), values("blocks.1.mlp.hook_in")
    import transcoder.demo

    w = norm_weight(Path(transcoder.demo.__file__).parent / "language_model", before.shape[1], 1)
    assert float((w - 1).abs().max()) > 0.05
    torch.testing.assert_close(before * w, behind, rtol=1e-5, atol=1e-5)


def saved_run(folder: Path, **settings: Any) -> tuple[Path, Transcoder]:
    """A run's folder with one checkpoint, as the trainer lays it out (weights and config alone)."""
    values: dict[str, Any] = {"d_in": D, "d_out": D, "d_sae": N, "k": 3, "activation": "batch_topk", "widths": [5, N]}
    model = Transcoder(TranscoderConfig(**values | settings), seed=2).eval()
    model.set_normalization(X, 3 * X[:, : model.config.d_out] + 1, "standardize")
    model.threshold.fill_(0.4)
    checkpoint = folder / "checkpoints" / "step_00000100"
    model.save_pretrained(checkpoint)
    hooks = {
        "source_hook": "blocks.1.ln2.hook_normalized",
        "target_hook": "blocks.1.hook_mlp_out",
        "sequence_length": 64,
    }
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"name": "demo"}, "activations": hooks}))
    return checkpoint, model


@pytest.mark.parametrize("name", ["saelens", "dictionary_learning", "circuit-tracer", "gemma_scope", "original"])
@torch.no_grad()
def test_the_commands(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, model = saved_run(tmp_path / "run")
    short = ["--n-layers", "4"] if name == "circuit-tracer" else []
    if short:
        assert main(["export", str(checkpoint), "--to", name]) == 2
        assert "none for [0, 2, 3]" in capsys.readouterr().err
    assert main(["export", str(checkpoint), "--to", name, *short]) == 0
    written = tmp_path / "run" / "exports" / name.replace("_", "-")
    assert f"written: {written}" in capsys.readouterr().out
    record = json.loads((written / "conversion.json").read_text())
    assert (record["kind"], record["function"]) == ("transcoder-conversion", "same up to rounding")
    assert set(record["files"]) == {str(p.relative_to(written)) for p in written.rglob("*") if p.is_file()} - {
        "conversion.json"
    }
    again = ["import", name, str(written), "--out", str(tmp_path / "in")]
    assert main([*again, "--layer", "1"] if name in ("circuit-tracer", "gemma_scope") else again) == 0
    assert "function same" in capsys.readouterr().out
    torch.testing.assert_close(Transcoder.from_pretrained(tmp_path / "in")(X), model(X), rtol=1e-4, atol=1e-4)
    # What was imported knows where it belongs, and can leave again.
    out = ["--layer", "1", "--n-layers", "4", "--out", str(tmp_path / "set")]
    assert main(["export", str(tmp_path / "in"), "--to", "circuit-tracer", *out]) == 0
    assert main(again) == 2
    assert "not empty" in capsys.readouterr().err


def test_the_commands_refuse_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, _ = saved_run(tmp_path / "run")
    for words, message in (
        (["export", str(checkpoint), "--to", "sparsify"], "--allow-changed-function"),
        (["export", str(checkpoint), "--to", "spasify"], "format: expected one of saelens"),
        (["export", str(tmp_path / "nothing"), "--to", "saelens"], "expected a run folder"),
        (["import", "saelens", str(tmp_path / "run"), "--out", str(tmp_path / "in")], "cfg.json"),
        (["export", str(checkpoint)], "--to"),
    ):
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert main(["export", str(checkpoint), "--to", "sparsify", "--allow-changed-function"]) == 0
    assert "[changed]" in capsys.readouterr().out
    assert not (tmp_path / "in").exists()


def test_two_runs_make_a_set_with_the_layers_between_padded(tmp_path: Path) -> None:
    first, one = saved_run(tmp_path / "a")
    second, other = saved_run(tmp_path / "b", d_sae=12, widths=[12])
    config = yaml.safe_load((tmp_path / "b" / "config.yaml").read_text())
    config["activations"] |= {"source_hook": "blocks.3.ln2.hook_normalized", "target_hook": "blocks.3.hook_mlp_out"}
    (tmp_path / "b" / "config.yaml").write_text(yaml.safe_dump(config))
    words = [
        "export",
        str(first),
        str(second),
        "--to",
        "circuit-tracer",
        "--n-layers",
        "6",
        "--out",
        str(tmp_path / "set"),
    ]
    assert main(words) == 0
    assert len(list((tmp_path / "set").glob("layer_*.safetensors"))) == 6
    with torch.no_grad():
        for layer, model in ((1, one), (3, other)):
            check(peers.circuit_tracer(tmp_path / "set", X, layer), model(X))
            back = read_transcoder("circuit-tracer", tmp_path / "set", layer=layer).transcoder
            assert back.config.d_sae == model.config.d_sae
            check(back(X), model(X))
        for layer in (0, 2, 4, 5):
            assert not peers.circuit_tracer(tmp_path / "set", X, layer).any()


def test_a_place_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    checkpoint, _ = saved_run(tmp_path / "run")
    (tmp_path / "file").write_text("a file where a folder should be")
    with pytest.raises(OSError, match="file"):
        export_transcoder(checkpoint, "saelens", tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "run"]
