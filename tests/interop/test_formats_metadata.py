"""What a file says about itself: types of numbers, kinds of settings, scales beside the weights. Nothing is taken on trust."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch import Tensor

from transcoder import Transcoder, TranscoderConfig, export_transcoder, import_transcoder
from transcoder.interop.formats import EXPORTED, ChangedFunctionError, read_transcoder

from . import peers
from .test_formats_refusals import CONFIGS, HOOKS, WEIGHTS

D, N = 6, 20
X = 2 * torch.randn(64, D, generator=torch.Generator().manual_seed(1)) + 1


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.4 * torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def written(name: str, folder: Path, **settings: Any) -> Path:
    activation = "topk" if name == "sparsify" else "batch_topk"
    values: dict[str, Any] = {"d_in": D, "d_out": D, "d_sae": N, "k": 3, "activation": activation, "widths": [4, N]}
    model = Transcoder(TranscoderConfig(**values | settings), seed=1)
    model.threshold.fill_(0.5)
    export_transcoder(model.eval(), name, folder / name, **HOOKS)
    return folder / name


def rewrite(name: str, folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """The weights' file again, after `change` of its tensors."""
    file = folder / WEIGHTS[name]
    if name == "gemma-scope":
        with numpy.load(file) as archive:
            arrays = dict(archive)
        change(arrays)
        numpy.savez(file, **arrays)
    elif file.suffix == ".pt":
        tensors = torch.load(file, weights_only=True)
        change(tensors)
        torch.save(tensors, file)
    else:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)


def edit(name: str, folder: Path, values: dict[str, Any], gone: tuple[str, ...] = ()) -> None:
    path = folder / CONFIGS[name]
    config = yaml.safe_load(path.read_text(encoding="utf-8"))
    for key, value in values.items():
        *above, last = key.split("/")
        place = config
        for step in above:
            place = place[step]
        place[last] = value
    for key in gone:
        del config[key]
    path.write_text(json.dumps(config), encoding="utf-8")


@pytest.mark.parametrize("kind", ["int8", "int32", "bool", "float8_e4m3fn", "complex64"])
@pytest.mark.parametrize("name", [name for name in EXPORTED if name != "gemma-scope"])
def test_weights_are_floating_numbers_or_refused(name: str, kind: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    rewrite(name, folder, lambda tensors: tensors.update(W_dec=tensors["W_dec"].to(getattr(torch, kind))))
    with pytest.raises(ValueError, match=rf"^{name} import: .*W_dec: expected .*fp64.*{kind}"):
        import_transcoder(name, folder)


@pytest.mark.parametrize("kind", ["longdouble", ">f4", "complex64", "int32"])
def test_an_npz_of_other_numbers_is_refused(kind: str, tmp_path: Path) -> None:
    folder = written("gemma-scope", tmp_path)
    rewrite("gemma-scope", folder, lambda arrays: arrays.update(W_dec=arrays["W_dec"].astype(kind)))
    with pytest.raises(ValueError, match=r"^gemma-scope import: .*params\.npz: W_dec: expected .*, got"):
        import_transcoder("gemma-scope", folder)


@pytest.mark.parametrize("name", EXPORTED)
def test_fp64_is_rounded_and_the_record_says_so(name: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    before = read_transcoder(name, folder)
    assert before.record.function == "same"

    def wide(tensors: dict[str, Any], factor: float = 1.0) -> None:
        old = tensors["W_dec"]
        tensors["W_dec"] = old.double() * factor if isinstance(old, Tensor) else old.astype("float64") * factor

    rewrite(name, folder, wide)
    # The same numbers, in more room.
    found = read_transcoder(name, folder)
    assert found.record.function == "same"
    assert torch.equal(found.transcoder.W_dec, before.transcoder.W_dec)
    rewrite(name, folder, lambda tensors: wide(tensors, 1 + 1e-12))
    found = read_transcoder(name, folder)
    assert found.record.function == "same up to rounding"
    assert ("W_dec: fp64, rounded to fp32", "rounding") in found.record.steps
    rewrite(name, folder, lambda tensors: wide(tensors, 1e300))
    with pytest.raises(ValueError, match=f"^{name} import: .*W_dec: expected numbers that fp32 holds"):
        read_transcoder(name, folder)


@pytest.mark.parametrize("name", [name for name in EXPORTED if name != "gemma-scope"])
def test_sixteen_bits_are_the_same_numbers(name: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    for kind in (torch.bfloat16, torch.float16):
        rewrite(name, folder, lambda tensors, kind=kind: tensors.update(W_dec=tensors["W_dec"].to(kind)))
        assert read_transcoder(name, folder).record.function == "same"


@pytest.mark.parametrize("how", ["sparse", "meta", "expanded"])
@pytest.mark.parametrize("name", ["dictionary-learning", "original"])
def test_tensors_without_their_numbers_are_refused(name: str, how: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    make: dict[str, Callable[[Tensor], Tensor]] = {
        "sparse": lambda t: t.to_sparse(),
        "meta": lambda t: t.to("meta"),
        # 4 TB, of one number.
        "expanded": lambda _: torch.zeros(1, 1).expand(10**6, 10**6),
    }
    rewrite(name, folder, lambda tensors: tensors.update(W_enc=make[how](tensors["W_enc"])))
    with pytest.raises(ValueError, match=f"^{name} import: .*W_enc: expected a dense tensor"):
        import_transcoder(name, folder)


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        ("sparsify", {"transcode": "false"}, "transcode: expected true or false, got 'false'"),
        ("sparsify", {"transcode": 1}, "transcode: expected true or false, got 1"),
        ("sparsify", {"skip_connection": "no"}, "skip_connection: expected true or false"),
        ("sparsify", {"multi_topk": "no"}, "multi_topk: expected true or false"),
        ("sparsify", {"signed": []}, "signed: expected true or false"),
        ("sparsify", {"k": True}, "k: expected a whole number of at least 1, got True"),
        ("sparsify", {"k": N + 1}, f"k: expected at most the {N} latents, got {N + 1}"),
        ("sparsify", {"d_in": 0}, "d_in = 0, the weights have 6"),
        ("sparsify", {"d_in": "6"}, "d_in: expected a whole number"),
        ("sparsify", {"num_latents": 0, "expansion_factor": 7}, r"expansion_factor = 7, the weights have 20 / 6"),
        ("saelens", {"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input: expected true or false, got 'false'"),
        ("saelens", {"reshape_activations": "odd"}, "reshape_activations: expected none or hook_z, got 'odd'"),
        ("saelens", {"normalize_activations": ["none"]}, "normalize_activations: expected"),
        ("saelens", {"d_sae": True}, "d_sae: expected a whole number"),
        (
            "saelens",
            {"metadata/transcoder/k": "4"},
            r"metadata\.transcoder: k: expected a number of at least 1, got '4'",
        ),
        ("saelens", {"metadata/transcoder/widths": [9, "a"]}, r"metadata\.transcoder: widths: expected rising whole"),
        ("dictionary-learning", {"trainer/k": True}, "k: expected a whole number"),
        ("dictionary-learning", {"trainer/k": 4}, "k = 4, the weights have 3"),
        ("dictionary-learning", {"trainer/activation_dim": 5}, "activation_dim = 5, the weights have 6"),
        ("dictionary-learning", {"trainer/dict_size": 21}, "dict_size = 21, the weights have 20"),
        ("circuit-tracer", {"activation": "jump_relu", "k": True}, "k: expected a whole number"),
        ("circuit-tracer", {"activation": "topk", "k": 3}, "says activation topk: which one is it"),
        ("circuit-tracer", {"feature_input_hook": 3}, "feature_input_hook: expected a text, got 3"),
        ("circuit-tracer", {"matryoshka_widths/0": ["a", N]}, "matryoshka_widths: expected rising whole numbers"),
        ("circuit-tracer", {"unpadded_widths": 3}, "unpadded_widths: expected an object, got 3"),
        ("original", {"input_unit_norm": "false"}, "input_unit_norm: expected true or false, got 'false'"),
        ("original", {"sae_type": "global-matryoshka-topk"}, "sae_type: expected matryoshka-transcoder"),
        ("original", {"sae_type": "topk-transcoder"}, "sae_type: expected matryoshka-transcoder"),
        ("original", {"sae_type": 3}, "sae_type: expected matryoshka-transcoder"),
        ("original", {"source_act_size": 7}, "source_act_size = 7, the weights have 6"),
        ("original", {"target_act_size": 7}, "target_act_size = 7, the weights have 6"),
        ("original", {"dict_size": 21}, "dict_size = 21, the weights have 20"),
        ("original", {"prefix_sizes": "[4, "}, "prefix_sizes: expected"),
        ("original", {"prefix_sizes": [True, 19]}, "prefix_sizes: expected"),
        ("original", {"top_k": "four"}, "top_k: expected a whole number"),
    ],
)
def test_settings_of_the_wrong_kind_are_named_with_their_file(
    name: str, values: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = written(name, tmp_path)
    edit(name, folder, values)
    with pytest.raises(ValueError, match=f"^{name} import: .*{CONFIGS[name]}.*{message}"):
        import_transcoder(name, folder)


@pytest.mark.parametrize("name", ["circuit-tracer", "gemma-scope"])
def test_a_jumprelu_without_its_thresholds_is_refused(name: str, tmp_path: Path) -> None:
    folder = written(name, tmp_path)
    rewrite(name, folder, lambda tensors: tensors.pop("threshold", tensors.pop("activation_function.threshold", None)))
    if name == "circuit-tracer":
        edit(name, folder, {"activation": "jump_relu"})
    with pytest.raises(ValueError, match="threshold"):
        import_transcoder(name, folder)


# --- SAELens: the scale of the activations beside the weights ---

TRAINED = {"decoder_init_norm": 0.1, "normalize_activations": "expected_average_only_in"}
KINDS: dict[str, dict[str, Any]] = {
    "standard": {},
    "jumprelu": {},
    "topk": {"k": 3, "rescale_acts_by_decoder_norm": True},
    "batchtopk": {"k": 3.0, "rescale_acts_by_decoder_norm": True},
    "matryoshka_batchtopk": {"k": 3.0, "rescale_acts_by_decoder_norm": False, "matryoshka_widths": [5, N]},
}


def trainer_checkpoint(kind: str, folder: Path, scaler: dict[str, Any] | None, **settings: Any) -> None:
    config = {"d_in": D, "d_sae": N, "architecture": kind, "apply_b_dec_to_input": True, **TRAINED, **KINDS[kind]}
    (folder / "cfg.json").write_text(json.dumps({**config, **settings}))
    weights = {"W_enc": draw(D, N), "b_enc": draw(N), "W_dec": draw(N, D, seed=3), "b_dec": draw(D)}
    if kind == "jumprelu":
        weights["threshold"] = torch.linspace(0, 1, N)
    if "batchtopk" in kind:
        weights["topk_threshold"] = torch.tensor(0.6, dtype=torch.float64)
    save_file(weights, folder / "sae_weights.safetensors")
    if scaler is not None:
        (folder / "activation_scaler.json").write_text(json.dumps(scaler))


@pytest.mark.parametrize("subtracts", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_the_scale_beside_a_checkpoint_of_saelens_trainer_is_folded(kind: str, subtracts: bool, tmp_path: Path) -> None:
    scale = 5.0
    trainer_checkpoint(
        kind, tmp_path, {"scaling_factor": scale, "has_whitening": False}, apply_b_dec_to_input=subtracts
    )
    found = read_transcoder("saelens", tmp_path)
    # What its trainer feeds, and what comes out of it in the activations' own units.
    expected = peers.saelens(tmp_path, X * scale) / scale
    torch.testing.assert_close(found.transcoder(X).double(), expected, rtol=1e-4, atol=1e-5)
    assert any("activation_scaler.json" in what and "5" in what for what, e in found.record.steps if e == "rounding")
    if kind == "batchtopk":
        assert float(found.transcoder.threshold) == pytest.approx(0.6 / scale)


def test_a_checkpoint_of_saelens_trainer_without_its_scale_is_another_function(tmp_path: Path) -> None:
    for number, scaler in enumerate((None, {"scaling_factor": None, "has_whitening": False})):
        folder = tmp_path / str(number)
        folder.mkdir()
        trainer_checkpoint("batchtopk", folder, scaler)
        with pytest.raises(ChangedFunctionError, match=r"expected_average_only_in.*activation_scaler\.json"):
            read_transcoder("saelens", folder)
        found = read_transcoder("saelens", folder, allow_changed_function=True)
        assert found.record.function == "changed"
    # With nothing to scale there is nothing to miss; SAELens' trainer writes the file all the same.
    trainer_checkpoint("batchtopk", tmp_path, {"scaling_factor": None}, normalize_activations="none")
    assert read_transcoder("saelens", tmp_path).record.function == "same up to rounding"


@pytest.mark.parametrize(
    ("scaler", "settings", "message"),
    [
        ({"scaling_factor": "5"}, {}, "scaling_factor: expected a number above 0, got '5'"),
        ({"scaling_factor": True}, {}, "scaling_factor: expected a number above 0, got True"),
        ({"scaling_factor": 0}, {}, "scaling_factor: expected a number above 0, got 0"),
        ({"scaling_factor": float("nan")}, {}, "scaling_factor: expected a number above 0"),
        ({}, {}, "scaling_factor: expected a number above 0 or null, found nothing"),
        ({"scaling_factor": None, "has_whitening": 1}, {}, "has_whitening: expected true or false"),
        ({"scaling_factor": 5}, {"normalize_activations": "none"}, "which one is it"),
        (
            {"scaling_factor": None, "has_whitening": True},
            {"normalize_activations": "covariance_whitening"},
            "whitening",
        ),
    ],
)
def test_a_scale_of_saelens_that_cannot_be_folded_is_refused(
    scaler: dict[str, Any], settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    trainer_checkpoint("batchtopk", tmp_path, scaler, **settings)
    with pytest.raises(ValueError, match=f"^saelens import: .*activation_scaler.json.*{message}"):
        read_transcoder("saelens", tmp_path, allow_changed_function=True)


def test_a_saved_sae_of_saelens_whose_factor_nobody_knows_is_noted(tmp_path: Path) -> None:
    folder = written("saelens", tmp_path)
    edit("saelens", folder, {"normalize_activations": "expected_average_only_in"})
    record = read_transcoder("saelens", folder).record
    assert record.function == "same"
    assert any("load_from_disk" in what for what, effect in record.steps if effect == "note")


# --- sparsify ---


def test_multi_topk_of_sparsify_reconstructs_with_four_k(tmp_path: Path) -> None:
    folder = written("sparsify", tmp_path)
    edit("sparsify", folder, {"multi_topk": True})
    with pytest.raises(ChangedFunctionError, match=r"multi_topk.*12.*encode and decode"):
        read_transcoder("sparsify", folder)
    found = read_transcoder("sparsify", folder, allow_changed_function=True)
    assert found.record.function == "changed"
    assert found.transcoder.config.k == 3


# --- the original project ---


def test_an_original_config_without_input_unit_norm_says_nothing(tmp_path: Path) -> None:
    folder = written("original", tmp_path)
    edit("original", folder, {}, gone=("input_unit_norm",))
    with pytest.raises(ValueError, match=r"config\.json: input_unit_norm: expected true or false, found nothing"):
        read_transcoder("original", folder)


@pytest.mark.parametrize(
    ("prefixes", "widths"),
    [
        # Its source at 888d820: cumulative, the last is the dictionary.
        ([4, 10, N], (4, 10, N)),
        # Before: sizes, one after another.
        ([4, 6, 10], (4, 10, N)),
        ("[4, 6, 10]", (4, 10, N)),
        ([N], (N,)),
    ],
)
def test_prefixes_of_the_original_are_read_either_way(
    prefixes: object, widths: tuple[int, ...], tmp_path: Path
) -> None:
    folder = written("original", tmp_path)
    edit("original", folder, {"prefix_sizes": prefixes})
    assert read_transcoder("original", folder).transcoder.widths == widths


def test_an_export_to_the_original_is_what_its_constructor_takes(tmp_path: Path) -> None:
    folder = written("original", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    state = torch.load(folder / "checkpoints" / "final.pt", weights_only=True)
    # Rising, and the last one is the number of latents that it allocates.
    assert config["prefix_sizes"] == [4, N]
    assert config["prefix_sizes"][-1] == state["W_enc"].shape[1]


def test_a_transcoder_of_the_original_by_its_default_sae_type(tmp_path: Path) -> None:
    """Its scripts at 888d820 leave the default "topk"; a transcoder's config then has a hook on either side."""
    folder = written("original", tmp_path)
    edit("original", folder, {"sae_type": "topk"})
    assert read_transcoder("original", folder).record.function == "same"
    for kind in ({"sae_type": "topk"}, {}):
        edit("original", folder, kind)
        edit("original", folder, {"source_hook_point": None, "target_hook_point": None})
        if not kind:
            edit("original", folder, {}, gone=("sae_type",))
        with pytest.raises(ValueError, match="sae_type: expected matryoshka-transcoder"):
            read_transcoder("original", folder)


def test_hooks_given_by_hand_tell_a_transcoder_of_the_original(tmp_path: Path) -> None:
    folder = written("original", tmp_path)
    edit("original", folder, {"source_hook_point": None, "target_hook_point": None, "sae_type": "topk"})
    found = read_transcoder("original", folder, **HOOKS)
    assert (found.hooks.source, found.hooks.target) == (HOOKS["source_hook"], HOOKS["target_hook"])


# --- options that have nothing to do ---


def test_a_norm_weight_that_is_not_needed_is_looked_at_and_said_to_be_unused(tmp_path: Path) -> None:
    model = Transcoder(TranscoderConfig(D, D, N, 3, activation="batch_topk")).eval()
    with pytest.raises(FileNotFoundError, match="nowhere"):
        export_transcoder(model, "gemma-scope", tmp_path / "out", norm_weight=tmp_path / "nowhere.npy", **HOOKS)
    for weight in (torch.ones(D), tmp_path / "w.npy"):
        numpy.save(tmp_path / "w.npy", numpy.ones(D))
        out = tmp_path / type(weight).__name__
        record = export_transcoder(model, "gemma-scope", out, norm_weight=weight, **HOOKS)
        assert any(what.startswith("norm_weight is not used") for what, _ in record.steps)
        assert any(
            what.startswith("norm_weight is not used")
            for what, _ in read_transcoder("gemma-scope", out, layer=0, norm_weight=weight).record.steps
        )


@pytest.mark.parametrize("name", ["saelens", "gemma-scope", "original"])
def test_a_threshold_that_is_not_needed_is_said_to_be_unused(name: str, tmp_path: Path) -> None:
    model = Transcoder(TranscoderConfig(D, D, N, 3, activation="batch_topk")).eval()
    record = export_transcoder(model, name, tmp_path / "out", threshold=0.3, **HOOKS)
    assert any(what.startswith("threshold 0.3 is not used") for what, _ in record.steps)
