"""dictionary_learning: a folder with ae.pt and config.json. One width d; b_dec is subtracted from the input."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_json, read_pickle, write_json, write_state_dict
from transcoder.interop.folded_weights import FoldedWeights, Hooks
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
}
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
    """A folder with ae.pt (and config.json), or such a .pt file. Options: allow_pickle."""
    where = "dictionary-learning import"
    file = path / WEIGHTS_FILE if path.is_dir() else path
    state = read_pickle(where, file, bool(options.get("allow_pickle")))
    config_file = file.parent / CONFIG_FILE
    config = _Config.of(f"{where}: {config_file}", read_json(where, config_file) if config_file.is_file() else {})
    trainer = _Trainer.of(f"{config.where}: trainer", config.trainer)
    name = _class_of(where, state, trainer)
    fields = from_layout(f"{where}: {file} ({name})", state, _LAYOUTS[name], record, counts=_COUNTS.get(name, ()))
    record.add(f"class {name}", "layout")
    d_sae, d_in = fields["W_enc"].shape
    trainer.check_sizes(activation_dim=d_in, dict_size=d_sae)
    widths = None
    if "group_sizes" in fields:
        sizes = fields.pop("group_sizes").flatten().tolist()
        if sum(sizes) != d_sae or min(sizes) < 1:
            raise ValueError(f"{where}: {file}: group_sizes: expected positive sizes that sum to {d_sae}, got {sizes}")
        record.add("group sizes became cumulative widths", "layout")
        widths = tuple(accumulate(sizes)) if len(sizes) > 1 else None
    subtracts = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    source = trainer.submodule_name
    k = _k(f"{where}: {file}", fields.pop("k", None), trainer)
    return FoldedWeights(
        **{"threshold": torch.tensor(0.0), **fields},
        input_bias=fields["b_dec"].clone() if subtracts else None,
        activation="topk" if name == "AutoEncoderTopK" else "threshold",
        k=k,
        widths=widths,
        hooks=Hooks(source, trainer.submodule_name_out or source, trainer.lm_name),
    )


def _class_of(where: str, state: Mapping[str, Any], trainer: _Trainer) -> str:
    """By config.json; without it by the names of the tensors, where they tell."""
    if trainer.dict_class is not None:
        known = isinstance(trainer.dict_class, str) and trainer.dict_class in _LAYOUTS
        trainer.require("dict_class", known, f"one of {', '.join(_LAYOUTS)}")
        return str(trainer.dict_class)
    fitting = [name for name, layout in _LAYOUTS.items() if {*layout, *_COUNTS.get(name, ())} == set(state)]
    if len(fitting) == 1:
        return fitting[0]
    if fitting:
        raise ValueError(
            f"{where}: no {CONFIG_FILE} next to the weights, whose names fit {' and '.join(fitting)}: write one with "
            '{"trainer": {"dict_class": ...}}'
        )
    raise ValueError(f"{where}: the tensors {', '.join(sorted(map(str, state)))} fit none of {', '.join(_LAYOUTS)}")


def _k(where: str, found: Tensor | None, trainer: _Trainer) -> int | None:
    """Of the weights, which the config may not contradict (the library refuses that too); else of the config."""
    if found is None:
        return trainer.k
    if found.numel() != 1 or int(found) < 1:
        raise ValueError(f"{where}: k: expected a whole number of latents a token, got {found.tolist()}")
    trainer.check_sizes(k=int(found))
    return int(found)
