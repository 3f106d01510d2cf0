"""sparsify (EleutherAI): a folder with cfg.json and sae.safetensors. TopK only; one width d for input and output."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_json, read_safetensors, write_json, write_safetensors
from transcoder.interop.folded_weights import PlainWeights, matrix, take_tensors
from transcoder.interop.foreign_config import check_size, flag, whole

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
    settings, weights = f"{where}: {path / CONFIG_FILE}", f"{where}: {path / WEIGHTS_FILE}"
    activation, k = config.get("activation", "topk"), whole(settings, config, "k")
    if activation == "groupmax":
        record.change("activation groupmax keeps one latent a group, TopK the k largest")
    elif activation != "topk" or flag(settings, config, "signed", False):
        raise ValueError(f"{settings}: activation: expected 'topk' unsigned, got {activation!r}")
    if k is None:
        raise ValueError(f"{settings}: k: expected a whole number of latents a token, found none")
    skip, transcode = flag(settings, config, "skip_connection", False), flag(settings, config, "transcode", False)
    required = ["encoder.weight", "encoder.bias", "W_dec", "b_dec"] + ["W_skip"] * skip
    found = take_tensors(weights, read_safetensors(where, path / WEIGHTS_FILE), required, record)
    W_enc = matrix(weights, "encoder.weight", found["encoder.weight"])
    _check_sizes(settings, config, W_enc)
    if k > W_enc.shape[0]:
        raise ValueError(f"{settings}: k: expected at most the {W_enc.shape[0]} latents, got {k}")
    if flag(settings, config, "multi_topk", False):
        record.change(
            f"with multi_topk the library's forward returns the reconstruction of 4 k = {4 * k} latents "
            f"(and no skip connection); imported is k = {k}, which its encode and decode compute",
            "With multi_topk: false in cfg.json its forward is that function too.",
        )
    if not transcode:
        record.add("a sparse autoencoder: b_dec is subtracted from the input first", "note")
    return PlainWeights(
        W_enc=W_enc,
        b_enc=found["encoder.bias"],
        W_dec=matrix(weights, "W_dec", found["W_dec"]),
        b_dec=found["b_dec"],
        W_skip=found.get("W_skip"),
        input_bias=None if transcode else found["b_dec"].clone(),
        activation="topk",
        k=k,
    )


def _check_sizes(where: str, config: Mapping[str, Any], W_enc: Tensor) -> None:
    d_sae, d_in = W_enc.shape
    check_size(where, config, "d_in", d_in)
    if whole(where, config, "num_latents", least=0):
        check_size(where, config, "num_latents", d_sae)
    elif (factor := whole(where, config, "expansion_factor")) is not None and factor * d_in != d_sae:
        raise ValueError(f"{where}: says expansion_factor = {factor}, the weights have {d_sae} / {d_in}")
