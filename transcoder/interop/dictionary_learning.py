"""dictionary_learning: a folder with ae.pt and config.json. One width d; b_dec is subtracted from the input."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import locate, read_json, read_state, unwrapped, write_json, write_state_dict
from transcoder.interop.folded_weights import FoldedWeights, Hooks, batch_topk_at_inference
from transcoder.interop.foreign_config import ForeignConfig, Object, Size, Text, Whole
from transcoder.interop.layout import from_layout, to_layout

TESTED = "dictionary-learning 0.1.0"
WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"

_LINEAR = {"encoder.weight": "W_enc", "encoder.bias": "b_enc", "decoder.weight": "W_dec.T"}
_OWN = {"W_enc": "W_enc.T", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
_LAYOUTS = {
    "AutoEncoder": {**_LINEAR, "bias": "b_dec"},
    "AutoEncoderNew": {**_LINEAR, "decoder.bias": "b_dec"},
    "AutoEncoderTopK": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "BatchTopKSAE": {**_LINEAR, "b_dec": "b_dec", "threshold": "threshold"},
    "MatryoshkaBatchTopKSAE": {**_OWN, "threshold": "threshold"},
    "JumpReluAutoEncoder": {**_OWN, "threshold": "threshold"},
    # Of other publishers, files of the same kind without a config.
    "Goodfire": {
        "encoder_linear.weight": "W_enc",
        "encoder_linear.bias": "b_enc",
        "decoder_linear.weight": "W_dec.T",
        "decoder_linear.bias": "b_dec",
    },
    "Qwen Scope": {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec.T", "b_dec": "b_dec"},
}
_READ_X = ("AutoEncoderNew", "JumpReluAutoEncoder", "Goodfire", "Qwen Scope")
"""Those that do not subtract b_dec from the input."""
_COUNTS = {
    "AutoEncoderTopK": ("k",),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_sizes"),
}
"""Whole numbers among the tensors."""


@dataclass(frozen=True)
class _Config(ForeignConfig):
    trainer: Object = None


@dataclass(frozen=True)
class _Trainer(ForeignConfig):
    dict_class: Any = None
    activation_dim: Size = None
    dict_size: Size = None
    k: Whole = None
    submodule_name: Text = None
    submodule_name_out: Text = None
    lm_name: Text = None


def write(weights: FoldedWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """TopK -> AutoEncoderTopK; BatchTopK -> BatchTopKSAE, with widths MatryoshkaBatchTopKSAE; a threshold a latent ->
    JumpReluAutoEncoder. Options: none."""
    weights.check_one_width("dictionary_learning export: a dictionary")
    weights = weights.without_skip(record, "dictionary_learning has no skip connection")
    scalar = weights.threshold is None or weights.threshold.dim() == 0
    if weights.activation == "topk":
        name = "AutoEncoderTopK"
        if not scalar or weights.threshold is None:
            # -1: the library's own mark of a threshold that no batch has set.
            weights = replace(weights, threshold=torch.tensor(-1.0))
    elif not scalar:
        name, weights = "JumpReluAutoEncoder", weights.with_latent_thresholds()
    else:
        name = "MatryoshkaBatchTopKSAE" if weights.nested else "BatchTopKSAE"
    if weights.nested and name != "MatryoshkaBatchTopKSAE":
        record.add(f"{name} knows no Matryoshka widths: lost", "note")
    # JumpReluAutoEncoder reads x, the others x - b_dec.
    weights = weights.with_input_bias(None if name == "JumpReluAutoEncoder" else weights.b_dec, record)
    record.add(f"class {name}", "layout")
    group_sizes = [width - before for before, width in pairwise((0, *(weights.widths or ())))]
    counts = {"k": torch.tensor(weights.k, dtype=torch.int32), "group_sizes": torch.tensor(group_sizes)}
    tensors = {count: counts[count] for count in _COUNTS.get(name, ())}
    if "group_sizes" in tensors:
        record.add("cumulative widths became group sizes", "layout")
    trainer = {
        "dict_class": name,
        "activation_dim": weights.d_in,
        "dict_size": weights.d_sae,
        "k": weights.k,
        **({"group_sizes": group_sizes} if "group_sizes" in tensors else {}),
        "layer": weights.hooks.layer,
        "lm_name": weights.hooks.model_name,
        "submodule_name": weights.hooks.source,
        # Not read by dictionary_learning, which knows one place only.
        "submodule_name_out": weights.hooks.target,
    }
    write_state_dict(folder / WEIGHTS_FILE, {**tensors, **to_layout(weights, _LAYOUTS[name])})
    write_json(folder / CONFIG_FILE, {"trainer": trainer, "buffer": {"ctx_len": weights.hooks.context_size}})


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """A folder with ae.pt (and config.json, there or one folder up), or such a file, checkpoints/ae_N.pt too, or the state that
    an interrupted training left in ae.pt; Goodfire's and Qwen Scope's files. Options: allow_pickle; threshold, of a BatchTopK
    whose file has none."""
    where = "dictionary-learning import"
    file = locate(where, path, (WEIGHTS_FILE, "ae.safetensors", "ae_*.pt", "checkpoints/ae_*.pt"))
    saved = read_state(where, file, bool(options.get("allow_pickle")))
    state = unwrapped(saved)
    config_file = next((f for f in (file.parent / CONFIG_FILE, file.parent.parent / CONFIG_FILE) if f.is_file()), None)
    config = _Config.of(f"{where}: {config_file or file}", {} if config_file is None else read_json(where, config_file))
    of_state = saved.get("config") if saved is not state else None
    trainer = _Trainer.of(
        f"{config.where}: trainer", config.trainer or (of_state if isinstance(of_state, Mapping) else None)
    )
    name = _class_of(where, state, trainer)
    counts, sparse = _COUNTS.get(name, ()), name.endswith(("TopK", "TopKSAE"))
    # Files of before December 2024 have no threshold, older ones no k either.
    optional = ("threshold", "k") if sparse else ()
    fields = from_layout(f"{where}: {file} ({name})", state, _LAYOUTS[name], record, optional, counts=counts)
    record.add(f"class {name}", "layout")
    d_sae, d_in = fields["W_enc"].shape
    trainer.check_sizes(activation_dim=d_in, dict_size=d_sae)
    if saved is not state:
        fields = _unscaled(f"{where}: {file}", fields, saved.get("norm_factor"), record)
    widths = None
    if "group_sizes" in fields:
        sizes = fields.pop("group_sizes").flatten().tolist()
        if sum(sizes) != d_sae or min(sizes) < 1:
            raise ValueError(f"{where}: {file}: group_sizes: expected positive sizes that sum to {d_sae}, got {sizes}")
        record.add("group sizes became cumulative widths", "layout")
        widths = tuple(accumulate(sizes)) if len(sizes) > 1 else None
    if name not in _READ_X:
        fields["input_bias"] = fields["b_dec"].clone()
    final = file.name == WEIGHTS_FILE and saved is state
    k = _k(f"{where}: {file}", fields.pop("k", None), trainer, final, record) or options.get("k")
    threshold = fields.pop("threshold", None)
    if name == "Qwen Scope" and k is None and (match := re.search(r"L0_(\d+)", str(file))) is not None:
        k = int(match[1])
    if name in ("AutoEncoderTopK", "Qwen Scope"):
        selection: dict[str, Any] = {"activation": "topk", "threshold": threshold}
    elif sparse:
        selection = batch_topk_at_inference(threshold, k, options, record)
    else:
        selection = {"activation": "threshold", "threshold": torch.tensor(0.0) if threshold is None else threshold}
    source = _hook(trainer.submodule_name)
    if match := re.search(r"-l(\d+)[-./]" if name == "Goodfire" else r"layer(\d+)\.sae\.", str(file)):
        source = source or f"blocks.{match[1]}.hook_resid_post"
    target = _hook(trainer.submodule_name_out) or source
    return FoldedWeights(**fields, **selection, k=k, widths=widths, hooks=Hooks(source, target, trainer.lm_name))


def _unscaled(where: str, fields: dict[str, Any], factor: Any, record: Conversion) -> dict[str, Any]:
    """The fields of an interrupted training, for activations in their own units, as the library scales them when it ends.

    Equivalent to: `scale_biases(norm_factor)`.
    """
    if factor is None:
        return fields
    factor = float(factor) if isinstance(factor, (int, float)) else float("nan")
    if not 0 < factor < float("inf"):
        raise ValueError(f"{where}: norm_factor: expected a number above 0")
    record.add(
        f"the biases were scaled by norm_factor {factor:g}, as the library does when a training ends", "rounding"
    )
    # A threshold of -1 is the mark of none.
    scaled = {name: fields[name] for name in ("b_enc", "b_dec", "threshold") if name in fields}
    return fields | {
        name: torch.where(tensor < 0, tensor, tensor * factor)
        if name == "threshold"
        else (tensor.double() * factor).float()
        for name, tensor in scaled.items()
    }


def _hook(submodule: str | None) -> str | None:
    """The hook at the library's own names of places, resid_post_layer_3 and such; other names as they are."""
    match = re.fullmatch(r"(resid_pre|resid_mid|resid_post|mlp_out|attn_out)_layer_?(\d+)", submodule or "")
    return submodule if match is None else f"blocks.{match[2]}.hook_{match[1]}"


def _class_of(where: str, state: Mapping[str, Any], trainer: _Trainer) -> str:
    """By config.json; without it by the names of the tensors, where they tell."""
    if trainer.dict_class is not None:
        # Some configs have the class as Python prints it.
        name = str(trainer.dict_class).rstrip("'>").rsplit(".")[-1]
        trainer.require("dict_class", name in _LAYOUTS, f"one of {', '.join(_LAYOUTS)}")
        return name
    fitting = [name for name, layout in _LAYOUTS.items() if {*layout, *_COUNTS.get(name, ())} == set(state)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"{where}: no {CONFIG_FILE} next to the weights, whose names fit {' and '.join(fitting)}: write one with "
            '{"trainer": {"dict_class": ...}}'
        )
    raise ValueError(f"{where}: the tensors {', '.join(sorted(map(str, state)))} fit none of {', '.join(_LAYOUTS)}")


def _k(where: str, found: Tensor | None, trainer: _Trainer, final: bool, record: Conversion) -> int | None:
    """Of the weights, which the config of final ones may not contradict (the library refuses that too); else of the config."""
    if found is None:
        return trainer.k
    if found.numel() != 1 or int(found) < 1:
        raise ValueError(f"{where}: k: expected a whole number of latents a token, got {found.tolist()}")
    if final:
        trainer.check_sizes(k=int(found))
    elif trainer.k not in (None, int(found)):
        record.add(f"k = {int(found)} of this state, on its way to the config's {trainer.k}", "note")
    return int(found)
