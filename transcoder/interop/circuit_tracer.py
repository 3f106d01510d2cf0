"""circuit-tracer: a TranscoderSet, layer_{i}.safetensors for every layer from 0 on and config.yaml. One width d_model.

The set has one activation for all layers, refuses gaps and mixed widths, and its TopK has no ReLU: what is missing is padded
with latents and layers of zeros, which never act.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import yaml
from torch import Tensor

from transcoder.activations.model_name import known_layer_count
from transcoder.demo import language_model_path
from transcoder.files import WRITING
from transcoder.interop import gemma_scope
from transcoder.interop.circuit_tracer_features import FOLDER, SCAN, write_features
from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import existing, locate, read_safetensors, write_safetensors
from transcoder.interop.folded_weights import FoldedWeights, Hooks
from transcoder.interop.foreign_config import ForeignConfig, Object, Rising, Text, Whole
from transcoder.interop.layout import from_layout, to_layout
from transcoder.settings import brief

TESTED = "circuit-tracer 0.4.1 and PyPI's 0.5.0, a fork (JumpReLU); its main branch at 4bb8c0e, tag v0.5.0 (TopK too)"
CONFIG_FILE = "config.yaml"
_FILE = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_LAYOUT = {name: name for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")} | {_THRESHOLD: "threshold"}
_BY_LAYER = ("unpadded_widths", "training_k", "matryoshka_widths")
_ACTIVATIONS = (None, "topk", "relu", "jump_relu", "jumprelu")


@dataclass(frozen=True)
class _Config(ForeignConfig):
    model_kind: Any = None
    model_name: Text = None
    activation: Any = None
    k: Whole = None
    feature_input_hook: Text = None
    feature_output_hook: Text = None
    transcoders: Any = None
    # Ours, by layer.
    unpadded_widths: Object = None
    training_k: Object = None
    matryoshka_widths: Object = None


@dataclass(frozen=True)
class _Layer(ForeignConfig):
    """What the config says of one layer."""

    unpadded_widths: Whole = None
    training_k: Whole = None
    matryoshka_widths: Rising = None


def write_set(
    by_layer: Mapping[int, FoldedWeights],
    folder: Path,
    record: Conversion,
    options: Mapping[str, Any],
    sources: Mapping[int, object] = MappingProxyType({}),
) -> None:
    """One file a layer; and of layers whose source is a run's folder, what the viewer shows of their features.

    Options: n_layers (of the model: a replacement model asks for every one of them), scan (a name), activation ("topk": keep
    TopK; else it is turned into thresholds, which is another function), threshold (for that).
    """
    if (wanted := options.get("activation")) not in (None, "topk", "threshold"):
        raise ValueError(f"circuit-tracer export: activation: expected 'threshold' or 'topk', got {wanted!r}")
    by_layer = {layer: checked(weights, layer, record, options) for layer, weights in sorted(by_layer.items())}
    some = next(iter(by_layer.values()))
    shared: dict[str, set[str]] = {
        "activations": {weights.activation for weights in by_layer.values()},
        "k of TopK": {str(weights.k) for weights in by_layer.values() if weights.activation == "topk"},
        "widths of the model": {str(weights.d_in) for weights in by_layer.values()},
    }
    for name, values in shared.items():
        if len(values) > 1:
            raise ValueError(
                f"circuit-tracer export: a set has one config for all layers, got {name} {', '.join(sorted(values))}; "
                "export them apart"
            )
    n_layers = options.get("n_layers") or _all_layers(by_layer)
    if n_layers <= max(by_layer):
        raise ValueError(
            f"circuit-tracer export: n_layers: expected more than the highest layer {max(by_layer)}, got {n_layers}"
        )
    source, target = _one_pair_of_hooks(by_layer)
    # Its TopK keeps negative values where fewer than k are positive: k latents of zeros are chosen before any of those.
    spare = (some.k or 0) if some.activation == "topk" else 0
    width = max(weights.d_sae for weights in by_layer.values()) + spare
    skip = any(weights.W_skip is not None for weights in by_layer.values())
    if spare:
        record.add(
            f"{spare} latents of zeros added: its TopK has no ReLU, and chooses them before a negative value", "layout"
        )
        record.add(
            "TopK sets are read by circuit-tracer's main branch (tag v0.5.0) only, from the hub: 0.4.1, the 0.5.0 on PyPI, and "
            "a config with paths of files take them for ReLU, without a word",
            "note",
        )
    missing = [layer for layer in range(n_layers) if layer not in by_layer]
    if missing:
        record.add(f"layers {missing} are transcoders of zeros: circuit-tracer refuses gaps", "layout")
    for layer in range(n_layers):
        weights = by_layer.get(layer)
        if weights is not None and weights.d_sae + spare < width:
            what = f"{weights.d_sae} latents padded with zeros to {width}: one width for all layers"
            record.add(f"layer {layer}: {what}", "layout")
        write_safetensors(folder / f"layer_{layer}.safetensors", _tensors(weights, some, width, skip))
    folders = {n: Path(one) for n, one in sources.items() if isinstance(one, (str, Path))}
    runs = {n: f for n, f in folders.items() if (f / "config.yaml").is_file() and (f / "checkpoints").is_dir()}
    features = sum(write_features(run, layer, folder / FOLDER) for layer, run in runs.items())
    if features:
        record.add(
            f"{FOLDER}/: what circuit-tracer's viewer shows of {features} latents; copy it to the graphs", "note"
        )
    config: dict[str, Any] = {
        "model_kind": "transcoder_set",
        "model_name": model_name(some.hooks),
        "feature_input_hook": source,
        "feature_output_hook": target,
        "scan": options.get("scan") or (SCAN if features else folder.name.removeprefix(WRITING)),
        **({"activation": "topk", "k": some.k} if some.activation == "topk" else {}),
        # Not read by circuit-tracer; ours takes the padding off again.
        "unpadded_widths": {layer: weights.d_sae for layer, weights in by_layer.items()},
        "training_k": {layer: weights.k for layer, weights in by_layer.items() if weights.k is not None},
        "matryoshka_widths": {layer: list(weights.widths) for layer, weights in by_layer.items() if weights.widths},
    }
    (folder / CONFIG_FILE).write_bytes(yaml.safe_dump(config, sort_keys=False).encode())


def model_name(hooks: Hooks) -> str | None:
    """The language model; the shipped one has no name that another library knows."""
    return str(language_model_path()) if hooks.model_name == "demo" else hooks.model_name


def _all_layers(by_layer: Mapping[int, FoldedWeights]) -> int:
    """The number of layers, of the model where it is known: ValueError where some have no transcoder."""
    name = next(iter(by_layer.values())).hooks.model_name
    known = None if name is None else known_layer_count(name)
    missing = [layer for layer in range(known or 0) if layer not in by_layer]
    if missing:
        raise ValueError(
            f"circuit-tracer export: expected a transcoder for each of the {known} layers of {name}, none for {missing}: a "
            "replacement model takes the place of every MLP. Train all of them (--activations.layers all), or give n_layers= "
            f"(--n-layers {known}) to fill the others with zeros, which leaves their whole output to error nodes"
        )
    return known or max(by_layer) + 1


def checked(weights: FoldedWeights, layer: int, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    weights.check_one_width(f"circuit-tracer export: layer {layer}: a set")
    if options.get("activation") != "topk":
        why = "circuit-tracer's releases and its sets by path read a TopK set as ReLU, so sets have thresholds"
        instead = (
            "Or keep TopK with activation='topk' (--activation topk), for sets that its main branch reads from the hub."
        )
        weights = weights.as_thresholds(record, options.get("threshold"), why, instead)
    if weights.activation == "threshold":
        weights = weights.with_latent_thresholds()
    elif weights.threshold is not None:
        weights = replace(weights, threshold=None)
    if weights.nested:
        record.add(f"layer {layer}: circuit-tracer knows no Matryoshka widths: kept in {CONFIG_FILE} only", "note")
    return weights.with_input_bias(None, record)


def _one_pair_of_hooks(by_layer: Mapping[int, FoldedWeights]) -> tuple[str, str]:
    pairs = {weights.hooks.within_block() for weights in by_layer.values()}
    if len(pairs) > 1:
        raise ValueError(
            f"circuit-tracer export: expected the same hooks in every layer, got {sorted(map(str, pairs))}"
        )
    source, target = pairs.pop()
    if source is None or target is None:
        raise ValueError(
            "circuit-tracer export: expected the hooks, which this transcoder does not know: give source_hook= and "
            "target_hook= (--source-hook, --target-hook), such as blocks.8.ln2.hook_normalized and blocks.8.hook_mlp_out"
        )
    return source, target


def _tensors(weights: FoldedWeights | None, like: FoldedWeights, width: int, skip: bool) -> dict[str, Tensor]:
    """The tensors of a layer, padded with zeros to `width` latents; of zeros alone without `weights`."""
    d_model = like.d_in
    tensors = {name: torch.zeros(width, d_model) for name in ("W_enc", "W_dec")}
    tensors |= {"b_enc": torch.zeros(width), "b_dec": torch.zeros(d_model)}
    if like.activation == "threshold":
        tensors[_THRESHOLD] = torch.zeros(width)
    if skip:
        tensors["W_skip"] = torch.zeros(d_model, d_model)
    for name, tensor in ({} if weights is None else to_layout(weights, _LAYOUT)).items():
        tensors[name][: tensor.shape[0]] = tensor
    return tensors


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """One layer of a set: a folder, or a layer_{i}.safetensors in it. Options: layer."""
    where = "circuit-tracer import"
    folder = locate(where, path, (CONFIG_FILE, "layer_*.safetensors")).parent
    config = _read_config(where, folder, record)
    if config.transcoders is not None and path.suffix != ".safetensors":
        return _read_link(where, config, record, options)
    file = (
        path
        if path.is_file() and path.name != CONFIG_FILE
        else _layer_file(where, folder, config, options.get("layer"))
    )
    in_file = f"{where}: {file}"
    match = _FILE.fullmatch(file.name)
    layer = int(match[1]) if match else options.get("layer")
    tensors, optional = read_safetensors(where, file), (_THRESHOLD, "W_skip", "k")
    fields = from_layout(in_file, tensors, _LAYOUT, record, optional, counts=("k",))
    own = _Layer.of(
        f"{config.where}: layer {layer}", {name: (getattr(config, name) or {}).get(layer) for name in _BY_LAYER}
    )
    k, count = own.training_k, fields.pop("k", None)
    # Only a TopK of circuit-tracer's own class has k in its weights.
    d_sae, topk = (
        fields["W_enc"].shape[0],
        config.activation == "topk" or (config.activation is None and count is not None),
    )
    threshold, skip = fields.get("threshold"), fields.get("W_skip")
    if topk:
        # The number is in the weights too where circuit-tracer's own class wrote them.
        k = int(count) if config.k is None and count is not None and count.numel() == 1 else config.k
        k = options.get("k") if k is None else k
        if k is None or not 0 < k <= d_sae:
            raise ValueError(
                f"{config.where}: k: expected a whole number of the {d_sae} latents for activation topk, got {k}; where the "
                "file has none, give it: k= (--k)"
            )
    if config.activation in ("topk", "relu") and threshold is not None:
        raise ValueError(
            f"{in_file} has thresholds, {CONFIG_FILE} says activation {config.activation}: which one is it?"
        )
    if topk and k is not None:
        never = ~fields["W_enc"].any(1) & (fields["b_enc"] == 0)
        if int(never.sum()) < k:
            record.change(
                f"its TopK has no ReLU: a token with fewer than k = {k} positive pre-activations keeps negative ones"
            )
    elif threshold is None:
        if config.activation in ("jump_relu", "jumprelu"):
            raise ValueError(
                f"{in_file}: expected {_THRESHOLD}, since {CONFIG_FILE} says activation {config.activation}"
            )
        threshold = torch.tensor(0.0)
    if threshold is not None and bool((threshold < 0).any()):
        record.change("its JumpReLU lets negative values above a negative threshold through, ours never does")
    record.add("weights as they are", "layout")
    if threshold is not None and threshold.numel() == 1:
        threshold = threshold.reshape(())
    width = own.unpadded_widths or d_sae
    if width != d_sae:
        if width > d_sae or bool(fields["W_enc"][width:].any()) or bool(fields["b_enc"][width:].any()):
            raise ValueError(f"{config.where}: unpadded_widths: expected zeros after latent {width} of {file.name}")
        record.add(f"padding of zeros taken off: {width} latents", "layout")
        fields.update({name: fields[name][:width].clone() for name in ("W_enc", "b_enc", "W_dec")})
        if threshold is not None and threshold.shape == (d_sae,):
            threshold = threshold[:width].clone()

    # A set has skip connections everywhere or nowhere: zeros are the ones that were padded.
    fields["W_skip"] = skip if skip is not None and bool(skip.any()) else None
    return FoldedWeights(
        **{**fields, "threshold": threshold},
        activation="topk" if topk else "threshold",
        k=k,
        widths=tuple(own.matryoshka_widths or ()) or None,
        hooks=Hooks(
            _hook(layer, config.feature_input_hook), _hook(layer, config.feature_output_hook), config.model_name
        ),
    )


def _read_link(where: str, config: _Config, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """One layer of a config that lists where the layers are: paths, or hf://org/name/file, in order or with a layer each."""
    listed = config.transcoders if isinstance(config.transcoders, list) else []
    links = {n: one for n, one in enumerate(listed) if isinstance(one, str)}
    links |= {
        one["layer"]: one["filepath"]
        for one in listed
        if isinstance(one, dict) and type(one.get("layer")) is int and isinstance(one.get("filepath"), str)
    }
    config.require("transcoders", len(links) == len(listed) > 0, "a list of paths or hf:// links")
    layer = options.get("layer", next(iter(links)) if len(links) == 1 else None)
    if layer not in links:
        raise ValueError(f"{where}: layer: expected one of {sorted(links)} (--layer), got {layer}")
    folder = Path(config.where.removeprefix(f"{where}: ")).parent
    file = _linked_file(where, links[layer], folder)
    record.add(f"layer {layer} is {links[layer]}", "note")
    gemma = file.suffix == ".npz" or "w_enc" in read_safetensors(where, file)
    if gemma:
        weights = gemma_scope.read(file, record, {**options, "layer": layer, "source_hook": None})
    else:
        weights = read(file, record, {**options, "layer": layer})
    hooks = weights.hooks
    return replace(
        weights,
        hooks=replace(
            hooks,
            source=_hook(layer, config.feature_input_hook) or hooks.source,
            target=_hook(layer, config.feature_output_hook) or hooks.target,
            model_name=config.model_name or hooks.model_name,
        ),
    )


def _linked_file(where: str, link: str, folder: Path) -> Path:
    match = re.fullmatch(r"hf://([^/]+/[^/]+)/([^?]+)(?:\?revision=([^&]+))?", link)
    if match is None:
        if "://" in link:
            raise ValueError(f"{where}: transcoders: expected paths and hf:// links, got {link!r}")
        return existing(where, folder / link, "the layer that config.yaml names")
    try:
        from huggingface_hub import hf_hub_download

        return Path(hf_hub_download(match[1], match[2], revision=match[3]))
    except (ImportError, OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{where}: {link} could not be fetched: {brief(error)}. Download it by hand and import the file itself"
        ) from error


def _hook(layer: int | None, name: str | None) -> str | None:
    return f"blocks.{layer}.{name}" if name is not None and layer is not None else None


def _read_config(where: str, folder: Path, record: Conversion) -> _Config:
    file = folder / CONFIG_FILE
    if not file.is_file():
        record.add(
            f"no {CONFIG_FILE}: read as circuit-tracer reads such a file, a ReLU, or JumpReLU where it has thresholds. Was it "
            f"trained with TopK? Then write {CONFIG_FILE} with activation: topk and k",
            "note",
        )
        return _Config(f"{where}: {file}", model_kind="transcoder_set")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {file}: expected YAML: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{where}: {file}: expected a mapping, got {type(values).__name__}")
    for name in _BY_LAYER:
        if isinstance(by_layer := values.get(name), dict):
            # JSON, which is YAML too, has texts as keys.
            values[name] = {int(key): value for key, value in by_layer.items() if str(key).isdecimal()}
    config = _Config.of(f"{where}: {file}", values)
    config.require(
        "model_kind",
        config.model_kind == "transcoder_set" or (config.model_kind is None and config.transcoders is not None),
        "'transcoder_set' (a Transcoder is of one layer; a cross-layer one writes into every later layer)",
    )
    config.require("activation", config.activation in _ACTIVATIONS, "topk, relu, jumprelu or none")
    return config


def _layer_file(where: str, folder: Path, config: _Config, layer: int | None) -> Path:
    there = sorted(int(match[1]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
    if not there:
        raise FileNotFoundError(f"{where}: expected layer_0.safetensors and so on in {folder}, found none")
    # Layers that ours padded hold zeros only.
    real = [number for number in there if config.unpadded_widths is None or number in config.unpadded_widths]
    if layer is None and len(real) != 1:
        raise ValueError(f"{where}: {folder} holds layers {real}: choose one with layer= (--layer)")
    layer = real[0] if layer is None else layer
    if layer not in real:
        raise ValueError(f"{where}: layer: expected one of {real}, got {layer}")
    return folder / f"layer_{layer}.safetensors"
