"""Bad input of every format: one clear error that names what was expected, what was found, what to do; nothing left."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from transcoder import Transcoder, TranscoderConfig, export_transcoder, import_transcoder
from transcoder.interop.formats import EXPORTED, ChangedFunctionError, read_transcoder

HOOKS = {"source_hook": "blocks.0.ln2.hook_normalized", "target_hook": "blocks.0.hook_mlp_out"}
WEIGHTS = {
    "saelens": "sae_weights.safetensors",
    "sparsify": "sae.safetensors",
    "dictionary-learning": "ae.pt",
    "circuit-tracer": "layer_0.safetensors",
    "gemma-scope": "params.npz",
    "original": "checkpoints/final.pt",
}
CONFIGS = {
    "saelens": "cfg.json",
    "sparsify": "cfg.json",
    "dictionary-learning": "config.json",
    "circuit-tracer": "config.yaml",
    "original": "config.json",
}


def small(**settings: Any) -> Transcoder:
    values: dict[str, Any] = {"d_in": 5, "d_out": 5, "d_sae": 12, "k": 3, "activation": "batch_topk"}
    model = Transcoder(TranscoderConfig(**values | settings), seed=1)
    model.threshold.fill_(0.5)
    return model.eval()


def written(name: str, folder: Path) -> Path:
    model = small(activation="topk") if name == "sparsify" else small(widths=[4, 12])
    export_transcoder(model, name, folder / name, **HOOKS)
    return folder / name


@pytest.mark.parametrize("name", EXPORTED)
def test_missing_torn_and_foreign_files_are_named(name: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=f"{name} import: .*nowhere"):
        import_transcoder(name, tmp_path / "nowhere")
    folder = written(name, tmp_path)
    weights = folder / WEIGHTS[name]
    whole = weights.read_bytes()
    for size in (0, 7, len(whole) // 2, len(whole) - 1):
        weights.write_bytes(whole[:size])
        with pytest.raises(ValueError, match=weights.name):
            import_transcoder(name, folder)
    weights.write_bytes(b"not a file of this format at all" * 40)
    with pytest.raises(ValueError, match=weights.name):
        import_transcoder(name, folder)
    weights.unlink()
    with pytest.raises(FileNotFoundError, match="expected"):
        import_transcoder(name, folder)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_that_is_missing_or_torn_is_named(name: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    config = folder / CONFIGS[name]
    for text in ("{", "[1, 2]", '"text"', "\x00"):
        config.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=config.name):
            import_transcoder(name, folder)
    config.unlink()
    if name == "dictionary-learning":
        # Its tensors' names say the class where only one has them.
        assert import_transcoder(name, folder).widths == (4, 12)
    elif name == "circuit-tracer":
        # As circuit-tracer's own reader of a layer does; Qwen3-14B's set is published so.
        found = read_transcoder(name, folder)
        assert any("no config.yaml" in what and effect == "note" for what, effect in found.record.steps)
        assert found.transcoder.config.d_sae == 12
    else:
        with pytest.raises(FileNotFoundError, match=config.name):
            import_transcoder(name, folder)


@pytest.mark.parametrize("name", EXPORTED)
def test_the_files_of_another_format_are_refused(name: str, tmp_path: Path) -> None:
    for other in EXPORTED:
        if other != name:
            with pytest.raises((ValueError, FileNotFoundError)):
                import_transcoder(name, written(other, tmp_path / name))


@pytest.mark.parametrize("wrong", ["shape", "nan", "missing", "unknown"])
@pytest.mark.parametrize("name", ["saelens", "sparsify", "circuit-tracer"])
def test_wrong_tensors_are_named(name: str, wrong: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    file = folder / WEIGHTS[name]
    tensors = load_file(file)
    if wrong == "shape":
        tensors["W_dec"] = tensors["W_dec"][:-1].contiguous()
    elif wrong == "nan":
        tensors["W_dec"][2, 1] = float("nan")
    elif wrong == "missing":
        del tensors["W_dec"]
    else:
        tensors["W_gate"] = torch.zeros(3)
    save_file(tensors, file)
    expected = {
        "shape": r"W_dec: expected shape \[12, 5\]",
        "nan": "W_dec: expected finite",
        "missing": "missing W_dec",
    }
    with pytest.raises(ValueError, match=expected.get(wrong, "unknown W_gate")):
        import_transcoder(name, folder)


class Planted:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["dictionary-learning", "original"])
def test_a_pickle_is_refused_before_it_runs_anything(name: str, tmp_path: Path) -> None:
    folder, proof = written(name, tmp_path), tmp_path / "it-ran"
    state = torch.load(folder / WEIGHTS[name], weights_only=True)
    torch.save({**state, "extra": Planted(proof)}, folder / WEIGHTS[name])
    with pytest.raises(ValueError, match="--allow-pickle"):
        import_transcoder(name, folder)
    assert not proof.exists()
    # Asked for, it is loaded, and runs.
    with pytest.raises(ValueError, match="unknown extra"):
        import_transcoder(name, folder, allow_pickle=True)
    assert proof.exists()
    (folder / WEIGHTS[name]).write_bytes(pickle.dumps([1, 2], protocol=2))
    with pytest.raises(ValueError, match=r"final\.pt|ae\.pt"):
        import_transcoder(name, folder)


def edit(folder: Path, name: str, **values: Any) -> None:
    path = folder / CONFIGS[name]
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("saelens", {"architecture": "gated"}, "architecture: expected one of .*jumprelu_transcoder.*got 'gated'"),
        ("saelens", {"d_in": 6}, "d_in = 6, the weights have 5"),
        ("saelens", {"normalize_activations": "odd"}, "normalize_activations"),
        ("sparsify", {"k": None}, "k: expected a whole number"),
        ("sparsify", {"activation": "relu"}, "activation: expected 'topk'"),
        ("sparsify", {"num_latents": 13}, "num_latents = 13, the weights have 12"),
        ("dictionary-learning", {"trainer": {"dict_class": "GatedAutoEncoder"}}, "dict_class: expected one of"),
        (
            "circuit-tracer",
            {"model_kind": "cross_layer_transcoder"},
            "model_kind: expected 'transcoder_set'.*cross-layer",
        ),
        ("circuit-tracer", {"activation": "gelu"}, "activation: expected topk"),
        ("circuit-tracer", {"activation": "topk"}, "k: expected a whole number"),
        ("circuit-tracer", {"activation": "relu"}, "which one is it"),
        ("original", {"prefix_sizes": [3, 3]}, "prefix_sizes: expected .*positive sizes that sum to 12"),
    ],
)
def test_a_config_that_does_not_fit_is_named(name: str, values: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    edit(folder, name, **values)
    with pytest.raises(ValueError, match=message):
        import_transcoder(name, folder)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("saelens", {"normalize_activations": "layer_norm"}, "layer_norm"),
        ("sparsify", {"activation": "groupmax"}, "groupmax"),
        ("original", {"input_unit_norm": True}, "input_unit_norm"),
    ],
)
def test_another_function_is_refused_and_recorded_where_asked_for(
    name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = written(name, tmp_path)
    edit(folder, name, **values)
    with pytest.raises(ChangedFunctionError, match=f"{message}.*--allow-changed-function"):
        import_transcoder(name, folder)
    found = read_transcoder(name, folder, allow_changed_function=True)
    assert found.record.function == "changed"
    record = json.loads((found.save(tmp_path / "in") / "conversion.json").read_text(encoding="utf-8"))
    assert any(message in step["what"] for step in record["steps"] if step["effect"] == "changed")


TOPK, SKIP = {"activation": "topk"}, {"skip": True}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("saelens", TOPK, "thresholds only"),
        ("gemma-scope", TOPK, "thresholds only"),
        ("original", TOPK, "one threshold only"),
        ("sparsify", {}, "TopK only"),
        ("gemma-scope", SKIP, "skip connection"),
        ("original", SKIP, "skip connection"),
        ("dictionary-learning", SKIP, "skip connection"),
    ],
)
def test_an_export_that_would_change_the_function_is_refused(
    name: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    with pytest.raises(ChangedFunctionError, match=f"{message}.*--allow-changed-function"):
        export_transcoder(small(**settings), name, out, **HOOKS)
    assert list(tmp_path.iterdir()) == []
    record = export_transcoder(small(**settings), name, out, allow_changed_function=True, **HOOKS)
    assert record.function == "changed"
    assert json.loads((out / "conversion.json").read_text(encoding="utf-8"))["function"] == "changed"
    assert import_transcoder(name, out).config.d_sae == 12


@pytest.mark.parametrize("name", ["sparsify", "dictionary-learning", "circuit-tracer"])
def test_two_widths_are_refused_whatever_is_allowed(name: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"one width.*5.*4"):
        export_transcoder(small(d_out=4), name, tmp_path / "out", allow_changed_function=True, **HOOKS)


@pytest.mark.parametrize("source", ["hook_resid_mid", "hook_resid_pre", "ln2.hook_scale"])
def test_gemma_scope_refuses_what_reads_before_the_norm(source: str, tmp_path: Path) -> None:
    hooks = {**HOOKS, "source_hook": f"blocks.0.{source}"}
    with pytest.raises(ChangedFunctionError, match="RMSNorm's division"):
        export_transcoder(small(), "gemma-scope", tmp_path / "out", **hooks)
    with pytest.raises(ValueError, match="--norm-weight"):
        export_transcoder(small(), "gemma-scope", tmp_path / "out", **{**HOOKS, "source_hook": "blocks.0.mlp.hook_in"})
    with pytest.raises(ValueError, match="--source-hook"):
        export_transcoder(small(), "gemma-scope", tmp_path / "out")
    with pytest.raises(ChangedFunctionError, match=r"mlp\.hook_out"):
        export_transcoder(small(), "gemma-scope", tmp_path / "out", **{**HOOKS, "target_hook": "blocks.0.mlp.hook_out"})
    with pytest.raises(ValueError, match=r"expected \[5\] finite numbers, got shape \[4\]"):
        export_transcoder(
            small(),
            "gemma-scope",
            tmp_path / "out",
            norm_weight=torch.ones(4),
            **{**HOOKS, "source_hook": "blocks.0.mlp.hook_in"},
        )


def test_arrays_of_objects_in_an_npz_are_refused(tmp_path: Path) -> None:
    proof = tmp_path / "it-ran"
    numpy.savez(tmp_path / "params.npz", W_enc=numpy.array([Planted(proof)], dtype=object))
    with pytest.raises(ValueError, match="npz of plain arrays"):
        import_transcoder("gemma-scope", tmp_path)
    assert not proof.exists()


def test_names_and_options_that_nobody_knows(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected one of saelens, sparsify.*got 'pickle'"):
        export_transcoder(small(), "pickle", tmp_path / "out")
    with pytest.raises(ValueError, match="unknown options colour; known: architecture"):
        export_transcoder(small(), "saelens", tmp_path / "out", colour="red")
    with pytest.raises(ValueError, match="unknown options layer"):
        import_transcoder("saelens", tmp_path, layer=3)
    with pytest.raises(TypeError, match="expected a Transcoder, a run folder"):
        export_transcoder(3, "saelens", tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="only circuit-tracer takes several"):
        export_transcoder([small(), small()], "saelens", tmp_path / "out")
    for spelled in ("dictionary_learning", "Dictionary-Learning", " circuit_tracer"):
        export_transcoder(small(), spelled, tmp_path / spelled.strip(), **HOOKS)


def test_a_used_folder_is_left_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        export_transcoder(small(), "saelens", tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        export_transcoder(small(), "saelens", tmp_path / "mine.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_circuit_tracer_sets_that_do_not_fit_together(tmp_path: Path) -> None:
    out = tmp_path / "out"
    one, other = small(), small(activation="topk")
    with pytest.raises(ValueError, match="one config for all layers, got activations threshold, topk"):
        export_transcoder({0: one, 1: other}, "circuit-tracer", out, activation="topk", **HOOKS)
    with pytest.raises(ValueError, match="got k of TopK 2, 3"):
        export_transcoder(
            {0: other, 1: small(activation="topk", k=2)}, "circuit-tracer", out, activation="topk", **HOOKS
        )
    with pytest.raises(ValueError, match="one transcoder a layer"):
        export_transcoder([one, one], "circuit-tracer", out, **HOOKS)
    with pytest.raises(ValueError, match="expected more than the highest layer 4"):
        export_transcoder({4: one}, "circuit-tracer", out, n_layers=3, **HOOKS)
    with pytest.raises(ValueError, match="--source-hook"):
        export_transcoder({4: one}, "circuit-tracer", out)
    with pytest.raises(ValueError, match="to know the layer"):
        export_transcoder(one, "circuit-tracer", out, source_hook="mlp.hook_in", target_hook="mlp.hook_out")
    export_transcoder({1: one, 3: one}, "circuit-tracer", out, **HOOKS)
    with pytest.raises(ValueError, match=r"holds layers \[1, 3\]: choose one"):
        import_transcoder("circuit-tracer", out)
    with pytest.raises(ValueError, match=r"layer: expected one of \[1, 3\], got 2"):
        import_transcoder("circuit-tracer", out, layer=2)
    assert read_transcoder("circuit-tracer", out, layer=3).hooks.source == "blocks.3.ln2.hook_normalized"
