"""What the conformance tests share: transcoders with every part at work, inputs, a library's global state. Imports no peer."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from transcoder import Transcoder, TranscoderConfig

HOOKS = {"source_hook": "blocks.0.ln2.hook_normalized", "target_hook": "blocks.0.hook_mlp_out"}


def inputs(rows: int, d_in: int, seed: int = 7) -> Tensor:
    return 3 * torch.randn(rows, d_in, generator=torch.Generator().manual_seed(seed)) + 2


def transcoder(activation: str, *, d_in: int = 16, d_out: int = 16, d_sae: int = 96, **settings: Any) -> Transcoder:
    """Random weights, biases off zero, a normalisation of both sides, and for BatchTopK the threshold of about k = 6."""
    config = TranscoderConfig(d_in, d_out, d_sae, 6, activation=activation, **settings)  # type: ignore[arg-type]
    model = Transcoder(config, seed=3)
    generator = torch.Generator().manual_seed(5)
    x = inputs(512, d_in, seed=1)
    y = 0.3 * torch.randn(512, d_out, generator=generator) - 1
    model.set_normalization(x, y, "standardize")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        pre = model.normalize_source(x) @ model.W_enc.T + model.b_enc
        model.threshold.fill_(float(pre.flatten().sort(descending=True).values[6 * len(x)]))
    return model.eval()


def check_same(ours: Tensor, theirs: Tensor, x: Tensor, steps: int = 256) -> None:
    """Equal up to the rounding of sums of `steps` products of numbers of the size of x: 8 standard deviations of fp32."""
    assert ours.shape == theirs.shape
    scale = float(x.abs().max())
    bound = 8 * torch.finfo(torch.float32).eps * steps**0.5
    torch.testing.assert_close(theirs, ours, rtol=bound, atol=bound * scale)


def global_state(package: str) -> dict[tuple[str, ...], int]:
    """The identity of all that the package's modules and torch.nn.Module's hold: names, classes' attributes, entries of dicts.
    What is imported later adds to it; nothing in it may become another."""
    found: dict[tuple[str, ...], int] = {}
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] != package and name != "torch.nn.modules.module":
            continue
        for key, value in list(vars(module).items()):
            found[name, key] = id(value)
            if isinstance(value, type):
                found |= {(name, key, attribute): id(held) for attribute, held in vars(value).items()}
            elif isinstance(value, dict) and not key.startswith("__"):
                found |= {(name, key, str(entry)): id(held) for entry, held in value.items()}
    return found
