"""The original project's `MatryoshkaTranscoder`: a state dict (checkpoints/final.pt, checkpoint.pt) and config.json.

Read too: the SAEs of the repositories that it grew out of, bartbussmann's BatchTopK and matryoshka_sae, whose folders have the
same files (sae.pt, config.json).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import locate, read_json, read_state, unwrapped, write_json, write_state_dict
from transcoder.interop.folded_weights import FoldedWeights, Hooks, batch_topk_at_inference
from transcoder.interop.foreign_config import Flag, ForeignConfig, Size, Text, Whole
from transcoder.interop.layout import from_layout, to_layout

TESTED = "its source at commit 888d820"
CONFIG_FILE = "config.json"
_TRANSCODERS = ("matryoshka-transcoder", "matryoshka-cross-layer-transcoder")
_WEIGHTS = ("checkpoint.pt", "checkpoints/final.pt", "final.pt", "sae.pt", "checkpoints/step_*.pt")
_LAYOUT = {"b_enc": "b_enc", "W_enc": "W_enc.T", "W_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}
_LOG_THRESHOLD = "jumprelu.log_threshold"
_SAES = ("topk", "batchtopk", "globalmatryoshkatopk", "jumprelu", "vanilla")
"""`sae_type` of the SAEs, without hyphens."""
_WORDS = {"True": True, "False": False, "None": None}


@dataclass(frozen=True)
class _Config(ForeignConfig):
    sae_type: Any = None
    input_unit_norm: Flag = None
    act_size: Size = None
    source_act_size: Size = None
    target_act_size: Size = None
    dict_size: Size = None
    top_k: Whole = None
    prefix_sizes: Any = None
    group_sizes: Any = None
    hook_point: Text = None
    source_hook_point: Text = None
    target_hook_point: Text = None
    model_name: Text = None


def write(weights: FoldedWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """config.json and checkpoints/final.pt, the layout of its results folder. Options: threshold (for TopK)."""
    weights = weights.as_thresholds(
        record, options.get("threshold"), "the original knows BatchTopK with one threshold only"
    )
    weights = weights.without_skip(record, "the original has no skip connection").with_input_bias(None, record)
    if weights.threshold is None or weights.threshold.dim():
        raise ValueError("original export: its checkpoint holds one threshold for all latents, these have one each")
    weights = replace(weights, threshold=weights.threshold.clamp_min(0))
    record.add("weights transposed to W_enc [d_in, d_sae]; the widths are prefix_sizes, cumulative", "layout")
    config = {
        "act_size": weights.d_in,
        "source_act_size": weights.d_in,
        "target_act_size": weights.d_out,
        "dict_size": weights.d_sae,
        "prefix_sizes": list(weights.widths or (weights.d_sae,)),
        "top_k": weights.k,
        "input_unit_norm": False,
        "sae_type": "matryoshka-transcoder",
        "seed": 0,
        "dtype": "torch.float32",
        "device": "cpu",
        # What its constructor and losses read besides the above.
        "l1_coeff": 0,
        "top_k_aux": max(1, weights.d_in // 2),
        "aux_penalty": 1 / 32,
        "n_batches_to_dead": 20,
        "model_name": weights.hooks.model_name,
        "source_hook_point": weights.hooks.source,
        "target_hook_point": weights.hooks.target,
    }
    (folder / "checkpoints").mkdir()
    write_state_dict(folder / "checkpoints" / "final.pt", to_layout(weights, _LAYOUT))
    write_json(folder / CONFIG_FILE, config)


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """A run folder, a folder with config.json and checkpoint.pt or sae.pt, or the .pt file itself. Options: allow_pickle."""
    where = "original import"
    file = locate(where, path, _WEIGHTS)
    state = unwrapped(read_state(where, file, bool(options.get("allow_pickle"))))
    config_file = _config_file(where, file)
    # Its configs are JSON with what JSON does not know as text.
    values = {key: _plain(value) for key, value in read_json(where, config_file).items()}
    config = _Config.of(f"{where}: {config_file}", values)
    sae = _sae_type(config, state, options)
    layout = {name: field for name, field in _LAYOUT.items() if name != "threshold" or sae != "jumprelu"}
    if sae == "jumprelu":
        layout[_LOG_THRESHOLD] = "threshold"
    optional = ("threshold",) * (sae is not None)
    fields = from_layout(f"{where}: {file}", state, layout, record, optional)
    # Its own default is true, and the model reads a missing one as false.
    config.require("input_unit_norm", config.input_unit_norm is not None, "true or false")
    if config.input_unit_norm:
        record.change("input_unit_norm centres and scales each token by itself, which a Transcoder does not do")
    d_sae, d_in = fields["W_enc"].shape
    for side, size in (("source", d_in), ("target", fields["W_dec"].shape[1])):
        own = f"{side}_act_size"
        config.check_sizes(**{own if getattr(config, own) is not None else "act_size": size})
    config.check_sizes(dict_size=d_sae)
    threshold = fields.pop("threshold", None)
    if threshold is not None and sae != "jumprelu":
        if threshold.numel() != 1:
            raise ValueError(f"{where}: {file}: threshold: expected one number, got shape {list(threshold.shape)}")
        threshold = threshold.reshape(())
    record.add("weights transposed to a latent a row; prefix_sizes became cumulative widths", "layout")
    if sae not in (None, "jumprelu"):
        record.add("a sparse autoencoder: b_dec is subtracted from the input first", "note")
        fields["input_bias"] = fields["b_dec"].clone()
    if sae == "topk":
        selection: dict[str, Any] = {"activation": "topk"}
    elif sae in ("jumprelu", "vanilla"):
        selection = {
            "activation": "threshold",
            "threshold": torch.tensor(0.0) if threshold is None else threshold.exp(),
        }
    elif sae is not None:
        selection = batch_topk_at_inference(threshold, config.top_k, options, record)
    else:
        selection = {"activation": "threshold", "threshold": threshold}
    source = config.source_hook_point or config.hook_point
    return FoldedWeights(
        **fields,
        **selection,
        k=None if sae in ("jumprelu", "vanilla") else config.top_k,
        widths=_widths(config, d_sae) if sae in (None, "globalmatryoshkatopk") else None,
        hooks=Hooks(source, config.target_hook_point or (source if sae else None), config.model_name),
    )


def _plain(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    return int(value) if value.isascii() and value.isdecimal() else _WORDS.get(value, value)


def _config_file(where: str, file: Path) -> Path:
    for folder in (file.parent, file.parent.parent):
        if (folder / CONFIG_FILE).is_file():
            return folder / CONFIG_FILE
    raise FileNotFoundError(
        f"{where}: expected {CONFIG_FILE} next to {file} or one folder up: without it nothing says whether each token "
        "was normalised (input_unit_norm) and what the prefixes are"
    )


def _sae_type(config: _Config, state: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
    """Which SAE it is; None for a transcoder. The tensors have the same names, and an SAE subtracts b_dec from the input."""
    # Its scripts leave the default, "topk", for a MatryoshkaTranscoder as well: only that one has two sides.
    two_sides = all(
        getattr(config, f"{side}_hook_point") is not None or options.get(f"{side}_hook") is not None
        for side in ("source", "target")
    )
    if config.sae_type in _TRANSCODERS or (config.sae_type in (None, "topk") and two_sides):
        return None
    sae = str(config.sae_type).replace("-", "").replace("_", "")
    # A TopK SAE tracks no threshold: a default "topk" next to one says nothing.
    if sae not in _SAES or config.target_hook_point is not None or (sae == "topk" and "threshold" in state):
        raise ValueError(
            f"{config.where}: sae_type: expected {' or '.join(_TRANSCODERS)}, or none or 'topk' together with "
            f"source_hook_point and target_hook_point, or an SAE of {', '.join(_SAES)}, got {config.sae_type!r}. A transcoder "
            "that does not say so: give both (--source-hook, --target-hook)"
        )
    return sae


def _widths(config: _Config, d_sae: int) -> tuple[int, ...] | None:
    sizes = config.group_sizes if config.prefix_sizes is None else config.prefix_sizes
    if isinstance(sizes, str):
        # Its artifacts hold lists as text.
        with contextlib.suppress(ValueError, RecursionError):
            sizes = json.loads(sizes)
    if sizes is None:
        return None
    positive = isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes)
    # Since October 2025 each is a prefix from the first latent on; before, a group after the last one.
    if positive and sizes and sizes[-1] == d_sae and all(before < size for before, size in pairwise(sizes)):
        return tuple(sizes)
    if positive and sum(sizes) == d_sae:
        return tuple(accumulate(sizes))
    raise ValueError(
        f"{config.where}: prefix_sizes: expected rising sizes that end with {d_sae}, or positive sizes that sum to {d_sae}, "
        f"got {sizes!r}"
    )
