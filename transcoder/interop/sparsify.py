"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors. TopK only; one width d for input and output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_json, read_safetensors, write_json, write_safetensors
from transcoder.interop.folded_weights import FoldedWeights
from transcoder.interop.foreign_config import Flag, ForeignConfig, Size, Whole
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
    }
    write_safetensors(folder / WEIGHTS_FILE, to_layout(weights, _LAYOUT))
    write_json(folder / CONFIG_FILE, config)


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> FoldedWeights:
    """A folder that `SparseCoder.save_to_disk` wrote."""
    where, in_file = "sparsify import", f"sparsify import: {path / WEIGHTS_FILE}"
    config = _Config.of(f"{where}: {path / CONFIG_FILE}", read_json(where, path / CONFIG_FILE))
    if config.activation == "groupmax":
        record.change("activation groupmax keeps one latent a group, TopK the k largest")
    else:
        config.require("activation", config.activation == "topk" and not config.signed, "'topk' unsigned")
    if config.k is None:
        raise config.refusal("k", "a whole number of latents a token")
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
    config.require("k", config.k <= d_sae, f"at most the {d_sae} latents")
    if config.multi_topk:
        record.change(
            f"with multi_topk the library's forward returns the reconstruction of 4 k = {4 * config.k} latents "
            f"(and no skip connection); imported is k = {config.k}, which its encode and decode compute",
            "With multi_topk: false in cfg.json its forward is that function too.",
        )
    if not config.transcode:
        record.add("a sparse autoencoder: b_dec is subtracted from the input first", "note")
    input_bias = None if config.transcode else fields["b_dec"].clone()
    return FoldedWeights(**fields, input_bias=input_bias, activation="topk", k=config.k)
