"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors. TopK only; one width d for input and output."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import locate, read_json, read_safetensors, write_json, write_safetensors
from transcoder.interop.folded_weights import FoldedWeights, Hooks
from transcoder.interop.foreign_config import Flag, ForeignConfig, Size, Text, Whole
from transcoder.interop.layout import from_layout, to_layout

TESTED = "eai-sparsify 1.3.3"
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"
_LAYOUT = {
    "encoder.weight": "W_enc",
    "encoder.bias": "b_enc",
    "W_dec": "W_dec",
    "b_dec": "b_dec",
    "W_skip": "W_skip",
}


@dataclass(frozen=True)
class _Config(ForeignConfig):
    activation: Any = "topk"
    signed: Flag = False
    k: Whole = None
    multi_topk: Flag = False
    skip_connection: Flag = False
    transcode: Flag = False
    d_in: Size = None
    num_latents: Size = None
    expansion_factor: Whole = None
    # Ours.
    source_hook: Text = None
    target_hook: Text = None
    model_name: Text = None


_PARTS = {"": "", "mlp": "mlp.", "attn": "attn.", "self_attn": "attn.", "attention": "attn."}
"""Modules of a block, and where their hooks are."""


def write(weights: FoldedWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """A SparseCoder with transcode on. BatchTopK becomes TopK with its k, where allowed. Options: none."""
    weights.check_one_width("sparsify export: a SparseCoder")
    weights = weights.as_topk(record, "sparsify knows TopK only").with_input_bias(None, record)
    if weights.nested:
        record.add("sparsify knows no Matryoshka widths: lost", "note")
    norms = torch.linalg.vector_norm(weights.W_dec, dim=1)
    record.add("W_enc is encoder.weight; transcode is on, so b_dec is not subtracted from the input", "layout")
    config = {
        "activation": "topk",
        "expansion_factor": max(1, weights.d_sae // weights.d_in),
        # Read by sparsify's trainer only: whether to keep rows at unit norm.
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-4)),
        "num_latents": weights.d_sae,
        "k": weights.k,
        "multi_topk": False,
        "skip_connection": weights.W_skip is not None,
        "transcode": True,
        "d_in": weights.d_in,
        # Not read by sparsify, which has the place in the folder's name.
        "source_hook": weights.hooks.source,
        "target_hook": weights.hooks.target,
        "model_name": weights.hooks.model_name,
    }
    match = re.fullmatch(r"blocks\.(\d+)\.mlp\.hook_out", weights.hooks.target or "")
    if match is not None:
        record.add(f"sparsify's folder of this hookpoint would be called layers.{match[1]}.mlp", "note")
    write_safetensors(folder / WEIGHTS_FILE, to_layout(weights, _LAYOUT))
    write_json(folder / CONFIG_FILE, config)


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """A folder that `SparseCoder.save_to_disk` wrote; its name says the hookpoint, config.json next to it the model."""
    where = "sparsify import"
    path = locate(where, path, (CONFIG_FILE,)).parent
    in_file = f"{where}: {path / WEIGHTS_FILE}"
    config = _Config.of(f"{where}: {path / CONFIG_FILE}", read_json(where, path / CONFIG_FILE))
    if config.activation == "groupmax":
        record.change("activation groupmax keeps one latent a group, TopK the k largest")
    else:
        config.require("activation", config.activation == "topk" and not config.signed, "'topk' unsigned")
    k = config.k or options.get("k")
    if k is None:
        raise config.refusal("k", "a whole number of latents a token; give it: k= (--k)")
    layout = {name: field for name, field in _LAYOUT.items() if name != "W_skip" or config.skip_connection}
    fields = from_layout(in_file, read_safetensors(where, path / WEIGHTS_FILE), layout, record)
    d_sae, d_in = fields["W_enc"].shape
    config.check_sizes(d_in=d_in)
    if config.num_latents:
        config.check_sizes(num_latents=d_sae)
    elif config.expansion_factor is not None and config.expansion_factor * d_in != d_sae:
        raise ValueError(
            f"{config.where}: says expansion_factor = {config.expansion_factor}, the weights have {d_sae} / {d_in}"
        )
    config.require("k", k <= d_sae, f"at most the {d_sae} latents")
    if config.multi_topk:
        record.change(
            f"with multi_topk the library's forward returns the reconstruction of 4 k = {4 * k} latents "
            f"(and no skip connection); imported is k = {k}, which its encode and decode compute",
            "With multi_topk: false in cfg.json its forward is that function too.",
        )
    if not config.transcode:
        record.add("a sparse autoencoder: b_dec is subtracted from the input first", "note")
    input_bias = None if config.transcode else fields["b_dec"].clone()
    hooks = _hooks(path, config, bool(config.transcode))
    return FoldedWeights(**fields, input_bias=input_bias, activation="topk", k=k, hooks=hooks)


def _hooks(folder: Path, config: _Config, transcode: bool) -> Hooks:
    """Of the config where we wrote it; else the hookpoint, the folder's name, is a module of the model: a transcoder reads its
    input and writes its output, an autoencoder does both at the output."""
    run: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ValueError):
        run = read_json("sparsify import", folder.parent / "config.json")
    name = config.model_name or (run.get("model") if isinstance(run.get("model"), str) else None)
    if config.source_hook is not None:
        return Hooks(config.source_hook, config.target_hook, name)
    match = re.fullmatch(r"(?:[a-z_]+\.)*?(?:layers|h|blocks)[._](\d+)\.?(\w*)", folder.name)
    part = None if match is None else _PARTS.get(match[2])
    if match is None or part is None:
        embedded = "hook_embed" if folder.name in ("embed_tokens", "wte", "embed_in") and not transcode else None
        return Hooks(embedded, embedded, name)
    block = f"blocks.{match[1]}."
    into, out = ("hook_resid_pre", "hook_resid_post") if part == "" else (part + "hook_in", part + "hook_out")
    return Hooks(block + (into if transcode else out), block + out, name)
