"""sparsify: SparseCoder, as autoencoder or transcoder, with or without a skip connection."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from transcoder.interop.accelerate.activations import LazyTensor, announce, fresh
from transcoder.interop.accelerate.encode import select
from transcoder.interop.accelerate.kinds import Kind, original
from transcoder.interop.accelerate.small import FEWEST_ROWS, own_code
from transcoder.kernels import sparse_decode

PACKAGE = "eai-sparsify"
TESTED = "1.3.3"

_CODES = "_transcoder_codes"
"""Attribute of the indices that `encode` hands out: the codes that they and the activations beside them are."""


_DECODED = "_transcoder_decoded"
"""What `decode` gave within `forward`: the first is the reconstruction (the skip connection is added to it in place); the
result's own is another one under multi_topk."""


def kinds() -> list[Kind]:
    from sparsify.fused_encoder import EncoderOutput
    from sparsify.sparse_coder import ForwardOutput, SparseCoder

    # Looked for here, so that a version without them says so before a step does.
    for part in (EncoderOutput, ForwardOutput):
        assert part._fields
    return [Kind(SparseCoder, Coder, ("encode", "decode", "forward"))]


class Coder:
    """In front of sparsify's SparseCoder."""

    def encode(self: Any, x: Tensor) -> Any:
        """As the library's; entries of a row come by latent id, not by value. `pre_acts` is computed where it is read."""
        from sparsify.fused_encoder import EncoderOutput

        if own_code(self, x, self.num_latents, FEWEST_ROWS):
            return original(self).encode(self, x)
        why = _why_dense(self, x)
        if why is not None:
            announce(self, f"{why}: encoded by sparsify's own dense code")
            return original(self).encode(self, x)
        read, repair = self._read(x), self._transcoder_repair_auxk
        acts, indices = _topk(self, read, self.cfg.k)

        def graph() -> Any:
            # Their fused encoder gives no gradient to what is read from pre_acts.
            return torch.set_grad_enabled(torch.is_grad_enabled() and repair)

        def pre() -> Tensor:
            with graph():
                return torch.relu(nn.functional.linear(read, self.encoder.weight, self.encoder.bias))

        def strongest(k: int) -> tuple[Tensor, Tensor]:
            with graph():
                return _topk(self, read, k)

        shape = (*read.shape[:-1], self.num_latents)
        return EncoderOutput(acts, indices, PreActivations.reading(self, shape, acts, pre, strongest))

    def decode(self: Any, top_acts: Tensor, top_indices: Tensor) -> Any:
        codes = getattr(top_indices, _CODES, None)
        if codes is None or self.W_dec is None or top_acts.shape != top_indices.shape:
            return original(self).decode(self, top_acts, top_indices)
        y = sparse_decode(codes.with_values(top_acts.reshape(-1).to(codes.dtype)), self.W_dec, self.b_dec)
        y = y.to(self.dtype).view(*top_acts.shape[:-1], y.shape[-1])
        self.__dict__.get(_DECODED, []).append(y)
        return y

    def forward(
        self: Any,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> Any:
        """As the library's; AuxK encodes the dead latents alone."""
        if own_code(self, x, self.num_latents, FEWEST_ROWS):
            return original(self).forward(self, x, y, dead_mask=dead_mask, total_variance=total_variance)
        dead = None if dead_mask is None else dead_mask.nonzero().squeeze(1)
        if dead is None or dead.numel() == 0 or self.W_dec is None or _why_dense(self, x) is not None:
            return original(self).forward(self, x, y, dead_mask=dead_mask, total_variance=total_variance)
        decoded: list[Tensor] = []
        self.__dict__[_DECODED] = decoded
        try:
            out = original(self).forward(self, x, y, total_variance=total_variance)
        finally:
            del self.__dict__[_DECODED]
        y = x if y is None else y
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        k_aux = y.shape[-1] // 2
        scale = min(dead.numel() / k_aux, 1.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._transcoder_repair_auxk):
            read = self._read(x)
            W_enc, b_enc = self.encoder.weight[dead], self.encoder.bias[dead]
            if k_aux < dead.numel():
                codes = select(read, W_enc, b_enc, "topk", k_aux, rows=True)
            else:
                acts = torch.relu(read @ W_enc.T + b_enc)
        W_dec = self.W_dec[dead]
        e_hat = sparse_decode(codes, W_dec, torch.zeros_like(self.b_dec)) if k_aux < dead.numel() else acts @ W_dec
        auxk_loss = scale * (e_hat - (y - decoded[0]).detach()).pow(2).sum() / total_variance
        return out._replace(auxk_loss=auxk_loss)

    def _read(self: Any, x: Tensor) -> Any:
        """What the encoder reads."""
        return x if self.cfg.transcode else x - self.b_dec


def _why_dense(coder: Any, x: Tensor) -> str | None:
    if coder.cfg.activation != "topk":
        return f"activation {coder.cfg.activation!r}"
    if torch.compiler.is_compiling():
        return "torch.compile"
    return None if x.dim() == 2 else f"input of {x.dim()} dimensions"


def _topk(coder: Any, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    weight, bias = coder.encoder.weight, coder.encoder.bias
    codes = select(x, weight, bias, "topk", k, rows=True)
    indices = codes.indices.view(x.shape[0], k)
    setattr(indices, _CODES, codes)
    return codes.values.view(x.shape[0], k).to(torch.promote_types(x.dtype, weight.dtype)), indices


class PreActivations(LazyTensor):
    """All of relu(x W + b), computed where it is read; `topk` of it selects by the kernel."""

    _strongest: Callable[[int], tuple[Tensor, Tensor]]

    @staticmethod
    def reading(
        owner: nn.Module,
        shape: Sequence[int],
        like: Tensor,
        make: Callable[[], Tensor],
        strongest: Callable[[int], tuple[Tensor, Tensor]],
    ) -> PreActivations:
        new: PreActivations = fresh(
            PreActivations, owner, shape, like.dtype, like.device, make, like.requires_grad, None
        )
        new._strongest = strongest
        return new

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        mine = args[0] if args else None
        plain = len(args) == 2 and (kwargs or {}) in ({}, {"sorted": False})
        if func is Tensor.topk and plain and isinstance(mine, PreActivations) and mine._dense is None:
            return mine._strongest(args[1])
        return super().__torch_function__(func, types, args, kwargs)
