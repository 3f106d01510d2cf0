"""dictionary_learning: AutoEncoderTopK, BatchTopKSAE and MatryoshkaBatchTopKSAE; their trainers stay the library's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from transcoder.interop.accelerate.activations import LazyTensor, SparseActivations, announce
from transcoder.interop.accelerate.encode import How, select
from transcoder.interop.accelerate.kinds import Kind, original
from transcoder.interop.accelerate.small import FEWEST_ROWS, own_code
from transcoder.kernels import SparseCodes

PACKAGE = "dictionary-learning"
TESTED = "0.1.0"


def kinds() -> list[Kind]:
    from dictionary_learning.trainers.batch_top_k import BatchTopKSAE
    from dictionary_learning.trainers.matryoshka_batch_top_k import MatryoshkaBatchTopKSAE
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    return [
        Kind(AutoEncoderTopK, TopK, ("encode",)),
        Kind(BatchTopKSAE, BatchTopK, ("encode",)),
        Kind(MatryoshkaBatchTopKSAE, Matryoshka, ("encode",)),
    ]


class TopK:
    def encode(self: Any, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """As the library's; the k entries of a row come by latent id, not by value."""
        if own_code(self, x, self.dict_size, FEWEST_ROWS):
            return original(self).encode(self, x, return_topk=return_topk, use_threshold=use_threshold)
        why = _why_dense(self, x, use_threshold)
        if why is None and use_threshold and return_topk:
            why = "return_topk beside use_threshold"
        if why is not None:
            announce(self, f"{why}: encoded by the library's own dense code")
            return original(self).encode(self, x, return_topk=return_topk, use_threshold=use_threshold)
        how, argument = _selection(self, "topk", int(self.k), use_threshold)
        codes, acts, post_relu = _encoded(self, x, self.encoder.weight, self.encoder.bias, True, how, argument)
        if not return_topk:
            return acts
        k = int(self.k)
        return acts, codes.values.view(-1, k), codes.indices.view(-1, k), post_relu


class BatchTopK:
    def encode(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        if own_code(self, x, self.dict_size, FEWEST_ROWS):
            return original(self).encode(self, x, return_active=return_active, use_threshold=use_threshold)
        why = _why_dense(self, x, use_threshold)
        if why is not None:
            announce(self, f"{why}: encoded by the library's own dense code")
            return original(self).encode(self, x, return_active=return_active, use_threshold=use_threshold)
        how, argument = _selection(self, "batch_topk", int(self.k) * x.shape[0], use_threshold)
        codes, acts, post_relu = _encoded(self, x, self.encoder.weight, self.encoder.bias, True, how, argument)
        return (acts, _active(codes), post_relu) if return_active else acts


class Matryoshka:
    def encode(self: Any, x: Tensor, return_active: bool = False, use_threshold: bool = True) -> Any:
        if own_code(self, x, self.dict_size, FEWEST_ROWS):
            return original(self).encode(self, x, return_active=return_active, use_threshold=use_threshold)
        why = _why_dense(self, x, use_threshold)
        if why is None and self.active_groups != len(self.group_sizes):
            why = "active_groups below the number of groups"
        if why is not None:
            announce(self, f"{why}: encoded by the library's own dense code")
            return original(self).encode(self, x, return_active=return_active, use_threshold=use_threshold)
        how, argument = _selection(self, "batch_topk", int(self.k) * x.shape[0], use_threshold)
        codes, acts, post_relu = _encoded(self, x, self.W_enc, self.b_enc, False, how, argument)
        return (acts, _active(codes), post_relu) if return_active else acts


def _why_dense(sae: Any, x: Tensor, use_threshold: bool) -> str | None:
    if torch.compiler.is_compiling():
        return "torch.compile"
    encoder = getattr(sae, "encoder", None)
    if encoder is not None and type(encoder) is not nn.Linear:
        return f"an encoder of type {type(encoder).__name__}"
    if encoder is not None and (encoder._forward_hooks or encoder._forward_pre_hooks or encoder._backward_hooks):
        return "hooks on the encoder"
    if x.dim() != 2 and not use_threshold:
        return f"input of {x.dim()} dimensions"
    # Before the first update every positive activation is above it: nothing is sparse about that.
    return "a threshold below 0 (not set yet)" if use_threshold and float(sae.threshold) < 0 else None


def _selection(sae: Any, how: How, argument: int, use_threshold: bool) -> tuple[How, Any]:
    return ("threshold", sae.threshold) if use_threshold else (how, argument)


def _encoded(
    sae: Any, x: Tensor, W: Tensor, b: Tensor, rows: bool, how: How, argument: Any
) -> tuple[SparseCodes, SparseActivations, LazyTensor]:
    read = x - sae.b_dec
    flat = read.reshape(-1, read.shape[-1])
    codes = select(flat, W, b, how, argument, rows=rows)

    def post_relu(ids: Tensor | None = None) -> Tensor:
        weight = W if rows else W.T
        weight, bias = (weight, b) if ids is None else (weight[ids], b[ids])
        return torch.relu(nn.functional.linear(read, weight, bias))

    leading = read.shape[:-1]
    acts = SparseActivations.over(sae, codes, leading, torch.promote_types(read.dtype, W.dtype))
    return codes, acts, LazyTensor.of(sae, (*leading, b.shape[0]), acts.kept, post_relu, post_relu)


def _active(codes: SparseCodes) -> Tensor:
    """[d_sae] bool: latents with a positive value somewhere."""
    fired = torch.zeros(codes.shape[1] + 1, dtype=torch.bool, device=codes.device)
    return fired.index_fill_(0, torch.where(codes.values > 0, codes.indices, codes.shape[1]), True)[:-1]
