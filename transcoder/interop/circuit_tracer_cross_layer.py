"""circuit-tracer's CrossLayerTranscoder: W_enc_{i}.safetensors and W_dec_{i}.safetensors of each layer, and config.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from transcoder.activations.model_name import known_layer_count
from transcoder.files import WRITING
from transcoder.interop.circuit_tracer import CONFIG_FILE, checked, model_name
from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import write_safetensors
from transcoder.interop.folded_weights import FoldedWeights
from transcoder.training.cross_layer import layers_of_latents, places_allowed


def write(weights: FoldedWeights, folder: Path, record: Conversion, options: Mapping[str, Any]) -> None:
    """Of each layer i its latents' rows: W_enc_i [n, d], b_enc_i [n], threshold_i [n], b_dec_i [d], and W_dec_i [n, L - i, d],
    what they write into layer i and each later one. Options: scan (a name).

    Raises: ValueError: other layers than all of the model's, or weights where a cross-layer transcoder has none.
    """
    layers = list(weights.hooks.layers or ())
    name = weights.hooks.model_name
    known = None if name is None else known_layer_count(name)
    if layers != list(range(known or len(layers))):
        raise ValueError(
            f"circuit-tracer export: expected a cross-layer transcoder of all {known or len(layers)} layers, got {layers}: a "
            "replacement model takes the place of every MLP. Train on all of them (--activations.layers all)"
        )
    weights = checked(weights, 0, record, options)
    count, width = len(layers), weights.d_in // len(layers)
    allowed = places_allowed(weights.d_sae, count, weights.d_in, weights.d_out)
    if bool(weights.W_enc[~allowed[0]].any()) or bool(weights.W_dec[~allowed[1]].any()):
        raise ValueError(
            "circuit-tracer export: expected zeros where a latent reads another layer or writes into an earlier one"
        )
    reads = layers_of_latents(weights.d_sae, count)
    threshold = torch.zeros(weights.d_sae) if weights.threshold is None else weights.threshold
    for n in range(count):
        mine, here = reads == n, slice(n * width, (n + 1) * width)
        encoder = {
            f"W_enc_{n}": weights.W_enc[mine, here],
            f"b_enc_{n}": weights.b_enc[mine],
            f"b_dec_{n}": weights.b_dec[here],
            f"threshold_{n}": threshold[mine],
        }
        decoder = weights.W_dec[mine, n * width :].unflatten(1, (count - n, width))
        write_safetensors(folder / f"W_enc_{n}.safetensors", {key: one.contiguous() for key, one in encoder.items()})
        write_safetensors(folder / f"W_dec_{n}.safetensors", {f"W_dec_{n}": decoder.contiguous()})
    record.add(f"latent i of layer l was latent i * {count} + l", "layout")
    source, target = weights.hooks.within_block()
    config = {
        "model_kind": "cross_layer_transcoder",
        "model_name": model_name(weights.hooks),
        "feature_input_hook": source,
        "feature_output_hook": target,
        "scan": options.get("scan") or folder.name.removeprefix(WRITING),
    }
    (folder / CONFIG_FILE).write_bytes(yaml.safe_dump(config, sort_keys=False).encode())
