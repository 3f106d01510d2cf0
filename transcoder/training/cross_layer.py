"""Cross-layer transcoders (Ameisen et al. 2025): a latent reads one layer's source and writes into this and every later target.

With layers l = 0 .. L-1, z_l the codes of the latents that read layer l and y_m the target of layer m:

    z_l = selection(W_enc^l x_l + b_enc^l)        y_hat_m = b_dec^m + sum over l <= m of W_dec^(l -> m) z_l

It is a `Transcoder` of rows x = (x_0, ..., x_{L-1}) and y = (y_0, ..., y_{L-1}) whose latents have zeros in W_enc outside their
own layer and in W_dec before it: the same ops, losses, checkpoints and reports. Latent i reads layer i mod L, so every prefix
of the dictionary has latents of each layer. Zeros take their share of memory and of the encoder's product, so this is for
models of few layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.config import ConfigError
from transcoder.model import Transcoder


def layers_of_latents(d_sae: int, layers: int) -> Tensor:
    """[d_sae] int64: the layer, by its place, that each latent reads."""
    return torch.arange(d_sae) % layers


def places_allowed(d_sae: int, layers: int, d_in: int, d_out: int) -> tuple[Tensor, Tensor]:
    """(W_enc's entries [d_sae, d_in] that may differ from 0, W_dec's [d_sae, d_out]), bool; the widths are those of all layers
    together.

    Raises: ConfigError: a width that the layers do not share out evenly.
    """
    for name, size in (("transcoder.d_sae", d_sae), ("d_in", d_in), ("d_out", d_out)):
        if size % layers:
            raise ConfigError(
                f"{name}: expected a multiple of the {layers} layers of a cross-layer transcoder, got {size}"
            )
    reads = layers_of_latents(d_sae, layers)[:, None]
    columns = (torch.arange(width) // (width // layers) for width in (d_in, d_out))
    into, out = columns
    return into == reads, out >= reads


@torch.no_grad()
def confine(transcoder: Transcoder, layers: int) -> None:
    """Make a new transcoder of the activations of all layers a cross-layer one, for good: weights outside are zero and get no
    gradient; rows keep unit norm."""
    config = transcoder.config
    masks = places_allowed(config.d_sae, layers, config.d_in, config.d_out)
    for matrix, mask in zip((transcoder.W_enc, transcoder.W_dec), masks, strict=True):
        allowed = mask.to(matrix.device)
        matrix.mul_(allowed)
        matrix.div_(matrix.norm(dim=1, keepdim=True))
        matrix.register_hook(lambda gradient, allowed=allowed: gradient * allowed)
