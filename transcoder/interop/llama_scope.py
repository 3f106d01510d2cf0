"""Llama Scope and what its library (OpenMOSS' Language-Model-SAEs) wrote since: sparse autoencoders and transcoders. Read only.

Three layouts: Llama Scope itself has hyperparams.json and checkpoints/final.safetensors, with one threshold in the JSON; Llama
Scope R1-Distill config.json and sae_weights.safetensors, with `log_jumprelu_threshold`; the library today the same files, with
`W_E [d, d_sae]`, `b_E`, `W_D`, `b_D`. All of them may be for activations of mean norm sqrt(d): the dataset's norms are folded.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import locate, read_json, read_state, unwrapped
from transcoder.interop.folded_weights import FoldedWeights, Hooks, batch_topk_at_inference, with_unit_decoder
from transcoder.interop.foreign_config import Flag, ForeignConfig, Object, Size, Text, Whole
from transcoder.interop.layout import from_layout

TESTED = "the library's source at 4ec6f0a (Llama Scope), 9c97b67 (R1-Distill) and 95281ac"
OLD_CONFIG_FILE, CONFIG_FILE = "hyperparams.json", "config.json"
_WEIGHTS = (
    "sae_weights.safetensors",
    "checkpoints/pruned.safetensors",
    "checkpoints/final.safetensors",
    "*.safetensors",
)
_NORM = "dataset_average_activation_norm."
_THRESHOLD = "log_jumprelu_threshold"
_LAYOUTS = (
    {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T", "decoder.bias": "b_dec"},
    {"W_E": "W_enc.T", "b_E": "b_enc", "W_D": "W_dec", "b_D": "b_dec"},
)
_NORMALISATIONS = ("token-wise", "batch-wise", "dataset-wise", "inference", "none")


@dataclass(frozen=True)
class _Config(ForeignConfig):
    sae_type: Text = "sae"
    hook_point_in: Text = None
    hook_point_out: Text = None
    d_model: Size = None
    d_sae: Size = None
    act_fn: Text = "relu"
    top_k: Whole = None
    jump_relu_threshold: Any = 0.0
    norm_activation: Text = None
    dataset_average_activation_norm: Object = None
    sparsity_include_decoder_norm: Flag = True
    use_decoder_bias: Flag = True
    apply_decoder_bias_to_pre_encoder: Flag = None
    use_glu_encoder: Flag = False


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """The folder with hyperparams.json or config.json, or the only one below. Options: threshold, of a BatchTopK."""
    where = "llama-scope import"
    config_file = locate(where, path.parent if path.is_file() else path, (OLD_CONFIG_FILE, CONFIG_FILE))
    old = config_file.name == OLD_CONFIG_FILE
    config = _Config.of(f"{where}: {config_file}", read_json(where, config_file))
    config.require("sae_type", config.sae_type == "sae", "'sae' (one layer, one dictionary)")
    config.require("use_glu_encoder", not config.use_glu_encoder, "false: a gated encoder is another function")
    file = path if path.is_file() and path != config_file else locate(where, config_file.parent, _WEIGHTS)
    state = {name.removeprefix("activation_function."): t for name, t in unwrapped(read_state(where, file)).items()}
    fields = _fields(f"{where}: {file}", state, config, record)
    d_sae, d_in = fields["W_enc"].shape
    config.check_sizes(d_model=d_in, d_sae=d_sae)
    # Llama Scope's own default subtracts; today's library knows no such thing.
    subtracts = config.apply_decoder_bias_to_pre_encoder
    if config.use_decoder_bias and (old if subtracts is None else subtracts):
        fields["input_bias"] = fields["b_dec"].clone()
    if config.sparsity_include_decoder_norm and not old:
        fields = with_unit_decoder(f"{where}: {file}", fields, record, "sparsity_include_decoder_norm")
    fields = _in_own_units(config, state, fields, old, record)
    if config.sparsity_include_decoder_norm and old:
        # Its loader does it in this order, and the threshold is of what comes out.
        fields = with_unit_decoder(f"{where}: {file}", fields, record, "sparsity_include_decoder_norm")
    record.add("weights transposed to a latent a row", "layout")
    k = config.top_k or options.get("k") if config.act_fn != "relu" else None
    hook_in = config.hook_point_in
    return FoldedWeights(
        **fields,
        **_selection(config, state, k, old, options, record),
        k=k if "topk" in str(config.act_fn) else None,
        hooks=Hooks(hook_in, config.hook_point_out or hook_in),
    )


def _fields(where: str, state: dict[str, Any], config: _Config, record: Conversion) -> dict[str, Any]:
    layout = next((names for names in _LAYOUTS if next(iter(names)) in state), _LAYOUTS[0])
    if not config.use_decoder_bias:
        layout = {name: field for name, field in layout.items() if field != "b_dec"}
    others = [name for name in state if name == _THRESHOLD or name.startswith(_NORM)]
    fields = from_layout(where, state, layout, record, ignored=others)
    return {"b_dec": torch.zeros(fields["W_dec"].shape[1]), **fields}


def _in_own_units(
    config: _Config, state: Mapping[str, Any], fields: dict[str, Any], old: bool, record: Conversion
) -> dict[str, Any]:
    """The fields for activations as the model has them, where the dictionary was trained on such of mean norm sqrt(d)."""
    mode = config.norm_activation or ("token-wise" if old else "dataset-wise")
    config.require("norm_activation", mode in _NORMALISATIONS, ", ".join(_NORMALISATIONS))
    if mode in ("token-wise", "batch-wise"):
        record.change(
            f"norm_activation {mode!r} rescales by each token's or batch's own norm, which a Transcoder does not do"
        )
    if mode != "dataset-wise":
        return fields
    known = {**(config.dataset_average_activation_norm or {})}
    known |= {name.removeprefix(_NORM): value for name, value in state.items() if name.startswith(_NORM)}
    hooks = {"in": config.hook_point_in, "out": config.hook_point_out or config.hook_point_in}
    scales = {}
    for side, hook in hooks.items():
        norm = known.get(side, known.get(hook))
        number = (
            float(norm) if isinstance(norm, (int, float)) or (isinstance(norm, Tensor) and norm.numel() == 1) else 0.0
        )
        if not 0 < number < math.inf:
            raise ValueError(
                f"{config.where}: dataset_average_activation_norm: expected the mean norm at {hook or side}, in the config or "
                f"in the weights, since norm_activation is 'dataset-wise'; found {norm!r}"
            )
        scales[side] = math.sqrt(fields["W_enc" if side == "in" else "W_dec"].shape[1]) / number
    record.add(
        f"the norms of the dataset (source * {scales['in']:.6g}, target * {scales['out']:.6g}) were folded into the weights",
        "rounding",
    )
    # Llama Scope's activations are in the units of its source; the library's own stay those of training.
    activations = scales["in"] if old else 1.0
    by = {
        "W_enc": scales["in"] / activations,
        "b_enc": 1 / activations,
        "W_dec": activations / scales["out"],
        "b_dec": 1 / scales["out"],
        "input_bias": 1 / scales["in"],
    }
    return fields | {name: (fields[name].double() * factor).float() for name, factor in by.items() if name in fields}


def _selection(
    config: _Config,
    state: Mapping[str, Any],
    k: int | None,
    old: bool,
    options: Mapping[str, Any],
    record: Conversion,
) -> dict[str, Any]:
    threshold = config.jump_relu_threshold
    number = isinstance(threshold, (int, float)) and not isinstance(threshold, bool) and 0 <= threshold < math.inf
    config.require("jump_relu_threshold", number, "a number of at least 0")
    act_fn = str(config.act_fn).lower()
    if act_fn == "jumprelu" or (old and act_fn == "topk" and threshold > 0):
        log = state.get(_THRESHOLD)
        if log is None and not old:
            raise ValueError(f"{config.where}: act_fn: is jumprelu, and the weights have no {_THRESHOLD}")
        return {
            "activation": "threshold",
            "threshold": torch.tensor(float(threshold)) if log is None else log.float().exp(),
        }
    if act_fn == "relu":
        return {"activation": "threshold", "threshold": torch.tensor(0.0)}
    if act_fn == "batchtopk":
        return batch_topk_at_inference(None, k, options, record)
    config.require("act_fn", act_fn == "topk", "relu, jumprelu, topk or batchtopk")
    if k is None:
        raise config.refusal("top_k", "a whole number of latents a token; give it: k= (--k)")
    return {"activation": "topk"}
