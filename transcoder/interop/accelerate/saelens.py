"""SAELens: TopK, BatchTopK and Matryoshka training SAEs; TopK and JumpReLU SAEs (what those are saved as) and transcoders.

Losses, hooks, normalisation and decoding stay the library's own code. What is replaced is the encoder (product, decoder-norm
rescaling and selection in one) and the auxiliary loss, which encodes the dead latents alone.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from transcoder.interop.accelerate.activations import SparseActivations
from transcoder.interop.accelerate.dispatch import Accelerated, hooked, original, runs_library_code
from transcoder.interop.accelerate.encode import How, select
from transcoder.interop.accelerate.lazy import Computed, LazyTensor, announce
from transcoder.interop.accelerate.tensor_guard import Unchanged
from transcoder.kernels import SparseCodes, sparse_decode

PACKAGE = "sae-lens"
TESTED = "6.54"


def accelerated() -> list[Accelerated]:
    """In the order to look in: the most specific class first."""
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE
    from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE
    from sae_lens.saes.topk_sae import TopKSAE, TopKTrainingSAE
    from sae_lens.saes.transcoder import JumpReLUTranscoder

    training = ("encode_with_hidden_pre", "decode", "calculate_topk_aux_loss")
    return [
        Accelerated(MatryoshkaBatchTopKTrainingSAE, Matryoshka, (*training, "_iterable_decode")),
        Accelerated(BatchTopKTrainingSAE, Training, training),
        Accelerated(TopKTrainingSAE, Training, training),
        Accelerated(TopKSAE, TopKInference, ("encode", "decode")),
        Accelerated(JumpReLUSAE, JumpReLUInference, ("encode",)),
        Accelerated(JumpReLUTranscoder, JumpReLUInference, ("encode",)),
    ]


class _Encoder:
    """What the classes below share; always in front of a SAELens class."""

    def _selected(self: Any, x: Tensor, dense: str | None, threshold: Tensor | None) -> tuple[Any, Any] | None:
        """(activations, hidden_pre), or None where the library's own code has to do it, or does it faster."""
        if runs_library_code(self, x, self.b_enc.shape[0], "SAELens", lambda: dense or _why_dense(self)):
            return None
        sae_in = self.process_sae_in(x)
        if threshold is not None and not bool(sae_in.isfinite().all()):
            announce(self, "input that is not finite: encoded by SAELens's own dense code")
            return None
        flat = sae_in.reshape(-1, sae_in.shape[-1])
        scale = self.W_dec.norm(dim=-1) if getattr(self.cfg, "rescale_acts_by_decoder_norm", False) else None
        how, argument = _selection(self, flat.shape[0], threshold)
        codes = select(flat, self.W_enc, self.b_enc, how, argument, scale=scale)
        values = codes.values
        if scale is not None:
            codes = codes.with_values(values * scale[codes.indices])
        acts: Any = SparseActivations.over(self, codes, sae_in.shape[:-1], self.W_enc.dtype)
        acts._encoded = _Encoded(values, scale, self.W_dec, Unchanged(W_dec=self.W_dec))
        inputs = (sae_in, self.W_enc, self.b_enc, *([] if scale is None else [scale]))
        unchanged = Unchanged(W_enc=self.W_enc, b_enc=self.b_enc)
        source = Computed("hidden_pre", _affine, inputs, unchanged, relu=False)
        hidden_pre = _HiddenPre.born(acts._owner, acts.shape, acts.dtype, source, inputs)
        if _active(self.hook_sae_acts_post):
            announce(self, "hook_sae_acts_post has hooks, which get the dense activations")
            acts = self.hook_sae_acts_post(acts.dense())
        return acts, hidden_pre


@dataclasses.dataclass
class _Encoded:
    """An attribute of activations: what `decode` needs to leave out their division by the decoder's norms."""

    values: Tensor
    """[nnz] before the multiplication by the norms."""
    scale: Tensor | None
    """[d_sae] those norms, or None where the SAE has none of it."""
    W_dec: Tensor
    unchanged: Unchanged
    levels: tuple[Tensor, ...] = ()
    """What `decode` found, in the mode `levels_grad`, from a decoder that has not changed while `levels_of` holds."""
    levels_grad: bool = False
    levels_of: Unchanged | None = None


def _affine(x: Tensor, W: Tensor, b: Tensor, scale: Tensor | None = None) -> Tensor:
    hidden = x @ W + b
    return hidden if scale is None else hidden * scale


class _HiddenPre(LazyTensor):
    def columns(self, ids: Tensor) -> Tensor:
        """self[..., ids]; computed alone where nothing else was."""
        source = self._source
        if not self.untouched() or not isinstance(source, Computed):
            return self.dense()[..., ids]
        source.reads.check(source.what)
        x, W, b, *scale = source.inputs
        with source.modes(source.grad and torch.is_grad_enabled()):
            part = _affine(x, W[:, ids], b[ids], *(s[ids] for s in scale))
        if part.requires_grad:
            self.use()
        return part


class _Decoder(_Encoder):
    def decode(self: Any, feature_acts: Any) -> Any:
        """As the library's, whose division by the decoder norms undoes the multiplication before: neither is done, and the
        gradient through both, which is 0, is not computed either. Norms that are others by now are divided by."""
        values = _undone(self, feature_acts)
        if values is None:
            return original(self).decode(self, feature_acts)
        shape = (*feature_acts.shape[:-1], self.W_dec.shape[1])
        out = _levels(self, feature_acts, values)[-1].to(self.W_dec.dtype).view(shape) + self.b_dec
        if values.requires_grad and torch.is_grad_enabled():
            feature_acts.use()
        out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(out))
        return self.reshape_fn_out(out, self.d_head)


class Training(_Decoder):
    def encode_with_hidden_pre(self: Any, x: Tensor) -> tuple[Any, Any]:
        found = self._selected(x, None, None)
        return original(self).encode_with_hidden_pre(self, x) if found is None else found

    def calculate_topk_aux_loss(
        self: Any, sae_in: Tensor, sae_out: Tensor, hidden_pre: Any, dead_neuron_mask: Tensor | None
    ) -> Tensor:
        """As the library's, from the pre-activations of the dead latents alone."""
        lazy = isinstance(hidden_pre, _HiddenPre) and hidden_pre.untouched()
        if dead_neuron_mask is None or not lazy or self.cfg.normalize_activations not in _WITH_AUX_LOSS:
            return original(self).calculate_topk_aux_loss(self, sae_in, sae_out, hidden_pre, dead_neuron_mask)
        ids = dead_neuron_mask.nonzero().squeeze(1)
        if ids.numel() == 0:
            return sae_out.new_tensor(0.0)
        k_aux = sae_in.shape[-1] // 2
        scale = min(ids.numel() / k_aux, 1.0)
        acts = hidden_pre.columns(ids)
        if k_aux < ids.numel():
            kept = acts.topk(k_aux, sorted=False)
            acts = torch.zeros_like(acts).scatter(-1, kept.indices, kept.values)
        W_dec = self.W_dec[ids]
        if self.cfg.rescale_acts_by_decoder_norm:
            acts = acts / W_dec.norm(dim=-1)
        recons = self.reshape_fn_out(acts @ W_dec, self.d_head)
        loss = (recons - (sae_in - sae_out).detach()).pow(2).sum(dim=-1).mean()
        return self.cfg.aux_loss_coefficient * scale * loss


class Matryoshka(Training):
    def _iterable_decode(
        self: Any, feature_acts: Any, include_outer_loss: bool = False
    ) -> Iterator[tuple[int, Tensor]]:
        """As the library's, from the one pass that `decode` made."""
        encoded: Any = getattr(feature_acts, "_encoded", None)
        widths = self.cfg.matryoshka_widths
        fits = (
            encoded is not None
            and encoded.levels_of is not None
            and encoded.W_dec is self.W_dec
            and feature_acts.untouched()
            and len(encoded.levels) == len(widths)
            and encoded.levels_grad == torch.is_grad_enabled()
            and encoded.levels_of.holds()
        )
        if not fits:
            yield from original(self)._iterable_decode(self, feature_acts, include_outer_loss)
            return
        for width, level in list(zip(widths, encoded.levels, strict=True))[: None if include_outer_loss else -1]:
            yield width, self.run_time_activation_norm_fn_out(level.to(self.W_dec.dtype) + self.b_dec)


def _undone(sae: Any, acts: Any) -> Tensor | None:
    """[nnz] the activations over the decoder's norms of now; None where they are not `sae`'s own, untouched, with the decoder
    that they were encoded with."""
    encoded = getattr(acts, "_encoded", None)
    if encoded is None or encoded.W_dec is not sae.W_dec or not acts.untouched() or not encoded.unchanged.holds():
        return None
    if (encoded.scale is not None) != bool(sae.cfg.rescale_acts_by_decoder_norm):
        return None
    values: Tensor = encoded.values
    if encoded.scale is not None:
        # Changes through `.data` are seen by nothing else.
        ratio = encoded.scale.detach() / sae.W_dec.detach().norm(dim=-1)
        if not bool(ratio.isfinite().all()):
            return None
        values = values * ratio[acts.codes.indices]
    return values


def _levels(sae: Any, acts: Any, values: Tensor) -> tuple[Tensor, ...]:
    """Of each level [rows, d_out]: what each prefix of the dictionary reconstructs, without the bias; one for the whole where
    there are no prefixes. Kept with the activations."""
    codes, widths = acts.codes.with_values(values), getattr(sae.cfg, "matryoshka_widths", None)
    none = torch.zeros_like(sae.b_dec)
    if not widths or len(widths) == 1 or acts.dim() != 2:
        return (sparse_decode(codes, sae.W_dec, none),)
    # Each level's share of a row becomes a row of its own: one product gives the shares, their running sum the prefixes.
    rows = codes.shape[0]
    level = torch.bucketize(codes.indices, torch.tensor(widths, device=codes.device), right=True)
    order = (level * rows + codes.rows()).sort(stable=True)
    counts = torch.bincount(order.values, minlength=len(widths) * rows)
    row_ptr = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    values, indices = codes.values[order.indices], codes.indices[order.indices]
    shares = SparseCodes.trusted(values, indices, row_ptr, (len(widths) * rows, codes.shape[1]))
    # Added one by one: the gradient of `cumsum` reverses all of it twice.
    levels = tuple(itertools.accumulate(sparse_decode(shares, sae.W_dec, none).view(len(widths), rows, -1).unbind(0)))
    encoded = acts._encoded
    encoded.levels, encoded.levels_grad, encoded.levels_of = levels, torch.is_grad_enabled(), Unchanged(W_dec=sae.W_dec)
    return levels


class TopKInference(_Decoder):
    def encode(self: Any, x: Tensor) -> Any:
        found = self._selected(x, None, None)
        return original(self).encode(self, x) if found is None else found[0]


class JumpReLUInference(_Encoder):
    def encode(self: Any, x: Tensor) -> Any:
        dense = None if type(self.activation_fn) is nn.ReLU else "an activation_fn other than ReLU"
        found = self._selected(x, dense, self.threshold)
        return original(self).encode(self, x) if found is None else found[0]


_WITH_AUX_LOSS = ("none", "expected_average_only_in", "covariance_whitening")
"""Normalisations that SAELens' auxiliary loss takes; for the others it raises."""


def _selection(sae: Any, rows: int, threshold: Tensor | None) -> tuple[How, Any]:
    if threshold is not None:
        return "threshold", threshold
    k = sae.activation_fn.k
    return ("topk", k) if type(sae.activation_fn).__name__ == "TopK" else ("batch_topk", int(k * rows))


def _why_dense(sae: Any) -> str | None:
    from sae_lens.saes.batchtopk_sae import BatchTopK
    from sae_lens.saes.topk_sae import TopK

    if torch.compiler.is_compiling():
        return "torch.compile"
    if _active(sae.hook_sae_acts_pre):
        return "hook_sae_acts_pre has hooks"
    if hooked(sae.activation_fn):
        return "activation_fn has hooks"
    function = sae.activation_fn
    if type(function) is BatchTopK:
        return None if 1 <= function.k <= sae.b_enc.shape[0] else f"k = {function.k}"
    return None if type(function) in (TopK, nn.ReLU) else f"activation_fn {type(function).__name__}"


def _active(point: nn.Module) -> bool:
    """Whether a hook point does more than hand on."""
    from sae_lens.saes.topk_sae import SparseHookPoint
    from transformer_lens.hook_points import HookPoint

    return type(point) not in (HookPoint, SparseHookPoint, nn.Identity) or hooked(point)
