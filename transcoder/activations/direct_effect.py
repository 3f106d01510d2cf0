"""The direct effect of a step at a hook on the logits: past the later blocks, through the norms that the model has there."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Replace = Callable[[str, str, Tensor], Tensor]
"""(hook that is written, hook that is read, values [n, width]) -> what is read then, [n, width']."""

_SCALE = 16.0
"""Of a probe, per dimension: a norm's epsilon is far below it."""
_AGREES = 0.999
"""Cosine. Half precision stays above it."""


class _Gain(NamedTuple):
    """A map that is linear at a fixed scale: gain [width] times the step, its mean taken away first where it is centred."""

    gain: Tensor
    centred: bool

    def put_before_(self, weight: Tensor) -> None:
        """Makes `weight` [width, n] this map, then `weight`. In place: an unembedding takes gigabytes."""
        weight.mul_(self.gain[:, None])
        if self.centred:
            weight.sub_(weight.mean(0, keepdim=True))


def unembedding_at(hook: str, width: int, bridge: Any, replace: Replace) -> Tensor | str:
    """[width, vocabulary] fp32, see `HookedModel.unembedding`; or the reason why this hook has none.

    The norms are measured, not read: whatever a norm does with its weights (Gemma adds 1, LayerNorm centres, some models have a
    norm behind the hook), what it makes of a few known vectors gives its factor. Its scale, which depends on the token, is left
    out; so is a soft cap, which changes no order.
    """
    name = re.search(r"(hook_mlp_out|hook_attn_out|hook_resid_\w+|mlp\.hook_out|attn\.hook_out)$", hook)
    if name is None:
        return f"{hook} does not write into the residual stream"
    weight = getattr(bridge, "W_U", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or weight.shape[0] != width:
        return f"this model has no unembedding of width {width}"
    # What the residual stream gets of a part's own output: a norm may lie between them.
    added = re.sub(r"(mlp|attn)\.hook_out$", r"hook_\1_out", hook)
    last = f"blocks.{int(bridge.cfg.n_layers) - 1}.hook_resid_post"
    found = weight.detach().to(torch.float32, copy=True)
    for written, read in ((last, "unembed.hook_in"), (hook, added)):
        if written != read and read in bridge.hook_dict:
            step = _measure(written, read, replace, width, found.device)
            if isinstance(step, str):
                return step
            step.put_before_(found)
    return found


def _measure(written: str, read: str, replace: Replace, width: int, device: torch.device) -> _Gain | str:
    signs = torch.ones(width, device=device)
    signs[1::2] = -1
    signs -= signs.mean()
    signs /= signs.square().mean().sqrt()
    generator = torch.Generator().manual_seed(0)
    other = torch.randn(width, generator=generator).to(device) + 1
    probes = torch.stack([_SCALE * signs, 2 * _SCALE * signs, _SCALE * other])
    plus, minus = replace(written, read, torch.cat([probes, -probes])).split(3)
    unlike = (
        f"between {written} and {read} this model does more than a norm: tokens have no direct effect at a fixed scale"
    )
    if plus.shape != probes.shape:
        return unlike
    once, twice, of_other = (plus - minus) / 2
    growth = float(twice.norm() / once.norm())
    # A norm's output does not grow with its input; without a norm it grows as the input does.
    is_norm = abs(growth - 1) < abs(growth - 2)
    gain = once / (signs if is_norm else _SCALE * signs)
    agreement = {
        centred: float(torch.cosine_similarity(of_other, gain * (other - centred * other.mean()), dim=0))
        for centred in (False, True)
    }
    centred = agreement[True] > agreement[False]
    if not agreement[centred] > _AGREES or not min(abs(growth - 1), abs(growth - 2)) < 0.01:
        return unlike
    return _Gain(gain, centred)
