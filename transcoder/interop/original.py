"""The original project's `MatryoshkaTranscoder`: a state dict (checkpoints/final.pt, checkpoint.pt) and config.json."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_json, read_pickle, write_json, write_state_dict
from transcoder.interop.folded_weights import FoldedWeights, Hooks
from transcoder.interop.foreign_config import Flag, ForeignConfig, Size, Text, Whole
from transcoder.interop.layout import from_layout, to_layout

TESTED = "its source at commit 888d820"
CONFIG_FILE = "config.json"
_TRANSCODERS = ("matryoshka-transcoder", "matryoshka-cross-layer-transcoder")
_WEIGHTS = ("checkpoint.pt", "checkpoints/final.pt", "final.pt", "sae.pt")
_LAYOUT = {"b_enc": "b_enc", "W_enc": "W_enc.T", "W_dec": "W_dec", "b_dec": "b_dec", "threshold": "threshold"}


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
    file = path if path.is_file() else _weights_in(where, path)
    state: dict[str, Any] = read_pickle(where, file, bool(options.get("allow_pickle")))
    config_file = _config_file(where, file)
    config = _Config.of(f"{where}: {config_file}", read_json(where, config_file))
    for key in ("model_state_dict", "state_dict"):
        # Some of its scripts wrapped the state with the optimizer's.
        if isinstance(state.get(key), Mapping):
            state = dict(state[key])
    fields = from_layout(f"{where}: {file}", state, _LAYOUT, record, ignored=("num_batches_not_active",))
    _check_transcoder(config, options)
    # Its own default is true, and the model reads a missing one as false.
    config.require("input_unit_norm", config.input_unit_norm is not None, "true or false")
    if config.input_unit_norm:
        record.change("input_unit_norm centres and scales each token by itself, which a Transcoder does not do")
    d_sae, d_in = fields["W_enc"].shape
    for side, size in (("source", d_in), ("target", fields["W_dec"].shape[1])):
        own = f"{side}_act_size"
        config.check_sizes(**{own if getattr(config, own) is not None else "act_size": size})
    config.check_sizes(dict_size=d_sae)
    threshold = fields.pop("threshold")
    if threshold.numel() != 1:
        raise ValueError(f"{where}: {file}: threshold: expected one number, got shape {list(threshold.shape)}")
    record.add("weights transposed to a latent a row; prefix_sizes became cumulative widths", "layout")
    return FoldedWeights(
        **fields,
        activation="threshold",
        k=config.top_k,
        threshold=threshold.reshape(()),
        widths=_widths(config, d_sae),
        hooks=Hooks(config.source_hook_point or config.hook_point, config.target_hook_point, config.model_name),
    )


def _weights_in(where: str, folder: Path) -> Path:
    found = next((folder / name for name in _WEIGHTS if (folder / name).is_file()), None)
    steps = sorted((folder / "checkpoints").glob("step_*.pt"), key=lambda path: (len(path.name), path.name))
    if found is None and not steps:
        raise FileNotFoundError(f"{where}: expected one of {', '.join(_WEIGHTS)} or checkpoints/step_N.pt in {folder}")
    return found if found is not None else steps[-1]


def _config_file(where: str, file: Path) -> Path:
    for folder in (file.parent, file.parent.parent):
        if (folder / CONFIG_FILE).is_file():
            return folder / CONFIG_FILE
    raise FileNotFoundError(
        f"{where}: expected {CONFIG_FILE} next to {file} or one folder up: without it nothing says whether each token "
        "was normalised (input_unit_norm) and what the prefixes are"
    )


def _check_transcoder(config: _Config, options: Mapping[str, Any]) -> None:
    """Its SAEs (BatchTopK, until October 2025) have tensors of the same names and subtract b_dec from the input."""
    # Its scripts leave the default, "topk", for a MatryoshkaTranscoder as well: only that one has two sides.
    two_sides = all(
        getattr(config, f"{side}_hook_point") is not None or options.get(f"{side}_hook") is not None
        for side in ("source", "target")
    )
    if config.sae_type not in _TRANSCODERS and not (config.sae_type in (None, "topk") and two_sides):
        raise ValueError(
            f"{config.where}: sae_type: expected {' or '.join(_TRANSCODERS)}, or none or 'topk' together with "
            f"source_hook_point and target_hook_point, got {config.sae_type!r}. A transcoder that does not say so: give both "
            "(--source-hook, --target-hook)"
        )


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
