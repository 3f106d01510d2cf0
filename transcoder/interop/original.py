"""The original project's `MatryoshkaTranscoder`: a state dict (checkpoints/final.pt, checkpoint.pt) and config.json."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_json, read_pickle, write_json, write_state_dict
from transcoder.interop.folded_weights import Hooks, PlainWeights, cumulative, matrix, take_tensors
from transcoder.interop.foreign_config import check_size, flag, text, whole

TESTED = "its source at commit 888d820"
CONFIG_FILE = "config.json"
_TRANSCODERS = ("matryoshka-transcoder", "matryoshka-cross-layer-transcoder")
_WEIGHTS = ("checkpoint.pt", "checkpoints/final.pt", "final.pt", "sae.pt")


def write(plain: PlainWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """config.json and checkpoints/final.pt, the layout of its results folder. Options: threshold (for TopK)."""
    plain = plain.as_thresholds(
        record, options.get("threshold"), "the original knows BatchTopK with one threshold only"
    )
    plain = plain.without_skip(record, "the original has no skip connection").with_input_bias(None, record)
    if plain.threshold is None or plain.threshold.dim():
        raise ValueError("original export: its checkpoint holds one threshold for all latents, these have one each")
    widths = plain.widths or (plain.d_sae,)
    record.add("weights transposed to W_enc [d_in, d_sae]; the widths are prefix_sizes, cumulative", "layout")
    tensors = {
        "b_enc": plain.b_enc,
        "W_enc": plain.W_enc.T.contiguous(),
        "W_dec": plain.W_dec,
        "b_dec": plain.b_dec,
        "threshold": plain.threshold.clamp_min(0),
    }
    config = {
        "act_size": plain.d_in,
        "source_act_size": plain.d_in,
        "target_act_size": plain.d_out,
        "dict_size": plain.d_sae,
        "prefix_sizes": list(widths),
        "top_k": plain.k,
        "input_unit_norm": False,
        "sae_type": "matryoshka-transcoder",
        "seed": 0,
        "dtype": "torch.float32",
        "device": "cpu",
        # What its constructor and losses read besides the above.
        "l1_coeff": 0,
        "top_k_aux": max(1, plain.d_in // 2),
        "aux_penalty": 1 / 32,
        "n_batches_to_dead": 20,
        "model_name": plain.hooks.model_name,
        "source_hook_point": plain.hooks.source,
        "target_hook_point": plain.hooks.target,
    }
    (folder / "checkpoints").mkdir()
    write_state_dict(folder / "checkpoints" / "final.pt", tensors)
    write_json(folder / CONFIG_FILE, config)


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> PlainWeights:
    """A run folder, a folder with config.json and checkpoint.pt or sae.pt, or the .pt file itself. Options: allow_pickle."""
    where = "original import"
    file = path if path.is_file() else _weights_in(where, path)
    state: dict[str, Any] = read_pickle(where, file, bool(options.get("allow_pickle")))
    config_file = _config_file(where, file)
    config, settings = read_json(where, config_file), f"{where}: {config_file}"
    for key in ("model_state_dict", "state_dict"):
        # Some of its scripts wrapped the state with the optimizer's.
        if isinstance(state.get(key), Mapping):
            state = dict(state[key])
    found = take_tensors(
        f"{where}: {file}",
        state,
        ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"),
        record,
        ignored=("num_batches_not_active",),
    )
    _check_transcoder(settings, config, options)
    # Its own default is true, and the model reads a missing one as false.
    if flag(settings, config, "input_unit_norm", None):
        record.change("input_unit_norm centres and scales each token by itself, which a Transcoder does not do")
    W_enc = matrix(f"{where}: {file}", "W_enc", found["W_enc"]).T.contiguous()
    W_dec = matrix(f"{where}: {file}", "W_dec", found["W_dec"])
    for name, size in (("source_act_size", W_enc.shape[1]), ("target_act_size", W_dec.shape[1])):
        check_size(settings, config, name if config.get(name) is not None else "act_size", size)
    check_size(settings, config, "dict_size", W_enc.shape[0])
    threshold = found["threshold"]
    if threshold.numel() != 1:
        raise ValueError(f"{where}: {file}: threshold: expected one number, got shape {list(threshold.shape)}")
    record.add("weights transposed to a latent a row; prefix_sizes became cumulative widths", "layout")
    return PlainWeights(
        W_enc=W_enc,
        b_enc=found["b_enc"],
        W_dec=W_dec,
        b_dec=found["b_dec"],
        activation="threshold",
        k=whole(settings, config, "top_k"),
        threshold=threshold.reshape(()),
        widths=_widths(settings, config, W_enc.shape[0]),
        hooks=Hooks(
            source=text(settings, config, "source_hook_point") or text(settings, config, "hook_point"),
            target=text(settings, config, "target_hook_point"),
            model_name=text(settings, config, "model_name"),
        ),
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


def _check_transcoder(where: str, config: Mapping[str, Any], options: Mapping[str, Any]) -> None:
    """Its SAEs (BatchTopK, until October 2025) have tensors of the same names and subtract b_dec from the input."""
    kind = config.get("sae_type")
    # Its scripts leave the default, "topk", for a MatryoshkaTranscoder as well: only that one has two sides.
    two_sides = all(
        isinstance(config.get(f"{side}_hook_point"), str) or options.get(f"{side}_hook") is not None
        for side in ("source", "target")
    )
    if kind not in _TRANSCODERS and not (kind in (None, "topk") and two_sides):
        raise ValueError(
            f"{where}: sae_type: expected {' or '.join(_TRANSCODERS)}, or none or 'topk' together with source_hook_point and "
            f"target_hook_point, got {kind!r}. A transcoder that does not say so: give both (--source-hook, --target-hook)"
        )


def _widths(where: str, config: Mapping[str, Any], d_sae: int) -> tuple[int, ...] | None:
    sizes = config.get("prefix_sizes", config.get("group_sizes"))
    if isinstance(sizes, str):
        # Its artifacts hold lists as text.
        with contextlib.suppress(ValueError, RecursionError):
            sizes = json.loads(sizes)
    if sizes is None:
        return None
    plain = isinstance(sizes, list) and all(type(size) is int and size > 0 for size in sizes)
    # Since October 2025 each is a prefix from the first latent on; before, a group after the last one.
    if plain and sizes and sizes[-1] == d_sae and all(before < size for before, size in pairwise(sizes)):
        return tuple(sizes)
    if plain and sum(sizes) == d_sae:
        return cumulative(sizes)
    raise ValueError(
        f"{where}: prefix_sizes: expected rising sizes that end with {d_sae}, or positive sizes that sum to {d_sae}, got "
        f"{sizes!r}"
    )
