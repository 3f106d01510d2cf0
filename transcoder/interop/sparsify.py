"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors. TopK only; one width d for input and output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from transcoder.interop.files import read_json, read_safetensors, write_json, write_safetensors
from transcoder.interop.plain import PlainWeights, matrix, take_tensors
from transcoder.interop.record import Conversion

TESTED = "eai-sparsify 1.3.3"
CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"


def write(plain: PlainWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """A SparseCoder with transcode on. BatchTopK becomes TopK with its k, where allowed. Options: none."""
    if plain.d_in != plain.d_out:
        raise ValueError(
            f"sparsify export: a SparseCoder has one width for input and output, got d_in {plain.d_in} and d_out {plain.d_out}"
        )
    plain = plain.as_topk(record, "sparsify knows TopK only").with_input_bias(None, record)
    if plain.widths and len(plain.widths) > 1:
        record.add("sparsify knows no Matryoshka widths: lost", "note")
    norms = torch.linalg.vector_norm(plain.W_dec, dim=1)
    record.add("W_enc is encoder.weight; transcode is on, so b_dec is not subtracted from the input", "layout")
    tensors = {
        "encoder.weight": plain.W_enc,
        "encoder.bias": plain.b_enc,
        "W_dec": plain.W_dec,
        "b_dec": plain.b_dec,
        **({} if plain.W_skip is None else {"W_skip": plain.W_skip}),
    }
    config = {
        "activation": "topk",
        "expansion_factor": max(1, plain.d_sae // plain.d_in),
        # Read by sparsify's trainer only: whether to keep rows at unit norm.
        "normalize_decoder": bool(torch.allclose(norms, torch.ones_like(norms), atol=1e-4)),
        "num_latents": plain.d_sae,
        "k": plain.k,
        "multi_topk": False,
        "skip_connection": plain.W_skip is not None,
        "transcode": True,
        "d_in": plain.d_in,
    }
    write_safetensors(folder / WEIGHTS_FILE, tensors)
    write_json(folder / CONFIG_FILE, config)


def read(path: Path, record: Conversion, options: Mapping[str, Any]) -> PlainWeights:
    """A folder that `SparseCoder.save_to_disk` wrote."""
    where = "sparsify import"
    config = read_json(where, path / CONFIG_FILE)
    activation, k = config.get("activation", "topk"), config.get("k")
    if activation == "groupmax":
        record.change("activation groupmax keeps one latent a group, TopK the k largest")
    elif activation != "topk" or config.get("signed"):
        raise ValueError(f"{where}: {CONFIG_FILE}: activation: expected 'topk' unsigned, got {activation!r}")
    if not isinstance(k, int) or k < 1:
        raise ValueError(f"{where}: {CONFIG_FILE}: k: expected a whole number of latents a token, got {k!r}")
    required = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"] + ["W_skip"] * bool(config.get("skip_connection"))
    tensors = read_safetensors(where, path / WEIGHTS_FILE)
    found = take_tensors(f"{where}: {path / WEIGHTS_FILE}", tensors, required)
    W_enc = matrix(where, "encoder.weight", found["encoder.weight"])
    for name, size in (("d_in", W_enc.shape[1]), ("num_latents", W_enc.shape[0])):
        # num_latents 0 means "expansion_factor times d_in".
        if config.get(name, size) not in (size, 0):
            raise ValueError(f"{where}: {CONFIG_FILE} says {name} = {config[name]!r}, the weights have {size}")
    transcode = bool(config.get("transcode", False))
    if not transcode:
        record.add("a sparse autoencoder: b_dec is subtracted from the input first", "note")
    return PlainWeights(
        W_enc=W_enc,
        b_enc=found["encoder.bias"],
        W_dec=matrix(where, "W_dec", found["W_dec"]),
        b_dec=found["b_dec"],
        W_skip=found.get("W_skip"),
        input_bias=None if transcode else found["b_dec"].clone(),
        activation="topk",
        k=k,
    )
