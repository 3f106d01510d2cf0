"""dictionary_learning: a folder with ae.pt and config.json. One width d; b_dec is subtracted from the input."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_json, read_pickle, write_json, write_state_dict
from transcoder.interop.folded_weights import Hooks, PlainWeights, cumulative, group_sizes, matrix, take_tensors
from transcoder.interop.foreign_config import check_size, section, text, whole

TESTED = "dictionary-learning 0.1.0"
WEIGHTS_FILE, CONFIG_FILE = "ae.pt", "config.json"

_LINEAR = ("encoder.weight", "encoder.bias", "decoder.weight")
_PLAIN = ("W_enc", "b_enc", "W_dec", "b_dec")
_NAMES: dict[str, tuple[str, ...]] = {
    "AutoEncoder": (*_LINEAR, "bias"),
    "AutoEncoderNew": (*_LINEAR, "decoder.bias"),
    "AutoEncoderTopK": (*_LINEAR, "b_dec", "k", "threshold"),
    "BatchTopKSAE": (*_LINEAR, "b_dec", "k", "threshold"),
    "MatryoshkaBatchTopKSAE": (*_PLAIN, "k", "threshold", "group_sizes"),
    "JumpReluAutoEncoder": (*_PLAIN, "threshold"),
}


def write(plain: PlainWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """TopK -> AutoEncoderTopK; BatchTopK -> BatchTopKSAE, with widths MatryoshkaBatchTopKSAE; a threshold a latent ->
    JumpReluAutoEncoder. Options: none."""
    if plain.d_in != plain.d_out:
        raise ValueError(
            "dictionary_learning export: a dictionary has one width for input and output, got "
            f"d_in {plain.d_in} and d_out {plain.d_out}"
        )
    plain = plain.without_skip(record, "dictionary_learning has no skip connection")
    nested = plain.widths is not None and len(plain.widths) > 1
    each = plain.threshold is not None and plain.threshold.dim() == 1 and plain.activation == "threshold"
    if plain.activation == "topk":
        name = "AutoEncoderTopK"
    elif each:
        name = "JumpReluAutoEncoder"
    else:
        name = "MatryoshkaBatchTopKSAE" if nested else "BatchTopKSAE"
    if nested and name != "MatryoshkaBatchTopKSAE":
        record.add(f"{name} knows no Matryoshka widths: lost", "note")
    # JumpReluAutoEncoder reads x, the others x - b_dec.
    plain = plain.with_input_bias(None if each else plain.b_dec, record)
    record.add(f"class {name}", "layout")
    scalar = torch.tensor(-1.0) if plain.threshold is None or plain.threshold.dim() else plain.threshold
    counters = {"k": torch.tensor(plain.k, dtype=torch.int32), "threshold": scalar}
    transposed = {"W_enc": plain.W_enc.T, "b_enc": plain.b_enc, "W_dec": plain.W_dec, "b_dec": plain.b_dec}
    tensors: dict[str, Tensor]
    if name == "MatryoshkaBatchTopKSAE":
        record.add("cumulative widths became group sizes", "layout")
        tensors = {**counters, "group_sizes": torch.tensor(group_sizes(plain.widths or ())), **transposed}
    elif name == "JumpReluAutoEncoder":
        tensors = {**transposed, "threshold": plain.latent_thresholds()}
    else:
        linear = {"decoder.weight": plain.W_dec.T, "encoder.weight": plain.W_enc, "encoder.bias": plain.b_enc}
        tensors = {**counters, "b_dec": plain.b_dec, **linear}
    trainer = {
        "dict_class": name,
        "activation_dim": plain.d_in,
        "dict_size": plain.d_sae,
        "k": plain.k,
        **({"group_sizes": group_sizes(plain.widths or ())} if name == "MatryoshkaBatchTopKSAE" else {}),
        "layer": plain.hooks.layer,
        "lm_name": plain.hooks.model_name,
        "submodule_name": plain.hooks.source,
        # Not read by dictionary_learning, which knows one place only.
        "submodule_name_out": plain.hooks.target,
    }
    write_state_dict(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, {"trainer": trainer, "buffer": {"ctx_len": plain.hooks.context_size}})


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> PlainWeights:
    """A folder with ae.pt (and config.json), or such a .pt file. Options: allow_pickle."""
    where = "dictionary-learning import"
    file = path / WEIGHTS_FILE if path.is_dir() else path
    state = read_pickle(where, file, bool(options.get("allow_pickle")))
    settings = f"{where}: {file.parent / CONFIG_FILE}: trainer"
    trainer = _trainer(where, file.parent)
    name = _class_of(where, state, trainer)
    found = take_tensors(f"{where}: {file} ({name})", state, _NAMES[name], record, whole=("k", "group_sizes"))
    record.add(f"class {name}", "layout")
    if "encoder.weight" in found:
        W_enc, W_dec = (matrix(f"{where}: {file}", key, found[key]) for key in ("encoder.weight", "decoder.weight"))
        W_dec, b_enc = W_dec.T.contiguous(), found["encoder.bias"]
    else:
        W_enc, W_dec = (matrix(f"{where}: {file}", key, found[key]) for key in ("W_enc", "W_dec"))
        W_enc, b_enc = W_enc.T.contiguous(), found["b_enc"]
    check_size(settings, trainer, "activation_dim", W_enc.shape[1])
    check_size(settings, trainer, "dict_size", W_enc.shape[0])
    b_dec = next(found[key] for key in ("b_dec", "bias", "decoder.bias") if key in found)
    subtracts = name not in ("AutoEncoderNew", "JumpReluAutoEncoder")
    threshold = torch.tensor(0.0) if name in ("AutoEncoder", "AutoEncoderNew") else found["threshold"]
    sizes = found["group_sizes"].flatten().tolist() if "group_sizes" in found else []
    widths = cumulative(sizes)
    if "group_sizes" in found and (sum(sizes) != W_enc.shape[0] or min(sizes) < 1):
        raise ValueError(
            f"{where}: {file}: group_sizes: expected positive sizes that sum to {W_enc.shape[0]}, got {sizes}"
        )
    if widths:
        record.add("group sizes became cumulative widths", "layout")
    return PlainWeights(
        W_enc=W_enc,
        b_enc=b_enc,
        W_dec=W_dec,
        b_dec=b_dec,
        input_bias=b_dec.clone() if subtracts else None,
        activation="topk" if name == "AutoEncoderTopK" else "threshold",
        k=_k(f"{where}: {file}", found, settings, trainer),
        threshold=threshold,
        widths=widths if len(widths) > 1 else None,
        hooks=_hooks(settings, trainer),
    )


def _trainer(where: str, folder: Path) -> dict[str, Any]:
    if not (folder / CONFIG_FILE).is_file():
        return {}
    return section(f"{where}: {folder / CONFIG_FILE}", read_json(where, folder / CONFIG_FILE), "trainer")


def _class_of(where: str, state: Mapping[str, Any], trainer: Mapping[str, Any]) -> str:
    """By config.json; without it by the names of the tensors, where they tell."""
    name = trainer.get("dict_class")
    if name is None:
        fitting = [known for known, names in _NAMES.items() if set(names) == set(state)]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            raise ValueError(
                f"{where}: no {CONFIG_FILE} next to the weights, whose names fit {' and '.join(fitting)}: write one with "
                '{"trainer": {"dict_class": ...}}'
            )
        raise ValueError(f"{where}: the tensors {', '.join(sorted(map(str, state)))} fit none of {', '.join(_NAMES)}")
    if not isinstance(name, str) or name not in _NAMES:
        raise ValueError(
            f"{where}: {CONFIG_FILE}: trainer: dict_class: expected one of {', '.join(_NAMES)}, got {name!r}"
        )
    return name


def _k(where: str, found: Mapping[str, Tensor], settings: str, trainer: Mapping[str, Any]) -> int | None:
    """Of the weights, which the config may not contradict (the library refuses that too); else of the config."""
    named = whole(settings, trainer, "k")
    if "k" not in found:
        return named
    if found["k"].numel() != 1 or int(found["k"]) < 1:
        raise ValueError(f"{where}: k: expected a whole number of latents a token, got {found['k'].tolist()}")
    k = int(found["k"])
    if named not in (None, k):
        raise ValueError(f"{settings}: says k = {named}, the weights have {k}")
    return k


def _hooks(where: str, trainer: Mapping[str, Any]) -> Hooks:
    names = ("submodule_name", "submodule_name_out", "lm_name")
    source, target, model = (text(where, trainer, name) for name in names)
    return Hooks(source=source, target=target or source, model_name=model)
