"""circuit-tracer: a TranscoderSet, layer_{i}.safetensors for every layer from 0 on and config.yaml. One width d_model.

The set has one activation for all layers, refuses gaps and mixed widths, and its TopK has no ReLU: what is missing is padded
with latents and layers of zeros, which never act.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from transcoder.files import WRITING
from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_safetensors, write_safetensors
from transcoder.interop.folded_weights import Hooks, PlainWeights, matrix, take_tensors
from transcoder.interop.foreign_config import rising, section, text, whole

TESTED = "circuit-tracer 0.4.1 and PyPI's 0.5.0, a fork (JumpReLU); its main branch at 4bb8c0e, tag v0.5.0 (TopK too)"
CONFIG_FILE = "config.yaml"
_FILE = re.compile(r"layer_(\d+)\.safetensors")
_THRESHOLD = "activation_function.threshold"
_BY_LAYER = ("unpadded_widths", "training_k", "matryoshka_widths")


def write_set(plains: Mapping[int, PlainWeights], folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """One file a layer.

    Options: n_layers (of the model: a replacement model asks for every one of them), scan (a name).
    """
    plains = {layer: _checked(plain, layer, record, options) for layer, plain in sorted(plains.items())}
    some = next(iter(plains.values()))
    for name, values in (
        ("activations", [plain.activation for plain in plains.values()]),
        ("k of TopK", [str(plain.k) for plain in plains.values() if plain.activation == "topk"]),
        ("widths of the model", [str(plain.d_in) for plain in plains.values()]),
    ):
        if len(set(values)) > 1:
            raise ValueError(
                f"circuit-tracer export: a set has one config for all layers, got {name} {', '.join(sorted(set(values)))}; "
                "export them apart"
            )
    n_layers = options.get("n_layers") or max(plains) + 1
    if n_layers <= max(plains):
        raise ValueError(
            f"circuit-tracer export: n_layers: expected more than the highest layer {max(plains)}, got {n_layers}"
        )
    source, target = _one_pair_of_hooks(plains)
    # Its TopK keeps negative values where fewer than k are positive: k latents of zeros are chosen before any of those.
    spare = (some.k or 0) if some.activation == "topk" else 0
    width = max(plain.d_sae for plain in plains.values()) + spare
    skip = any(plain.W_skip is not None for plain in plains.values())
    if spare:
        record.add(
            f"{spare} latents of zeros added: its TopK has no ReLU, and chooses them before a negative value",
            "layout",
        )
        record.add(
            "TopK sets are read by circuit-tracer's main branch (tag v0.5.0) only: 0.4.1 takes them for ReLU", "note"
        )
    missing = [layer for layer in range(n_layers) if layer not in plains]
    if missing:
        record.add(
            f"layers {missing} are transcoders of zeros: circuit-tracer refuses gaps",
            "layout",
        )
    for layer in range(n_layers):
        plain = plains.get(layer)
        if plain is not None and plain.d_sae + spare < width:
            record.add(
                f"layer {layer}: {plain.d_sae} latents padded with zeros to {width}: one width for all layers", "layout"
            )
        write_safetensors(folder / f"layer_{layer}.safetensors", _tensors(plain, some, width, skip))
    config: dict[str, Any] = {
        "model_kind": "transcoder_set",
        "model_name": some.hooks.model_name,
        "feature_input_hook": source,
        "feature_output_hook": target,
        "scan": options.get("scan") or folder.name.removeprefix(WRITING),
        **({"activation": "topk", "k": some.k} if some.activation == "topk" else {}),
        # Not read by circuit-tracer; ours takes the padding off again.
        "unpadded_widths": {layer: plain.d_sae for layer, plain in plains.items()},
        "training_k": {layer: plain.k for layer, plain in plains.items() if plain.k is not None},
        "matryoshka_widths": {layer: list(plain.widths) for layer, plain in plains.items() if plain.widths},
    }
    (folder / CONFIG_FILE).write_bytes(yaml.safe_dump(config, sort_keys=False).encode())


def _checked(plain: PlainWeights, layer: int, record: Conversion, options: Mapping[str, Any]) -> PlainWeights:
    if plain.d_in != plain.d_out:
        raise ValueError(
            f"circuit-tracer export: layer {layer}: expected one width d_model, got d_in {plain.d_in}, d_out {plain.d_out}"
        )
    if plain.threshold is not None and plain.activation == "threshold":
        plain = replace(plain, threshold=plain.latent_thresholds())
    if plain.widths and len(plain.widths) > 1:
        record.add(f"layer {layer}: circuit-tracer knows no Matryoshka widths: kept in {CONFIG_FILE} only", "note")
    return plain.with_input_bias(None, record)


def _one_pair_of_hooks(plains: Mapping[int, PlainWeights]) -> tuple[str, str]:
    pairs = {plain.hooks.within_block() for plain in plains.values()}
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


def _tensors(plain: PlainWeights | None, like: PlainWeights, width: int, skip: bool) -> dict[str, Tensor]:
    d_model, rows = like.d_in, 0 if plain is None else plain.d_sae

    def padded(tensor: Tensor | None, columns: tuple[int, ...]) -> Tensor:
        whole = torch.zeros(width, *columns)
        if tensor is not None:
            whole[:rows] = tensor
        return whole

    tensors = {
        "W_enc": padded(None if plain is None else plain.W_enc, (d_model,)),
        "b_enc": padded(None if plain is None else plain.b_enc, ()),
        "W_dec": padded(None if plain is None else plain.W_dec, (d_model,)),
        "b_dec": torch.zeros(d_model) if plain is None else plain.b_dec,
    }
    if like.activation == "threshold":
        tensors[_THRESHOLD] = padded(None if plain is None else plain.threshold, ())
    if skip:
        present = None if plain is None else plain.W_skip
        tensors["W_skip"] = torch.zeros(d_model, d_model) if present is None else present
    return tensors


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> PlainWeights:
    """One layer of a set: a folder, or a layer_{i}.safetensors in it. Options: layer."""
    where = "circuit-tracer import"
    folder = path if path.is_dir() else path.parent
    config = _read_config(where, folder)
    file = path if path.is_file() else _layer_file(where, folder, config, options.get("layer"))
    match = _FILE.fullmatch(file.name)
    layer = int(match[1]) if match else None
    found = take_tensors(
        f"{where}: {file}",
        read_safetensors(where, file),
        ("W_enc", "W_dec", "b_enc", "b_dec"),
        record,
        optional=(_THRESHOLD, "W_skip", "k"),
        whole=("k",),
    )
    settings = f"{where}: {folder / CONFIG_FILE}"
    W_enc = matrix(f"{where}: {file}", "W_enc", found["W_enc"])
    width = _whole(settings, config, "unpadded_widths", layer) or W_enc.shape[0]
    activation, threshold, k = config.get("activation"), found.get(_THRESHOLD), whole(settings, config, "k")
    if activation == "topk":
        # The number is in the weights too where circuit-tracer's own class wrote them.
        k = int(found["k"]) if k is None and "k" in found and found["k"].numel() == 1 else k
        if k is None or not 0 < k <= W_enc.shape[0]:
            raise ValueError(
                f"{settings}: k: expected a whole number of the {W_enc.shape[0]} latents for activation topk, got {k}"
            )
    if activation in ("topk", "relu") and threshold is not None:
        raise ValueError(
            f"{where}: {file} has thresholds, {CONFIG_FILE} says activation {activation}: which one is it?"
        )
    if activation == "topk" and k is not None:
        _check_relu(W_enc, found["b_enc"], k, record)
    if activation in ("jump_relu", "jumprelu") and threshold is None:
        raise ValueError(f"{where}: {file}: expected {_THRESHOLD}, since {CONFIG_FILE} says activation {activation}")
    if threshold is None and activation != "topk":
        threshold = torch.tensor(0.0)
    if threshold is not None and bool((threshold < 0).any()):
        record.change("its JumpReLU lets negative values above a negative threshold through, ours never does")
    record.add("weights as they are", "layout")
    if width != W_enc.shape[0]:
        if not 0 < width < W_enc.shape[0] or bool(W_enc[width:].any()) or bool(found["b_enc"][width:].any()):
            raise ValueError(f"{settings}: unpadded_widths: expected zeros after latent {width} of {file.name}")
        record.add(f"padding of zeros taken off: {width} latents", "layout")
    if threshold is not None and threshold.dim() == 1 and threshold.shape[0] == W_enc.shape[0]:
        threshold = threshold[:width].clone()
    if threshold is not None and threshold.numel() == 1:
        threshold = threshold.reshape(())
    skip = found.get("W_skip")
    widths = rising(settings, "matryoshka_widths", section(settings, config, "matryoshka_widths").get(layer))
    return PlainWeights(
        W_enc=W_enc[:width].clone(),
        b_enc=found["b_enc"][:width].clone(),
        W_dec=matrix(f"{where}: {file}", "W_dec", found["W_dec"])[:width].clone(),
        b_dec=found["b_dec"],
        # A set has skip connections everywhere or nowhere: zeros are the ones that were padded.
        W_skip=skip if skip is not None and bool(skip.any()) else None,
        activation="topk" if activation == "topk" else "threshold",
        k=k if activation == "topk" else _whole(settings, config, "training_k", layer),
        threshold=threshold,
        widths=tuple(widths) or None,
        hooks=_hooks(settings, config, layer),
    )


def _check_relu(W_enc: Tensor, b_enc: Tensor, k: int, record: Conversion) -> None:
    null = ~W_enc.any(1) & (b_enc == 0)
    if int(null.sum()) < k:
        record.change(
            f"its TopK has no ReLU: a token with fewer than k = {k} positive pre-activations keeps negative ones"
        )


def _read_config(where: str, folder: Path) -> dict[str, Any]:
    file = folder / CONFIG_FILE
    if not file.is_file():
        raise FileNotFoundError(
            f"{where}: expected {CONFIG_FILE} in {folder}, found none: without it nothing says whether the activation is TopK"
        )
    try:
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{where}: {file}: expected YAML: {error}") from error
    kind = config.get("model_kind") if isinstance(config, dict) else None
    if kind != "transcoder_set":
        raise ValueError(f"{where}: {file}: model_kind: expected 'transcoder_set' (one layer each), got {kind!r}")
    activation = config.get("activation")
    if activation not in (None, "topk", "relu", "jump_relu", "jumprelu"):
        raise ValueError(f"{where}: {file}: activation: expected topk, relu, jumprelu or none, got {activation!r}")
    for name in _BY_LAYER:
        values = config.get(name)
        if isinstance(values, dict):
            # JSON, which is YAML too, has texts as keys.
            config[name] = {int(key): value for key, value in values.items() if str(key).isdecimal()}
    return dict(config)


def _layer_file(where: str, folder: Path, config: Mapping[str, Any], layer: int | None) -> Path:
    there = sorted(int(match[1]) for path in folder.iterdir() if (match := _FILE.fullmatch(path.name)))
    if not there:
        raise FileNotFoundError(f"{where}: expected layer_0.safetensors and so on in {folder}, found none")
    named = config.get("unpadded_widths")
    # Layers that ours padded hold zeros only.
    real = [number for number in there if not isinstance(named, dict) or number in named]
    if layer is None and len(real) != 1:
        raise ValueError(f"{where}: {folder} holds layers {real}: choose one with layer= (--layer)")
    layer = real[0] if layer is None else layer
    if layer not in real:
        raise ValueError(f"{where}: layer: expected one of {real}, got {layer}")
    return folder / f"layer_{layer}.safetensors"


def _whole(where: str, config: Mapping[str, Any], name: str, layer: int | None) -> int | None:
    """Of the layer, in an object by layer."""
    return whole(f"{where}: {name}", {f"layer {layer}": section(where, config, name).get(layer)}, f"layer {layer}")


def _hooks(where: str, config: Mapping[str, Any], layer: int | None) -> Hooks:
    def inside(name: str) -> str | None:
        hook = text(where, config, name)
        return f"blocks.{layer}.{hook}" if hook is not None and layer is not None else None

    return Hooks(
        source=inside("feature_input_hook"),
        target=inside("feature_output_hook"),
        model_name=text(where, config, "model_name"),
    )
