"""The peers' formulas, dense and in fp64, over the tensors of their own files: what every format test compares with."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor


def top_k(activations: Tensor, k: int) -> Tensor:
    chosen = activations.topk(k, dim=-1)
    return torch.zeros_like(activations).scatter(-1, chosen.indices, chosen.values)


def saelens(folder: Path, x: Tensor) -> Tensor:
    """`SAE.load_from_disk(folder)(x)` of the architectures with an encoder and a decoder, and of our training classes there."""
    config, w = _json(folder / "cfg.json"), _tensors(folder / "sae_weights.safetensors")
    kind = config["architecture"]
    subtracts = config.get("apply_b_dec_to_input", True)
    assert not ("transcoder" in kind and subtracts), "SAELens refuses to load such a transcoder"
    pre = (x.double() - (w["b_dec"] if subtracts else 0)) @ w["W_enc"] + w["b_enc"]
    norms = w["W_dec"].norm(dim=-1) if config.get("rescale_acts_by_decoder_norm") else torch.ones(())
    pre = pre * norms
    if kind in ("topk", "topk_transcoder"):
        acts = top_k(pre, config["k"]).relu()
    elif "topk_threshold" in w:
        acts = torch.where(pre.relu() > w["topk_threshold"], pre, 0.0)
    else:
        acts = pre.relu() * (pre > w["threshold"] if "threshold" in w else 1)
    skip = x.double() @ w["W_skip"].T if "W_skip" in w else 0
    return (acts / norms) @ w["W_dec"] + w["b_dec"] + skip


def sparsify(folder: Path, x: Tensor) -> Tensor:
    """`SparseCoder.load_from_disk(folder)(x).sae_out`"""
    config, w = _json(folder / "cfg.json"), _tensors(folder / "sae.safetensors")
    x = x.double()
    read = x if config["transcode"] else x - w["b_dec"]
    acts = top_k((read @ w["encoder.weight"].T + w["encoder.bias"]).relu(), config["k"])
    skip = x @ w["W_skip"].T if "W_skip" in w else 0
    return acts @ w["W_dec"] + w["b_dec"] + skip


def dictionary_learning(folder: Path, x: Tensor) -> Tensor:
    """`load_dictionary(folder)[0](x)`"""
    trainer = _json(folder / "config.json")["trainer"]
    w = {name: _wide(t) for name, t in torch.load(folder / "ae.pt", weights_only=True).items()}
    x, name = x.double(), trainer["dict_class"]
    b_dec = w.get("b_dec", w.get("bias", w.get("decoder.bias")))
    read = x if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else x - b_dec
    W_enc = w["encoder.weight"].T if "encoder.weight" in w else w["W_enc"]
    W_dec = w["decoder.weight"].T if "decoder.weight" in w else w["W_dec"]
    pre = read @ W_enc + w.get("encoder.bias", w.get("b_enc"))
    if name == "AutoEncoderTopK":
        acts = top_k(pre.relu(), int(w["k"]))
    else:
        acts = pre.relu() * (pre.relu() > w["threshold"] if "threshold" in w else 1)
    return acts @ W_dec + b_dec


def circuit_tracer(folder: Path, x: Tensor, layer: int) -> Tensor:
    """`load_transcoders(config)[layer](x)`: JumpReLU and TopK without a ReLU."""
    config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    w, x = _tensors(folder / f"layer_{layer}.safetensors"), x.double()
    pre = x @ w["W_enc"].T + w["b_enc"]
    if config.get("activation") == "topk":
        acts = pre * torch.zeros_like(pre).scatter(-1, pre.topk(config["k"], dim=-1).indices, 1.0)
    elif "activation_function.threshold" in w:
        acts = pre * (pre > w["activation_function.threshold"])
    else:
        acts = pre.relu()
    return acts @ w["W_dec"] + w["b_dec"] + (x @ w["W_skip"].T if "W_skip" in w else 0)


def gemma_scope(folder: Path, x: Tensor) -> Tensor:
    """JumpReLU over params.npz, as its tutorial has it."""
    with numpy.load(folder / "params.npz") as archive:
        w = {name: torch.from_numpy(archive[name]).double() for name in archive.files}
    pre = x.double() @ w["W_enc"] + w["b_enc"]
    return ((pre > w["threshold"]) * pre.relu()) @ w["W_dec"] + w["b_dec"]


def original(folder: Path, x: Tensor) -> Tensor:
    """`MatryoshkaTranscoder.decode(encode(x))` in eval mode."""
    w = {n: t.double() for n, t in torch.load(folder / "checkpoints" / "final.pt", weights_only=True).items()}
    acts = (x.double() @ w["W_enc"] + w["b_enc"]).relu()
    return torch.where(acts > w["threshold"], acts, 0.0) @ w["W_dec"] + w["b_dec"]


def _wide(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _tensors(path: Path) -> Mapping[str, Tensor]:
    return {name: _wide(tensor) for name, tensor in load_file(path).items()}


def _json(path: Path) -> dict[str, Any]:
    return dict(json.loads(path.read_bytes()))
