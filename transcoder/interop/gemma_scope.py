"""Gemma Scope: params.npz with `W_enc [d_in, d_sae]`, `W_dec`, `b_enc`, `b_dec`, `threshold [d_sae]`; read too: Gemma Scope 2,
params.safetensors with the same names in small letters, perhaps `affine_skip_connection [d_in, d_out]` and a config.json.

The first generation's transcoders read `blocks.L.ln2.hook_normalized`, the RMSNorm before its weight, the second's
`blocks.L.mlp.hook_in`, behind it; both write `blocks.L.hook_mlp_out`. From one hook to the other diag(w) goes into or out of
the encoder; one that reads the residual stream has the norm's division in between, which no weight can hold.
"""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy
import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import existing, locate, read_json, read_safetensors
from transcoder.interop.folded_weights import FoldedWeights, Hooks
from transcoder.interop.foreign_config import Flag, ForeignConfig, Mean, Size, Text, nearest_whole
from transcoder.interop.layout import from_layout, to_layout

TESTED = "google's files as sae-lens 6.54.12 and circuit-tracer 0.4.1 and 0.5.0 read them"
READ, READ_BEHIND, WRITTEN = "ln2.hook_normalized", "mlp.hook_in", "hook_mlp_out"
WEIGHTS_FILE = "params.npz"
_LAYOUT = {"W_enc": "W_enc.T", "W_dec": "W_dec", "b_enc": "b_enc", "b_dec": "b_dec", "threshold": "threshold"}
WEIGHTS_FILE_2, CONFIG_FILE_2 = "params.safetensors", "config.json"
_LAYOUT_2 = {name.lower(): field for name, field in _LAYOUT.items()} | {"affine_skip_connection": "W_skip.T"}
_SITES = {"res": "hook_resid_post", "resid_post": "hook_resid_post", "att": "attn.hook_z", "attn_out": "attn.hook_z"}
_SITES |= {"mlp": "hook_mlp_out", "mlp_out": "hook_mlp_out"}
"""Where sparse autoencoders read and write: the end of the first generation's repositories, the second's folders."""
_HF_HOOKS = {
    "pre_feedforward_layernorm.output": READ_BEHIND,
    "post_feedforward_layernorm.output": WRITTEN,
    "output": "hook_resid_post",
    "self_attn.o_proj.input": "attn.hook_z",
}
_FLOATING = ("float32", "float16", "float64")


def write(weights: FoldedWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """params.npz. Options: norm_weight (see the function), where the transcoder reads behind the norm's weight; threshold."""
    weights = weights.as_thresholds(record, options.get("threshold"), "Gemma Scope knows JumpReLU thresholds only")
    weights = weights.without_skip(record, "params.npz has no skip connection")
    weights = _to_normalized(weights.with_input_bias(None, record), record, options)
    if weights.nested:
        record.add("params.npz holds no Matryoshka widths: lost", "note")
    record.add("k, hooks and the model's name are not in params.npz: lost", "note")
    record.add("W_enc transposed to [d_in, d_sae]; the threshold is written once a latent", "layout")
    arrays: dict[str, Any] = {
        name: tensor.numpy() for name, tensor in to_layout(weights.with_latent_thresholds(), _LAYOUT).items()
    }
    numpy.savez(folder / WEIGHTS_FILE, **arrays)


def _to_normalized(weights: FoldedWeights, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    source, target = weights.hooks.within_block()
    if source is None or target is None:
        raise ValueError(
            "gemma-scope export: expected the hooks, which this transcoder does not know: the format has its own "
            f"({READ} to {WRITTEN}). Give source_hook= and target_hook= (--source-hook, --target-hook)"
        )
    if target != WRITTEN:
        record.change(f"it writes {target}, and readers of this format add it at {WRITTEN}")
    if source != READ_BEHIND:
        _unused_weight(options, weights.d_in, weights.hooks.layer, record)
    if source == READ:
        return weights
    if source != READ_BEHIND:
        record.change(f"it reads {source}, this format is read at {READ}: the RMSNorm's division lies between them")
        return weights
    weight = options.get("norm_weight")
    if weight is None:
        raise ValueError(
            f"gemma-scope export: it reads {source}, behind the RMSNorm's weight: give norm_weight= (--norm-weight FILE), "
            "[d_in], the factor as it is applied (1 + weight in Gemma's files), or the model's Hugging Face folder"
        )
    w = norm_weight(weight, weights.d_in, weights.hooks.layer)
    record.add(f"the RMSNorm's weight was folded into W_enc: {READ_BEHIND} = {READ} * w", "rounding")
    return replace(weights, W_enc=(weights.W_enc.double() * w).float())


@dataclass(frozen=True)
class _Config(ForeignConfig):
    """config.json of the second generation, which may be missing."""

    architecture: Text = None
    model_name: Text = None
    type: Text = None
    hf_hook_point_in: Text = None
    hf_hook_point_out: Text = None
    width: Size = None
    l0: Mean = None
    affine_connection: Flag = None


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """params.npz or params.safetensors, or the folder that it is in, or the only one below.

    Options: layer (else from the path); source_hook: where the transcoder shall read, the format's own hook or the one behind
    (before) the norm's weight, which needs norm_weight.
    """
    where = "gemma-scope import"
    file = locate(where, path, (WEIGHTS_FILE, WEIGHTS_FILE_2))
    second = file.suffix == ".safetensors"
    config = _config(where, file) if second else _Config(where)
    tensors = read_safetensors(where, file) if second else _read_npz(where, file)
    if second:
        _check_single_layer(f"{where}: {file}", tensors)
    layout = _LAYOUT_2 if second else _LAYOUT
    optional = ("affine_skip_connection",) * second
    fields = from_layout(f"{where}: {file}", tensors, layout, record, optional)
    if second:
        config.check_sizes(width=fields["W_enc"].shape[0])
        affine = "W_skip" in fields
        config.require("affine_connection", config.affine_connection in (None, affine), f"{affine}, as in the weights")
    record.add("W_enc transposed to a latent a row", "layout")
    layer, own, target = _place(config, file, second)
    layer = options.get("layer", layer)
    prefix = "" if layer is None else f"blocks.{layer}."
    wanted = (options.get("source_hook") or prefix + own).removeprefix(prefix)
    fields |= _moved(where, fields, own, wanted, layer, options, record)
    # The folders are called average_l0_N, the second generation's config says it: the nearest thing to a k that there is.
    named = re.search(r"average_l0_(\d+)", str(file))
    k = nearest_whole(float(named[1])) if named else nearest_whole(config.l0)
    if k is not None:
        record.add(f"k = {k}, the average L0 that its publishers give, for further training", "note")
    hooks = Hooks(model_name=_model_name(config, file))
    if layer is not None:
        hooks = replace(hooks, source=prefix + wanted, target=prefix + target)
    return FoldedWeights(**fields, activation="threshold", k=k, hooks=hooks)


def _place(config: _Config, file: Path, second: bool) -> tuple[int | None, str, str]:
    """(layer, source hook, target hook) within the block: of the config, else of the path."""
    match = re.search(r"layers\.(\d+)\.(.+)$", config.hf_hook_point_in or "")
    if match is not None and match[2] in _HF_HOOKS:
        source = _HF_HOOKS[match[2]]
        out = (config.hf_hook_point_out or "").partition(f"layers.{match[1]}.")[2]
        return int(match[1]), source, _HF_HOOKS.get(out, WRITTEN if config.type == "transcoder" else source)
    layers = re.findall(r"layer_(\d+)", str(file))
    layer = int(layers[-1]) if layers else None
    pattern = (
        r"(resid_post|attn_out|mlp_out)(?:_all)?/[^/]+$"
        if second
        else r"gemma-scope-\w+-(?:pt|it)-(res|att|mlp)(?:-\w+)?/"
    )
    site = re.search(pattern, file.parent.as_posix() + "/" * (not second))
    return (layer, _SITES[site[1]], _SITES[site[1]]) if site else (layer, READ_BEHIND if second else READ, WRITTEN)


def _config(where: str, file: Path) -> _Config:
    there = file.parent / CONFIG_FILE_2
    config = _Config.of(f"{where}: {there}", read_json(where, there) if there.is_file() else {})
    config.require("architecture", config.architecture in (None, "jump_relu"), "jump_relu")
    return config


def _check_single_layer(where: str, tensors: Mapping[str, Tensor]) -> None:
    """ValueError for the second generation's cross-layer transcoders and crosscoders, which have an axis more."""
    three = [name for name in ("w_enc", "w_dec") if name in tensors and tensors[name].dim() == 3]
    if three:
        what = "a crosscoder" if "w_enc" in three else "one layer of a cross-layer transcoder"
        shapes = ", ".join(f"{name} {list(tensors[name].shape)}" for name in three)
        raise ValueError(
            f"{where}: expected a transcoder of one layer, got {what} ({shapes}), which a Transcoder does not hold: take one "
            "of the folders transcoder/ or transcoder_all/ of the same repository"
        )


def _moved(
    where: str,
    fields: Mapping[str, Tensor],
    own: str,
    wanted: str,
    layer: int | None,
    options: Mapping[str, Any],
    record: Conversion,
) -> dict[str, Tensor]:
    """The matrices that read x, for x at the hook `wanted` instead of the format's `own`."""
    d_in = fields["W_enc"].shape[1]
    if wanted == own or {wanted, own} != {READ, READ_BEHIND}:
        _unused_weight(options, d_in, layer, record)
        if wanted != own:
            record.change(
                f"to read {wanted} instead of {own} leaves out what lies between them, such as an RMSNorm's division"
            )
        return {}
    if options.get("norm_weight") is None:
        raise ValueError(f"{where}: to read {wanted} give norm_weight= (--norm-weight), the factor as applied")
    w = norm_weight(options["norm_weight"], d_in, layer)
    if wanted == READ_BEHIND:
        if bool((w == 0).any()):
            raise ValueError(f"{where}: norm_weight: expected no zeros to read behind it, got {int((w == 0).sum())}")
        record.add(f"1 / w of the RMSNorm was folded into W_enc: {READ} = {READ_BEHIND} / w", "rounding")
        w = 1 / w
    else:
        record.add(f"the RMSNorm's weight was folded into W_enc: {READ_BEHIND} = {READ} * w", "rounding")
    return {name: (fields[name].double() * w).float() for name in ("W_enc", "W_skip") if name in fields}


def _model_name(config: _Config, file: Path) -> str | None:
    """As the hub has it: of the config, whose spelling varies, or of the repository in the path."""
    name = config.model_name
    if name is None and (match := re.search(r"gemma-scope-2-(\w+-(?:pt|it))", str(file))):
        name = f"gemma-3-{match[1]}"
    if name is None:
        return None
    name = name.rsplit("/")[-1].replace("gemma-v3", "gemma-3")
    # The smallest one has no suffix there.
    return "google/" + (name.removesuffix("-pt") if "270m" in name else name)


def _read_npz(where: str, file: Path) -> dict[str, Tensor]:
    try:
        with numpy.load(file, allow_pickle=False) as archive:
            arrays: dict[str, Any] = {name: archive[name] for name in archive.files}
    except (OSError, ValueError, EOFError, KeyError, AttributeError, TypeError, zipfile.BadZipFile) as error:
        raise ValueError(f"{where}: {file} is not an .npz of plain arrays, or a torn one: {error}") from error
    for name, array in arrays.items():
        if array.dtype not in _FLOATING:
            raise ValueError(
                f"{where}: {file}: {name}: expected {', '.join(_FLOATING)} of this machine, got {array.dtype}"
            )
    return {name: torch.from_numpy(numpy.ascontiguousarray(array)) for name, array in arrays.items()}


def _unused_weight(options: Mapping[str, Any], d_in: int, layer: int | None, record: Conversion) -> None:
    if options.get("norm_weight") is not None:
        # Read all the same: a path that is wrong here is wrong.
        norm_weight(options["norm_weight"], d_in, layer)
        record.add(f"norm_weight is not used: only what reads {READ_BEHIND} has it to fold", "note")


def norm_weight(given: Tensor | str | Path, d_in: int, layer: int | None) -> Tensor:
    """[d_in] fp64: the factor that the RMSNorm before the MLP applies.

    Args:
        given: the factor itself; a .npy file of it; or a Hugging Face folder of a Gemma or Llama model, whose norm weight of
            `layer` is read (Gemma's files hold it less 1).
    """
    if isinstance(given, Tensor):
        weight = given.detach().cpu().double()
    elif Path(given).is_dir():
        weight = _from_model(Path(given), layer)
    else:
        file = existing("norm_weight", Path(given), "a .npy file or a model's folder")
        try:
            weight = torch.from_numpy(numpy.load(file, allow_pickle=False)).double()
        except (OSError, ValueError, EOFError, TypeError) as error:
            raise ValueError(f"norm_weight: {file}: expected a .npy array of numbers: {error}") from error
    if tuple(weight.shape) != (d_in,) or not bool(torch.isfinite(weight).all()):
        raise ValueError(f"norm_weight: expected [{d_in}] finite numbers, got shape {list(weight.shape)}")
    return weight


def _from_model(folder: Path, layer: int | None) -> Tensor:
    if layer is None:
        raise ValueError("norm_weight: expected a hook of the form blocks.L..., to know which layer's norm to read")
    from safetensors import safe_open

    config = json.loads(existing("norm_weight", folder / "config.json", "config.json").read_bytes())
    # Where a norm follows attention too, the MLP has its own before it.
    names = [
        f"model.layers.{layer}.{norm}.weight" for norm in ("pre_feedforward_layernorm", "post_attention_layernorm")
    ]
    files = sorted(folder.glob("*.safetensors"))
    for name in names:
        for file in files:
            with safe_open(file, framework="pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 (no container, it has keys() only)
                    weight = tensors.get_tensor(name).double()
                    return weight + 1 if str(config.get("model_type")).startswith("gemma") else weight
    raise ValueError(f"norm_weight: expected {' or '.join(names)} in the safetensors files of {folder}, found neither")
