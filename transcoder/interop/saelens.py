"""SAELens: a folder with cfg.json and sae_weights.safetensors. `W_enc [d_in, d_sae]`, a threshold a latent."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import locate, read_json, read_safetensors, write_json, write_safetensors
from transcoder.interop.folded_weights import FoldedWeights, Hooks, with_unit_decoder
from transcoder.interop.foreign_config import Flag, ForeignConfig, Mean, Object, Rising, Size, Text, nearest_whole
from transcoder.interop.layout import from_layout, to_layout

TESTED = "sae-lens 6.54.12"
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae_weights.safetensors"
SCALER_FILE, WHITENING_FILE = "activation_scaler.json", "activation_whitening.safetensors"
_VERSION = "6.54.12"
"""Written into the metadata: below 6 the reader would take the config for one of an older layout."""

_LAYOUT = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec", "W_skip": "W_skip"}
_TRANSCODERS = ("transcoder", "skip_transcoder", "jumprelu_transcoder", "jumprelu_skip_transcoder")
_TRAINED = ("topk_transcoder", "batchtopk_transcoder", "matryoshka_batchtopk_transcoder")
"""Checkpoints of `transcoder.interop.saelens_training`'s classes."""
_SAES = ("standard", "jumprelu", "topk", "batchtopk", "matryoshka_batchtopk")
_NORMALISATIONS = ("none", "expected_average_only_in", "covariance_whitening", "layer_norm", "constant_norm_rescale")


@dataclass(frozen=True)
class _Config(ForeignConfig):
    architecture: Any = None
    activation_fn: Any = "relu"
    activation_fn_str: Any = None
    activation_fn_kwargs: Object = None
    d_in: Size = None
    d_sae: Size = None
    d_out: Size = None
    k: Mean = None
    skip: Flag = False
    matryoshka_widths: Rising = None
    rescale_acts_by_decoder_norm: Flag = None
    apply_b_dec_to_input: Flag = None
    finetuning_scaling_factor: Any = None
    reshape_activations: Any = "none"
    normalize_activations: Any = "none"
    # Of training SAEs only.
    decoder_init_norm: Any = None
    metadata: Object = None


@dataclass(frozen=True)
class _Metadata(ForeignConfig):
    """In the config itself before version 6."""

    hook_name: Text = None
    hook_point: Text = None
    hook_name_out: Text = None
    model_name: Text = None
    context_size: Size = None
    prepend_bos: Flag = None
    training_architecture_details: Object = None
    transcoder: Object = None


@dataclass(frozen=True)
class _Note(ForeignConfig):
    """How it was trained: SAELens' note in the metadata (`matryoshka_widths`) or ours (`widths`)."""

    k: Mean = None
    widths: Rising = None
    matryoshka_widths: Rising = None


@dataclass(frozen=True)
class _Scaler(ForeignConfig):
    scaling_factor: Any = None
    has_whitening: Flag = None


def write(weights: FoldedWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
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
        weights = _as_topk_sae(weights, record)
    else:
        weights = weights.as_thresholds(
            record,
            options.get("threshold"),
            "SAELens' transcoders know thresholds only",
            "Its TopK is an SAE: where d_in equals d_out and there is no skip connection, architecture='topk' "
            "(--architecture topk) keeps the function.",
        )
        architecture = architecture or ("jumprelu_transcoder" if weights.W_skip is None else "jumprelu_skip_transcoder")
        if not architecture.startswith("jumprelu"):
            weights = weights.as_relu(record, f"SAELens' {architecture} is a ReLU")
        if "skip" not in architecture:
            weights = weights.without_skip(record, f"{architecture} has no skip connection")
        elif weights.W_skip is None:
            record.add("a skip connection of zeros added", "layout")
            weights = replace(weights, W_skip=torch.zeros(weights.d_out, weights.d_in))
    weights = weights.with_input_bias(None, record)
    layout, by_threshold = dict(_LAYOUT), architecture.startswith("jumprelu")
    if by_threshold:
        layout["threshold"], weights = "threshold", weights.with_latent_thresholds()
    record.add(f"architecture {architecture}; W_enc transposed to [d_in, d_sae]", "layout")
    if by_threshold:
        record.add("the threshold is written once a latent", "layout")
    if weights.nested:
        record.add("SAELens' inference SAEs know no Matryoshka widths: kept in the metadata only", "note")
    sae = {"k": weights.k, "rescale_acts_by_decoder_norm": False}
    config = {
        "d_in": weights.d_in,
        "d_sae": weights.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": False,
        "normalize_activations": "none",
        "reshape_activations": "none",
        **(sae if architecture == "topk" else {"d_out": weights.d_out}),
        "metadata": _metadata(weights),
        "architecture": architecture,
    }
    write_safetensors(folder / WEIGHTS_FILE, to_layout(weights, layout))
    write_json(folder / CONFIG_FILE, config)


def _as_topk_sae(weights: FoldedWeights, record: Conversion) -> FoldedWeights:
    if weights.activation != "topk":
        raise ValueError("saelens export: architecture 'topk': this transcoder is BatchTopK; leave architecture out")
    weights.check_one_width("saelens export: architecture 'topk'")
    weights = weights.without_skip(record, "SAELens' topk has no skip connection")
    record.add(
        "SAELens has no TopK transcoder: written as its SAE, whose forward is the same function. The metadata name both hooks",
        "note",
    )
    return weights


def _metadata(weights: FoldedWeights) -> dict[str, Any]:
    hooks = weights.hooks
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
        "transcoder": {"k": weights.k, "widths": list(weights.widths or ())},
    }


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """A folder that `SAE.save_model`, `TrainingSAE.save_model` or `save_inference_model` wrote, or a checkpoint of SAELens'
    trainer; of our classes in its registry too."""
    where = "saelens import"
    path = locate(where, path, (CONFIG_FILE,)).parent
    in_file = f"{where}: {path / WEIGHTS_FILE}"
    values = read_json(where, path / CONFIG_FILE)
    config = _Config.of(f"{where}: {path / CONFIG_FILE}", values)
    architecture, known = _architecture(config), (*_TRANSCODERS, *_SAES, *_TRAINED)
    if architecture not in known:
        raise ValueError(f"{config.where}: architecture: expected one of {', '.join(known)}, got {architecture!r}")
    topk, is_sae = architecture in ("topk", "topk_transcoder"), architecture in _SAES
    tracked = architecture in ("batchtopk", "matryoshka_batchtopk", *_TRAINED)
    layout = {name: field for name, field in _LAYOUT.items() if name != "W_skip"}
    if "skip" in architecture or (architecture in _TRAINED and config.skip):
        layout["W_skip"] = "W_skip"
    if architecture.startswith("jumprelu") or tracked:
        layout["topk_threshold" if tracked else "threshold"] = "threshold"
    tensors = dict(read_safetensors(where, path / WEIGHTS_FILE))
    scaling_factor = _scaling_factors(in_file, tensors, config, record)
    fields = from_layout(in_file, tensors, layout, record)
    if scaling_factor is not None:
        fields["W_dec"] = (fields["W_dec"].double() * scaling_factor[:, None]).float()
    rescale = config.rescale_acts_by_decoder_norm
    rescaled = bool(tracked if rescale is None else rescale) and (tracked or topk)
    trained = tracked or "decoder_init_norm" in values
    fields = _fold_scale(config, path, fields, record, trained=trained, rescaled=rescaled)
    d_sae, d_in = fields["W_enc"].shape
    record.add(f"architecture {architecture}; W_enc transposed to a latent a row", "layout")
    config.check_sizes(d_sae=d_sae, d_in=d_in, d_out=fields["W_dec"].shape[1])
    config.require("reshape_activations", config.reshape_activations in ("none", "hook_z"), "none or hook_z")
    if config.reshape_activations == "hook_z":
        record.add("reads the heads of hook_z flattened", "note")
    fields["threshold"] = _threshold(in_file, fields.get("threshold"), topk, tracked)
    if rescaled:
        fields = with_unit_decoder(in_file, fields, record, "rescale_acts_by_decoder_norm")
    # Transcoders never subtract b_dec; SAEs do unless told otherwise.
    subtracts = is_sae if config.apply_b_dec_to_input is None else config.apply_b_dec_to_input
    config.require("apply_b_dec_to_input", is_sae or not subtracts, f"false of a {architecture}, as SAELens does")
    metadata = _Metadata.of(config.where + ": metadata" * bool(config.metadata), config.metadata or values)
    k, widths = _noted(metadata)
    if topk:
        k = _topk_k(config) or options.get("k")
        if k is None:
            raise config.refusal("k", f"a whole number of latents a token for {architecture}; give it: k= (--k)")
    elif tracked and config.k is not None:
        k = nearest_whole(config.k)
    widths = [width for width in config.matryoshka_widths or widths if width <= d_sae]
    if widths and widths[-1] != d_sae:
        # SAELens adds the full width itself where it is missing.
        widths.append(d_sae)
    hook = metadata.hook_name or metadata.hook_point
    return FoldedWeights(
        **fields,
        input_bias=fields["b_dec"].clone() if subtracts else None,
        activation="topk" if topk else "threshold",
        k=k,
        widths=tuple(widths) or None,
        hooks=Hooks(
            hook, metadata.hook_name_out or hook, metadata.model_name, metadata.context_size, metadata.prepend_bos
        ),
    )


def _architecture(config: _Config) -> Any:
    # Layouts before version 6 name no architecture, and TopK as an activation function.
    if config.architecture in (None, "standard"):
        activation = config.activation_fn_str or config.activation_fn
        if activation == "topk":
            return "topk"
        return "standard" if activation == "relu" else f"standard with activation_fn {activation}"
    return config.architecture


def _scaling_factors(where: str, tensors: dict[str, Tensor], config: _Config, record: Conversion) -> Tensor | None:
    """[d_sae] fp64 or None: by what a finetuned SAE multiplies each activation before it decodes."""
    factor = tensors.pop("scaling_factor", None)
    if factor is None:
        return None
    if bool((factor == 1).all()):
        record.add("scaling_factor of ones left out", "layout")
        return None
    rows = tensors["W_dec"].shape[:1] if "W_dec" in tensors else None
    if not config.finetuning_scaling_factor or factor.shape != rows:
        raise ValueError(
            f"{where}: scaling_factor: expected ones, or one a latent with finetuning_scaling_factor true in {CONFIG_FILE}"
        )
    record.add("scaling_factor was folded into W_dec: activations are those before it", "rounding")
    return factor.double()


def _threshold(where: str, threshold: Tensor | None, topk: bool, tracked: bool) -> Tensor | None:
    """Of TopK the tracked one, or None."""
    if threshold is None or not tracked:
        return torch.tensor(0.0) if threshold is None and not topk else threshold
    if threshold.numel() != 1:
        raise ValueError(f"{where}: topk_threshold: expected one number, got shape {list(threshold.shape)}")
    # 0 is where SAELens starts: no batch was trained.
    return None if topk and not bool(threshold > 0) else threshold.reshape(())


def _topk_k(config: _Config) -> int | None:
    k = config.k or _Note.of(f"{config.where}: activation_fn_kwargs", config.activation_fn_kwargs).k
    config.require("k", k is None or isinstance(k, int), "a whole number of latents a token")
    return k  # type: ignore[return-value]


def _noted(metadata: _Metadata) -> tuple[int | None, list[int]]:
    """k and widths from our own note in the metadata, or from SAELens' on how it was trained."""
    where = metadata.where
    own = _Note.of(f"{where}.transcoder", metadata.transcoder)
    saelens = _Note.of(f"{where}.training_architecture_details", metadata.training_architecture_details)
    return nearest_whole(own.k or saelens.k), own.widths or saelens.matryoshka_widths or []


def _fold_scale(
    config: _Config, path: Path, fields: dict[str, Any], record: Conversion, *, trained: bool, rescaled: bool
) -> dict[str, Any]:
    """The weights for activations in their own units, as SAELens folds its trainer's scale when training ends.

    Args:
        trained: these are a training SAE's weights, so a scale that is not folded yet is the trainer's.
        rescaled: the threshold is in units of the decoder's norm, which the fold divides.

    Equivalent to: `SAE.fold_activation_norm_scaling_factor`, in fp64.

    Raises:
        ChangedFunctionError (a ValueError): each token is normalised by itself; or the scale of a training SAE is missing.
        ValueError: an unknown mode; a scale that is no number, does not go with the config, or is a whitening.
    """
    mode = config.normalize_activations
    if isinstance(mode, bool):
        # Layouts before version 6.
        mode = "expected_average_only_in" if mode else "none"
    config.require("normalize_activations", mode in _NORMALISATIONS, ", ".join(_NORMALISATIONS))
    if mode in ("layer_norm", "constant_norm_rescale"):
        record.change(f"normalize_activations {mode!r} rescales each token by itself, which a Transcoder does not do")
    factor = _scaling_factor(path / SCALER_FILE)
    if factor is None:
        if mode in ("expected_average_only_in", "covariance_whitening") and trained:
            record.change(
                f"it was trained with normalize_activations {mode!r}, and the scale is not in {SCALER_FILE} next to the "
                "weights: raw activations would be taken for scaled ones",
                "Put the checkpoint's file there, or import what SAELens saved when training ended.",
            )
        elif mode in ("expected_average_only_in", "covariance_whitening"):
            record.add(
                f"normalize_activations {mode!r}: no scale in the files; nothing is scaled, as in SAELens' load_from_disk",
                "note",
            )
        return fields
    if mode != "expected_average_only_in":
        raise ValueError(
            f"saelens import: {path / SCALER_FILE}: scaling_factor is {factor:g}, and {CONFIG_FILE} says "
            f"normalize_activations {mode!r}, as after a fold: which one is it? Take the file away if the weights are folded"
        )
    record.add(f"scaling_factor {factor:g} of {SCALER_FILE} was folded into W_enc, W_dec and b_dec", "rounding")
    by = {"W_enc": factor, "W_dec": 1 / factor, "b_dec": 1 / factor}
    if rescaled:
        by["threshold"] = 1 / factor
    return {name: (t.double() * by[name]).float() if name in by else t for name, t in fields.items()}


def _scaling_factor(file: Path) -> float | None:
    if not file.is_file():
        return None
    values = read_json("saelens import", file)
    scaler = _Scaler.of(f"saelens import: {file}", values)
    whitening = scaler.has_whitening
    if file.with_name(WHITENING_FILE).is_file() if whitening is None else whitening:
        raise ValueError(
            f"{scaler.where}: a whitening is not read. Fold it in SAELens (sae.fold_activation_whitening) and save that, or "
            "import what it saved when training ended"
        )
    factor = scaler.scaling_factor
    if factor is None and "scaling_factor" in values:
        return None
    number = isinstance(factor, (int, float)) and not isinstance(factor, bool) and 0 < factor < math.inf
    scaler.require("scaling_factor", number, "a number above 0" + " or null" * (factor is None))
    return float(factor)
