"""SAELens: a folder with cfg.json and sae_weights.safetensors. `W_enc [d_in, d_sae]`, a threshold a latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.files import read_json, read_safetensors, write_json, write_safetensors
from transcoder.interop.plain import Hooks, PlainWeights, matrix, take_tensors
from transcoder.interop.record import Conversion

TESTED = "sae-lens 6.54.12"
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
_VERSION = "6.54.12"
"""Written into the metadata: below 6 the reader would take the config for one of an older layout."""

_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_TRAINED = ("topk_transcoder", "batchtopk_transcoder", "matryoshka_batchtopk_transcoder")
"""Checkpoints of `transcoder.interop.saelens_training`'s classes."""
_SAES = ("standard", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
_RUNTIME_IDENTITY = ("none", "expected_average_only_in", "covariance_whitening", None, False)
"""Values of normalize_activations that do nothing in a saved SAE: SAELens folds them into the weights when it saves."""


def write(plain: PlainWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """Thresholds become `jumprelu_transcoder` (or its skip form); TopK only `topk`, on request, or thresholds where allowed;
    a ReLU (`transcoder`, `skip_transcoder`) on request and where allowed.

    Options: architecture ("topk", or one of SAELens' transcoders), threshold.
    """
    architecture = options.get("architecture")
    if architecture not in (None, "topk", *_TRANSCODERS):
        raise ValueError(
            f"saelens export: architecture: expected none, 'topk', {', '.join(map(repr, _TRANSCODERS))}, got {architecture!r}"
        )
    if architecture == "topk":
        plain = _as_topk_sae(plain, record)
    else:
        plain = plain.as_thresholds(
            record,
            options.get("threshold"),
            "SAELens' transcoders know thresholds only",
            "Its TopK is an SAE: where d_in equals d_out and there is no skip connection, architecture='topk' "
            "(--architecture topk) keeps the function.",
        )
        architecture = architecture or ("jumprelu_transcoder" if plain.W_skip is None else "jumprelu_skip_transcoder")
        if not architecture.startswith("jumprelu"):
            plain = plain.as_relu(record, f"SAELens' {architecture} is a ReLU")
        if "skip" not in architecture:
            plain = plain.without_skip(record, f"{architecture} has no skip connection")
        elif plain.W_skip is None:
            record.add("a skip connection of zeros added", "layout")
            plain = replace(plain, W_skip=torch.zeros(plain.d_out, plain.d_in))
    plain = plain.with_input_bias(None, record)
    thresholds = architecture.startswith("jumprelu")
    tensors = {
        "W_enc": plain.W_enc.T.contiguous(),
        "b_enc": plain.b_enc,
        "W_dec": plain.W_dec,
        "b_dec": plain.b_dec,
        **({} if plain.W_skip is None else {"W_skip": plain.W_skip}),
        **({"threshold": plain.latent_thresholds()} if thresholds else {}),
    }
    record.add(f"architecture {architecture}; W_enc transposed to [d_in, d_sae]", "layout")
    if thresholds:
        record.add("the threshold is written once a latent", "layout")
    if plain.widths and len(plain.widths) > 1:
        record.add("SAELens' inference SAEs know no Matryoshka widths: kept in the metadata only", "note")
    sae = {"k": plain.k, "rescale_acts_by_decoder_norm": False}
    config = {
        "d_in": plain.d_in,
        "d_sae": plain.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **(sae if architecture == "topk" else {"d_out": plain.d_out}),
        "metadata": _metadata(plain),
        "architecture": architecture,
    }
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, config)


def _as_topk_sae(plain: PlainWeights, record: Conversion) -> PlainWeights:
    if plain.activation != "topk":
        raise ValueError("saelens export: architecture 'topk': this transcoder is BatchTopK; leave architecture out")
    if plain.d_in != plain.d_out:
        raise ValueError(
            f"saelens export: architecture 'topk' is an SAE of one width, got d_in {plain.d_in} and d_out {plain.d_out}"
        )
    plain = plain.without_skip(record, "SAELens' topk has no skip connection")
    record.add(
        "SAELens has no TopK transcoder: written as its SAE, whose forward is the same function. The metadata name both hooks",
        "note",
    )
    return plain


def _metadata(plain: PlainWeights) -> dict[str, Any]:
    hooks = plain.hooks
    known = {
        "model_name": hooks.model_name,
        "hook_name": hooks.source,
        "hook_name_out": hooks.target,
        "context_size": hooks.context_size,
        "prepend_bos": hooks.prepend_bos,
    }
    return {
        "sae_lens_version": _VERSION,
        "sae_lens_training_version": None,
        **{name: value for name, value in known.items() if value is not None},
        "transcoder": {"k": plain.k, "widths": list(plain.widths or ())},
    }


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> PlainWeights:
    """A folder that `SAE.save_model`, `TrainingSAE.save_model` or `save_inference_model` wrote, or a checkpoint of SAELens'
    trainer; of our classes in its registry too."""
    where = "saelens import"
    config = read_json(where, path / CONFIG_FILE)
    architecture = _architecture(config)
    known = (*_TRANSCODERS, *_SAES, *_TRAINED)
    if architecture not in known:
        raise ValueError(
            f"{where}: {path / CONFIG_FILE}: architecture: expected one of {', '.join(known)}, got {architecture!r}"
        )
    tensors = dict(read_safetensors(where, path / WEIGHTS_FILE))
    _drop_scaling_factor(where, tensors, record)
    required = ["W_enc", "W_dec", "b_enc", "b_dec"]
    if "skip" in architecture or (architecture in _TRAINED and config.get("skip")):
        required.append("W_skip")
    if architecture.startswith("jumprelu"):
        required.append("threshold")
    if architecture in ("batchtopk", "matryoshka_batchtopk", *_TRAINED):
        required.append("topk_threshold")
    found = take_tensors(f"{where}: {path / WEIGHTS_FILE}", tensors, required)
    W_enc, W_dec = matrix(where, "W_enc", found["W_enc"]).T.contiguous(), matrix(where, "W_dec", found["W_dec"])
    b_enc = found["b_enc"]
    record.add(f"architecture {architecture}; W_enc transposed to a latent a row", "layout")
    _check_sizes(where, config, W_enc, W_dec)
    _check_normalization(config, record)
    if config.get("reshape_activations", "none") not in ("none", None):
        record.add(f"reads the heads of {config['reshape_activations']} flattened", "note")
    threshold, k = _selection(where, architecture, config, found)
    topk = architecture in ("topk", "topk_transcoder")
    if (config.get("rescale_acts_by_decoder_norm", False) and topk) or _rescaled(architecture, config):
        norms = torch.linalg.vector_norm(W_dec.double(), dim=1)
        record.add(
            "rescale_acts_by_decoder_norm: the decoder's norms were folded into W_enc, b_enc and W_dec", "rounding"
        )
        if bool((norms == 0).any()):
            raise ValueError(f"{where}: W_dec: expected no row of zeros with rescale_acts_by_decoder_norm, found some")
        W_enc = (W_enc.double() * norms[:, None]).float()
        b_enc = (b_enc.double() * norms).float()
        W_dec = (W_dec.double() / norms[:, None]).float()
    # Transcoders never subtract b_dec; SAEs do unless told otherwise.
    subtracts = architecture in _SAES and config.get("apply_b_dec_to_input", True) is not False
    ours, metadata = _own_metadata(config), config.get("metadata")
    return PlainWeights(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=found["b_dec"],
        W_skip=found.get("W_skip"),
        input_bias=found["b_dec"].clone() if subtracts else None,
        activation="topk" if topk else "threshold",
        k=k if k is not None else ours.get("k"),
        threshold=threshold,
        widths=_widths(config, ours, W_enc.shape[0]),
        hooks=_hooks(metadata if isinstance(metadata, dict) else config),
    )


def _architecture(config: Mapping[str, Any]) -> object:
    # Layouts before version 6 name no architecture, and TopK as an activation function.
    if "architecture" not in config or config["architecture"] == "standard":
        activation = config.get("activation_fn_str", config.get("activation_fn", "relu"))
        if activation == "topk":
            return "topk"
        if activation not in ("relu", None):
            return f"standard with activation_fn {activation}"
    return config.get("architecture", "standard")


def _drop_scaling_factor(where: str, tensors: dict[str, Tensor], record: Conversion) -> None:
    factor = tensors.pop("scaling_factor", None)
    if factor is not None and not bool((factor == 1).all()):
        raise ValueError(
            f"{where}: {WEIGHTS_FILE}: scaling_factor: expected ones (a finetuned scale is not read), got others"
        )
    if factor is not None:
        record.add("scaling_factor of ones left out", "layout")


def _check_sizes(where: str, config: Mapping[str, Any], W_enc: Tensor, W_dec: Tensor) -> None:
    sizes = {"d_sae": W_enc.shape[0], "d_in": W_enc.shape[1], "d_out": W_dec.shape[1]}
    for name, size in sizes.items():
        if config.get(name, size) != size:
            raise ValueError(f"{where}: {CONFIG_FILE} says {name} = {config[name]!r}, the weights have {size}")


def _check_normalization(config: Mapping[str, Any], record: Conversion) -> None:
    mode = config.get("normalize_activations", "none")
    if mode in ("layer_norm", "constant_norm_rescale"):
        record.change(f"normalize_activations {mode!r} rescales each token by itself, which a Transcoder does not do")
    elif mode not in _RUNTIME_IDENTITY and mode is not True:
        raise ValueError(f"saelens import: normalize_activations: expected a mode of SAELens, got {mode!r}")
    elif mode not in ("none", None, False):
        record.add(f"normalize_activations {mode!r}: does nothing in a saved SAE, as in SAELens", "note")


def _selection(
    where: str, architecture: str, config: Mapping[str, Any], found: Mapping[str, Tensor]
) -> tuple[Tensor | None, int | None]:
    """(threshold, of TopK the tracked one or None; k or None)."""
    if architecture in ("topk", "topk_transcoder"):
        arguments = config.get("activation_fn_kwargs")
        k = config.get("k", arguments.get("k") if isinstance(arguments, dict) else None)
        if not isinstance(k, int) or k < 1:
            raise ValueError(
                f"{where}: {CONFIG_FILE}: k: expected a whole number of latents a token for {architecture}, got {k!r}"
            )
        tracked = found.get("topk_threshold")
        # 0 is where SAELens starts: no batch was trained.
        return (tracked.float().reshape(()) if tracked is not None and bool(tracked > 0) else None), k
    if architecture.startswith("jumprelu"):
        return found["threshold"], None
    if "topk_threshold" in found:
        k = config.get("k")
        # SAELens allows a mean that is no whole number.
        return found["topk_threshold"].float().reshape(()), max(1, round(k)) if isinstance(k, (int, float)) else None
    return torch.tensor(0.0), None


def _rescaled(architecture: str, config: Mapping[str, Any]) -> bool:
    return architecture in ("batchtopk", "matryoshka_batchtopk", *_TRAINED) and bool(
        config.get("rescale_acts_by_decoder_norm", True)
    )


def _own_metadata(config: Mapping[str, Any]) -> dict[str, Any]:
    """k and widths from our own note in the metadata, or from SAELens' note on how it was trained."""
    metadata = config.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    ours, details = metadata.get("transcoder"), metadata.get("training_architecture_details")
    values = {
        **({"k": details.get("k"), "widths": details.get("matryoshka_widths")} if isinstance(details, dict) else {}),
        **(ours if isinstance(ours, dict) else {}),
    }
    k = values.get("k")
    whole = max(1, round(k)) if isinstance(k, (int, float)) and not isinstance(k, bool) else None
    return {"k": whole, "widths": values.get("widths")}


def _widths(config: Mapping[str, Any], ours: Mapping[str, Any], d_sae: int) -> tuple[int, ...] | None:
    widths = config.get("matryoshka_widths") or ours.get("widths")
    if not isinstance(widths, list) or not all(isinstance(width, int) for width in widths):
        return None
    widths = [width for width in widths if width <= d_sae]
    rising = all(a < b for a, b in pairwise(widths)) and (not widths or widths[0] > 0)
    # SAELens adds the full width itself where it is missing.
    return tuple(widths if widths[-1] == d_sae else [*widths, d_sae]) if widths and rising else None


def _hooks(metadata: Mapping[str, Any]) -> Hooks:
    def text(*names: str) -> str | None:
        return next((metadata[name] for name in names if isinstance(metadata.get(name), str)), None)

    source, target = text("hook_name", "hook_point"), text("hook_name_out")
    size, bos = metadata.get("context_size"), metadata.get("prepend_bos")
    return Hooks(
        source=source,
        target=target or source,
        model_name=text("model_name"),
        context_size=size if isinstance(size, int) else None,
        prepend_bos=bos if isinstance(bos, bool) else None,
    )
