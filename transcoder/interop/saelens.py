"""SAELens: a folder with cfg.json and sae_weights.safetensors. `W_enc [d_in, d_sae]`, a threshold a latent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_json, read_safetensors, write_json, write_safetensors
from transcoder.interop.folded_weights import Hooks, PlainWeights, matrix, take_tensors
from transcoder.interop.foreign_config import check_size, flag, mean_number, rising, section, text, whole
from transcoder.interop.saelens_scale import fold_scale

TESTED = "sae-lens 6.54.12"
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
_VERSION = "6.54.12"
"""Written into the metadata: below 6 the reader would take the config for one of an older layout."""

_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_TRAINED = ("topk_transcoder", "batchtopk_transcoder", "matryoshka_batchtopk_transcoder")
"""Checkpoints of `transcoder.interop.saelens_training`'s classes."""
_SAES = ("standard", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")


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
    settings, weights = f"{where}: {path / CONFIG_FILE}", f"{where}: {path / WEIGHTS_FILE}"
    required = ["W_enc", "W_dec", "b_enc", "b_dec"]
    if "skip" in architecture or (architecture in _TRAINED and flag(settings, config, "skip", False)):
        required.append("W_skip")
    if architecture.startswith("jumprelu"):
        required.append("threshold")
    tracked = architecture in ("batchtopk", "matryoshka_batchtopk", *_TRAINED)
    if tracked:
        required.append("topk_threshold")
    found = take_tensors(weights, tensors, required, record)
    rescaled = flag(settings, config, "rescale_acts_by_decoder_norm", tracked) and (tracked or architecture == "topk")
    # Only the configurations of training SAEs have this key.
    trained = tracked or "decoder_init_norm" in config
    found = fold_scale(where, path / CONFIG_FILE, config, found, record, trained=trained, rescaled=rescaled)
    W_enc, W_dec = matrix(weights, "W_enc", found["W_enc"]).T.contiguous(), matrix(weights, "W_dec", found["W_dec"])
    b_enc = found["b_enc"]
    record.add(f"architecture {architecture}; W_enc transposed to a latent a row", "layout")
    for name, size in (("d_sae", W_enc.shape[0]), ("d_in", W_enc.shape[1]), ("d_out", W_dec.shape[1])):
        check_size(settings, config, name, size)
    reshape = config.get("reshape_activations")
    if reshape not in ("none", "hook_z", None):
        raise ValueError(f"{settings}: reshape_activations: expected none or hook_z, got {reshape!r}")
    if reshape == "hook_z":
        record.add("reads the heads of hook_z flattened", "note")
    if tracked and found["topk_threshold"].numel() != 1:
        shape = list(found["topk_threshold"].shape)
        raise ValueError(f"{weights}: topk_threshold: expected one number, got shape {shape}")
    threshold, k = _selection(settings, architecture, config, found)
    if rescaled:
        norms = torch.linalg.vector_norm(W_dec.double(), dim=1)
        record.add(
            "rescale_acts_by_decoder_norm: the decoder's norms were folded into W_enc, b_enc and W_dec", "rounding"
        )
        if bool((norms == 0).any()):
            raise ValueError(
                f"{weights}: W_dec: expected no row of zeros with rescale_acts_by_decoder_norm, found some"
            )
        W_enc = (W_enc.double() * norms[:, None]).float()
        b_enc = (b_enc.double() * norms).float()
        W_dec = (W_dec.double() / norms[:, None]).float()
    # Transcoders never subtract b_dec; SAEs do unless told otherwise.
    subtracts = flag(settings, config, "apply_b_dec_to_input", architecture in _SAES)
    if subtracts and architecture not in _SAES:
        raise ValueError(
            f"{settings}: apply_b_dec_to_input: expected false of a {architecture}, as SAELens does, got true"
        )
    ours = _own_metadata(settings, config)
    return PlainWeights(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=found["b_dec"],
        W_skip=found.get("W_skip"),
        input_bias=found["b_dec"].clone() if subtracts else None,
        activation="topk" if architecture in ("topk", "topk_transcoder") else "threshold",
        k=k if k is not None else ours["k"],
        threshold=threshold,
        widths=_widths(settings, config, ours["widths"], W_enc.shape[0]),
        hooks=_hooks(settings, section(settings, config, "metadata") or config),
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


def _selection(
    where: str, architecture: str, config: Mapping[str, Any], found: Mapping[str, Tensor]
) -> tuple[Tensor | None, int | None]:
    """(threshold, of TopK the tracked one or None; k or None)."""
    if architecture in ("topk", "topk_transcoder"):
        k = whole(where, config, "k") or whole(where, section(where, config, "activation_fn_kwargs"), "k")
        if k is None:
            raise ValueError(f"{where}: k: expected a whole number of latents a token for {architecture}, found none")
        tracked = found.get("topk_threshold")
        # 0 is where SAELens starts: no batch was trained.
        return (tracked.reshape(()) if tracked is not None and bool(tracked > 0) else None), k
    if architecture.startswith("jumprelu"):
        return found["threshold"], None
    if "topk_threshold" in found:
        # SAELens allows a mean that is no whole number.
        return found["topk_threshold"].reshape(()), mean_number(where, "k", config.get("k"))
    return torch.tensor(0.0), None


def _own_metadata(where: str, config: Mapping[str, Any]) -> dict[str, Any]:
    """k and widths from our own note in the metadata, or from SAELens' note on how it was trained."""
    metadata = section(where, config, "metadata")
    found: dict[str, Any] = {"k": None, "widths": []}
    for note, widths in (("training_architecture_details", "matryoshka_widths"), ("transcoder", "widths")):
        values, name = section(f"{where}: metadata", metadata, note), f"metadata.{note}"
        found["k"] = mean_number(where, f"{name}.k", values.get("k")) or found["k"]
        found["widths"] = rising(where, f"{name}.{widths}", values.get(widths)) or found["widths"]
    return found


def _widths(where: str, config: Mapping[str, Any], noted: list[int], d_sae: int) -> tuple[int, ...] | None:
    widths = rising(where, "matryoshka_widths", config.get("matryoshka_widths")) or noted
    widths = [width for width in widths if width <= d_sae]
    # SAELens adds the full width itself where it is missing.
    return tuple(widths if widths[-1] == d_sae else [*widths, d_sae]) if widths else None


def _hooks(where: str, metadata: Mapping[str, Any]) -> Hooks:
    source = text(where, metadata, "hook_name") or text(where, metadata, "hook_point")
    known = metadata.get("prepend_bos") is not None
    return Hooks(
        source=source,
        target=text(where, metadata, "hook_name_out") or source,
        model_name=text(where, metadata, "model_name"),
        context_size=whole(where, metadata, "context_size", least=0),
        prepend_bos=flag(where, metadata, "prepend_bos", None) if known else None,
    )
