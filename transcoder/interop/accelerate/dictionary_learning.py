"""dictionary_learning: AutoEncoderTopK, BatchTopKSAE and MatryoshkaBatchTopKSAE; their trainers stay the library's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transcoder.interop.accelerate.activations import SparseActivations
from transcoder.interop.accelerate.dispatch import FEWEST_ROWS, Accelerated, hooked, original, runs_library_code
from transcoder.interop.accelerate.encode import How, product_dtype, select
from transcoder.interop.accelerate.lazy import Computed, LazyTensor
from transcoder.interop.accelerate.tensor_guard import Unchanged
from transcoder.kernels import SparseCodes

PACKAGE = "dictionary-learning"
TESTED = "0.1.0"


def accelerated() -> list[Accelerated]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    return [
        Accelerated(AutoEncoderTopK, TopK, ("encode",)),
        Accelerated(BatchTopKSAE, BatchTopK, ("encode",)),
        Accelerated(MatryoshkaBatchTopKSAE, BatchTopK, ("encode",)),
    ]


class TopK:
    def encode(self: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """As the library's; the k entries of a row come by latent id, not by value."""
        k = int(self.k)
        found = _encoded(self, x, "topk", k, use_threshold, return_topk)
        if found is None:
            return original(self).encode(self, x, return_topk=return_topk, use_threshold=use_threshold)
        codes, acts, post_relu = found
        if not return_topk:
            return acts
        # The caller's to change, as in the library.
        values, indices = codes.values.view(-1, k).to(acts.dtype, copy=True), codes.indices.view(-1, k).clone()
        return acts, values, indices, post_relu


class BatchTopK:
    """Of the Matryoshka class too."""

    def encode(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        found = _encoded(self, x, "batch_topk", int(self.k) * x.shape[0], use_threshold, return_active)
        if found is None:
            return original(self).encode(self, x, return_active=return_active, use_threshold=use_threshold)
        codes, acts, post_relu = found
        return (acts, _active(codes), post_relu) if return_active else acts


def _why_dense(sae: Any, x: Tensor, use_threshold: bool, with_dense: bool) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile"
    encoder = getattr(sae, "encoder", None)
    if encoder is not None and type(encoder) is not nn.Linear:
        return f"an encoder of type {type(encoder).__name__}"
    if encoder is not None and hooked(encoder):
        return "hooks on the encoder"
    if encoder is not None and encoder.bias is None:
        return "an encoder without a bias"
    if x.dim() != 2 and (with_dense or not use_threshold):
        return f"input of {x.dim()} dimensions"
    if use_threshold and not bool(x.isfinite().all()):
        return "input that is not finite"
    if len(getattr(sae, "group_sizes", ())) != getattr(sae, "active_groups", 0):
        return "active_groups below the number of groups"
    # Before the first update every positive activation is above it: nothing is sparse about that.
    return "a threshold below 0 (not set yet)" if use_threshold and float(sae.threshold) < 0 else None


def _encoded(
    sae: Any, x: Tensor, how: How, count: int, use_threshold: bool, with_dense: bool
) -> tuple[SparseCodes, SparseActivations, LazyTensor] | None:
    """(codes, activations, all of them before the selection), or None where the library's own code does it."""

    def why_dense() -> str | None:
        why = _why_dense(sae, x, use_threshold, with_dense)
        if why is None and how == "topk" and use_threshold and with_dense:
            why = "return_topk together with use_threshold"
        return why

    if runs_library_code(sae, x, sae.dict_size, "the library", why_dense, FEWEST_ROWS):
        return None
    # The Matryoshka class keeps W_enc [d_in, d_sae]; the others have an nn.Linear.
    encoder = getattr(sae, "encoder", None)
    rows = encoder is not None
    W, b = (encoder.weight, encoder.bias) if encoder is not None else (sae.W_enc, sae.b_enc)
    read = x - sae.b_dec
    how, argument = ("threshold", sae.threshold) if use_threshold else (how, count)
    codes = select(read.reshape(-1, read.shape[-1]), W, b, how, argument, rows=rows)

    def pre(read: Tensor, W: Tensor, b: Tensor) -> Tensor:
        return nn.functional.linear(read, W if rows else W.T, b)

    leading, dtype, inputs = read.shape[:-1], product_dtype(read, W), (read, W, b)
    acts = SparseActivations.over(sae, codes, leading, dtype)
    source = Computed("post_relu", pre, inputs, Unchanged(W_enc=W, b_enc=b), relu=True)
    return codes, acts, LazyTensor.born(acts._owner, acts.shape, dtype, source, inputs)


def _active(codes: SparseCodes) -> Tensor:
    """[d_sae] bool: latents with a positive value somewhere."""
    fired = torch.zeros(codes.shape[1] + 1, dtype=torch.bool, device=codes.device)
    return fired.index_fill_(0, torch.where(codes.values > 0, codes.indices, codes.shape[1]), True)[:-1]
