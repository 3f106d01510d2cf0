"""sparsify: SparseCoder, as autoencoder or transcoder, with or without a skip connection."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from transcoder.interop.accelerate.dispatch import FEWEST_ROWS, Accelerated, is_small, original, runs_library_code
from transcoder.interop.accelerate.encode import product_dtype, select
from transcoder.interop.accelerate.lazy import Computed, LazyTensor
from transcoder.interop.accelerate.tensor_guard import Unchanged
from transcoder.kernels import SparseCodes, sparse_decode

PACKAGE = "eai-sparsify"
TESTED = "1.3.3"

_CODES = "_transcoder_codes"
"""Attribute of the indices that `encode` hands out: a `_Pattern`."""


class _Pattern(NamedTuple):
    """The codes that a pair of indices and activations stands for, as long as the indices are unchanged."""

    codes: SparseCodes
    indices: weakref.ref[Tensor]
    changes: int

    @staticmethod
    def of(top_indices: Tensor) -> SparseCodes | None:
        found: _Pattern | None = getattr(top_indices, _CODES, None)
        if found is None or found.indices() is not top_indices:
            return None
        if top_indices.is_inference():
            # Which counts no changes.
            same = found.codes.indices.equal(top_indices.flatten())
        else:
            same = found.changes == top_indices._version
        return found.codes if same else None


_DECODED = "_transcoder_decoded"
"""What `decode` gave within `forward`: the first is the reconstruction (the skip connection is added to it in place); the
result's own is another one under multi_topk."""


def accelerated() -> list[Accelerated]:
    from sparsify.fused_encoder import EncoderOutput
    from sparsify.sparse_coder import ForwardOutput, SparseCoder

    # Looked for here, so that a version without them says so before a step does.
    for part in (EncoderOutput, ForwardOutput):
        assert part._fields
    return [Accelerated(SparseCoder, Coder, ("encode", "decode", "forward"))]


class Coder:
    """In front of sparsify's SparseCoder."""

    def encode(self: Any, x: Tensor) -> Any:
        """As the library's; entries of a row come by latent id, not by value. `pre_acts` is computed where it is read."""
        from sparsify.fused_encoder import EncoderOutput

        if runs_library_code(self, x, self.num_latents, "sparsify", lambda: _why_dense(self, x), FEWEST_ROWS):
            return original(self).encode(self, x)
        W, b = self.encoder.weight, self.encoder.bias
        read = self._read(x)
        acts, indices = _topk(read, W, b, self.cfg.k)
        # Their fused encoder gives no gradient to what is read from pre_acts.
        with torch.set_grad_enabled(torch.is_grad_enabled() and self._transcoder_repair_auxk):
            kept = read.clone() if read is x and x.is_inference() else read
            watched = Unchanged(encoder_weight=W, encoder_bias=b, **({"x": x} if kept is x else {}))
            source = Computed("pre_acts", nn.functional.linear, (kept, W, b), watched, relu=True)
            shape, dtype = (*read.shape[:-1], self.num_latents), product_dtype(read, W)
            pre = PreActivations.born(weakref.ref(self), shape, dtype, source, source.inputs)
        return EncoderOutput(acts, indices, pre)

    def decode(self: Any, top_acts: Tensor, top_indices: Tensor) -> Any:
        codes = _Pattern.of(top_indices)
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
        small = is_small(self, x, self.num_latents, FEWEST_ROWS)
        dead = None if small or dead_mask is None else dead_mask.nonzero().squeeze(1)
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


def _topk(x: Tensor, W: Tensor, b: Tensor, k: int) -> tuple[Tensor, Tensor]:
    codes = select(x, W, b, "topk", k, rows=True)
    # The caller's to change, as in the library: copies.
    indices = codes.indices.view(x.shape[0], k).clone()
    count = 0 if indices.is_inference() else indices._version
    setattr(indices, _CODES, _Pattern(codes, weakref.ref(indices), count))
    return codes.values.view(x.shape[0], k).to(torch.promote_types(x.dtype, W.dtype), copy=True), indices


class PreActivations(LazyTensor):
    """All of relu(x W + b), computed where it is read; `topk` of it selects by the kernel."""

    def _shortcut(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        source = self._source
        by_number = len(args) == 2 and type(args[1]) is int and kwargs in ({}, {"sorted": False})
        if func is not Tensor.topk or not by_number or not isinstance(source, Computed):
            return NotImplemented
        if not 0 < args[1] <= self.shape[-1]:
            return NotImplemented
        source.reads.check(source.what)
        with torch.set_grad_enabled(source.grad and torch.is_grad_enabled()):
            read, W, b = source.inputs
            found = _topk(read, W, b, args[1])
        if found[0].requires_grad:
            self.use()
        return found
