"""FoldedWeights: the form that every format is converted through. Raw units, no normalisation, a latent is a row."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.model import Transcoder, TranscoderConfig

_BLOCK = re.compile(r"blocks\.(\d+)\.")


@dataclass(frozen=True)
class Hooks:
    """Where a transcoder reads and writes, as far as it is known. TransformerLens names."""

    source: str | None = None
    target: str | None = None
    model_name: str | None = None
    context_size: int | None = None
    prepend_bos: bool | None = None
    layers: tuple[int, ...] | None = None
    """Of a cross-layer transcoder: those that it reads and writes, one after another in its rows. The hooks are of one."""

    @property
    def layer(self) -> int | None:
        """The block that the source hook names."""
        match = _BLOCK.match(self.source or "")
        return int(match[1]) if match else None

    def within_block(self) -> tuple[str | None, str | None]:
        """Both hooks without `blocks.L.`"""
        source, target = (None if hook is None else _BLOCK.sub("", hook) for hook in (self.source, self.target))
        return source, target


@dataclass(frozen=True)
class FoldedWeights:
    """y_hat = select(relu((x - input_bias) @ W_enc.T + b_enc)) @ W_dec + b_dec [+ x @ W_skip.T]

    Fields (fp32 on the CPU):
        W_enc [d_sae, d_in], b_enc [d_sae], W_dec [d_sae, d_out], b_dec [d_out], W_skip [d_out, d_in] or None.
        input_bias: [d_in] or None for zero. The skip connection reads x itself.
        activation: "topk" keeps the k largest a token; "threshold" what is above `threshold` (a number, or [d_sae]), both of
            the positive pre-activations only.
        k: of TopK, or of the BatchTopK training; None where the format does not say.
        widths: cumulative Matryoshka widths, or None.
        hooks: where it belongs.
    """

    W_enc: Tensor
    b_enc: Tensor
    W_dec: Tensor
    b_dec: Tensor
    activation: Literal["topk", "threshold"]
    W_skip: Tensor | None = None
    input_bias: Tensor | None = None
    k: int | None = None
    threshold: Tensor | None = None
    widths: tuple[int, ...] | None = None
    hooks: Hooks = field(default_factory=Hooks)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def nested(self) -> bool:
        """Whether it has several Matryoshka widths."""
        return len(self.widths or ()) > 1

    def check_one_width(self, what: str) -> None:
        """ValueError unless d_in is d_out. `what` begins it: "sparsify export: a SparseCoder"."""
        if self.d_in != self.d_out:
            raise ValueError(f"{what} has one width for input and output, got d_in {self.d_in} and d_out {self.d_out}")

    def with_input_bias(self, bias: Tensor | None, record: Conversion) -> FoldedWeights:
        """The same function reading x - bias (None: x): b_enc takes W_enc @ (bias - input_bias)."""
        present = torch.zeros(self.d_in) if self.input_bias is None else self.input_bias
        wanted = torch.zeros(self.d_in) if bias is None else bias
        if torch.equal(present, wanted):
            return replace(self, input_bias=bias)
        shift = torch.mv(self.W_enc.double(), wanted.double() - present.double())
        what = "the bias on the input" if bias is None else "the difference of the biases on the input"
        record.add(f"{what} was folded into b_enc", "rounding")
        return replace(self, b_enc=(self.b_enc.double() + shift).float(), input_bias=bias)

    def as_thresholds(self, record: Conversion, threshold: float | None, why: str, instead: str = "") -> FoldedWeights:
        """A TopK turned into thresholds, which is another function: refused unless the record allows it.

        Args:
            threshold: the one to use; None takes the running mean of the smallest selected value, tracked in training.
            why: begins the refusal, such as "SAELens' jumprelu_transcoder knows thresholds only".
        """
        if self.activation == "threshold":
            if threshold is not None:
                record.add(
                    f"threshold {threshold:g} is not used: it is for TopK, and this transcoder has its own", "note"
                )
            return self
        record.change(f"{why}, and TopK keeps k = {self.k} latents a token whatever their values", instead)
        if threshold is not None:
            return replace(self, activation="threshold", threshold=torch.tensor(float(threshold)))
        if self.threshold is None or not bool((self.threshold >= 0).all()):
            raise ValueError(
                f"{record.format}: TopK has no tracked threshold here (no batch was trained): give threshold= (--threshold)"
            )
        return replace(self, activation="threshold")

    def as_topk(self, record: Conversion, why: str) -> FoldedWeights:
        """Thresholds turned into TopK, which is another function: refused unless the record allows it."""
        if self.activation == "topk":
            return self
        if self.k is None:
            raise ValueError(f"{record.format}: expected k, the number of latents a token; give k= (--k)")
        record.change(f"{why}, and this transcoder keeps what is above its threshold, however many that are")
        return replace(self, activation="topk")

    def as_relu(self, record: Conversion, why: str) -> FoldedWeights:
        """Thresholds moved into b_enc, which is another function: refused unless the record allows it.

        The same latents act on the same tokens, each by its threshold less. (Thresholds left out would let every positive
        pre-activation act: on the demo's transcoder 462 latents a token for 15, and twice the error of the former.)
        """
        threshold = self.latent_thresholds()
        if bool(threshold.any()):
            record.change(
                f"{why}: it has no thresholds. They are subtracted from b_enc, so the same latents act, each by its threshold "
                f"less (from {float(threshold.min()):.4g} to {float(threshold.max()):.4g})"
            )
        return replace(self, b_enc=self.b_enc - threshold, threshold=torch.tensor(0.0))

    def without_skip(self, record: Conversion, why: str) -> FoldedWeights:
        """The skip connection dropped: refused unless the record allows it."""
        if self.W_skip is None:
            return self
        record.change(f"{why}: the linear skip connection would be dropped")
        return replace(self, W_skip=None)

    def latent_thresholds(self) -> Tensor:
        """[d_sae], none below 0: what is compared with the pre-activations."""
        assert self.threshold is not None
        return self.threshold.clamp_min(0).expand(self.d_sae).contiguous()

    def with_latent_thresholds(self) -> FoldedWeights:
        """The same function with a threshold for each latent."""
        return replace(self, threshold=self.latent_thresholds())


def batch_topk_at_inference(
    threshold: Tensor | None, k: int | None, options: Mapping[str, Any], record: Conversion
) -> dict[str, Any]:
    """`activation` and `threshold` of a BatchTopK with the tracked threshold of its file. Without one the option `threshold`
    counts, or it becomes a TopK where the record allows that."""
    if threshold is not None:
        return {"activation": "threshold", "threshold": threshold}
    if options.get("threshold") is not None:
        record.add(f"the threshold {options['threshold']:g} was given: the file has none", "note")
        return {"activation": "threshold", "threshold": torch.tensor(float(options["threshold"]))}
    record.change(
        f"it is a BatchTopK without a tracked threshold, which chooses over each batch; a TopK of k = {k} would choose for "
        "each token",
        "The mean of the smallest chosen value over some batches is its threshold: threshold= (--threshold).",
    )
    return {"activation": "topk", "threshold": None}


def with_unit_decoder(where: str, fields: Mapping[str, Any], record: Conversion, setting: str) -> dict[str, Any]:
    """The fields of a dictionary that selects by activations times the decoder's norms, with a decoder of norm 1."""
    norms = torch.linalg.vector_norm(fields["W_dec"].double(), dim=1)
    record.add(f"{setting}: the decoder's norms were folded into W_enc, b_enc and W_dec", "rounding")
    if bool((norms == 0).any()):
        raise ValueError(f"{where}: W_dec: expected no row of zeros with {setting}, found some")
    return {
        **fields,
        "W_enc": (fields["W_enc"].double() * norms[:, None]).float(),
        "b_enc": (fields["b_enc"].double() * norms).float(),
        "W_dec": (fields["W_dec"].double() / norms[:, None]).float(),
    }


def from_transcoder(model: Transcoder, hooks: Hooks, record: Conversion) -> FoldedWeights:
    """Fold the normalisation of source and target into the weights. Latents keep their activations."""
    state = {name: tensor.detach().to("cpu", torch.float32) for name, tensor in model.state_dict().items()}
    source_scale, target_scale = state["source_scale"].double(), state["target_scale"].double()
    W_enc, b_dec, W_dec = state["W_enc"], state["b_dec"].double() / target_scale, state["W_dec"]
    W_skip, mean = state.get("W_skip"), state["source_mean"]
    scaled = bool(source_scale != 1) or bool(target_scale != 1)
    centred = bool(state["target_mean"].any()) or (bool(mean.any()) and W_skip is not None)
    if scaled:
        record.add(
            f"the scales of the normalisation (source * {float(source_scale):.6g}, target * {float(target_scale):.6g}) were "
            "folded into W_enc, W_dec, b_dec"
            + (" and W_skip" if W_skip is not None else "")
            + "; activations keep their units",
            "rounding",
        )
        W_enc = (W_enc.double() * source_scale).float()
        W_dec = (W_dec.double() / target_scale).float()
        W_skip = None if W_skip is None else (W_skip.double() * (source_scale / target_scale)).float()
    if centred:
        record.add("the means of the normalisation were folded into b_dec", "rounding")
        b_dec = b_dec + state["target_mean"].double()
        if W_skip is not None:
            b_dec = b_dec - torch.mv(W_skip.double(), mean.double())
    config = model.config
    by_threshold = model.selection.by_threshold
    if by_threshold and bool((state["threshold"] < 0).all()):
        record.add("no batch was trained: the threshold acts as 0", "note")
    return FoldedWeights(
        W_enc=W_enc,
        b_enc=state["b_enc"],
        W_dec=W_dec,
        b_dec=b_dec.float(),
        W_skip=W_skip,
        input_bias=mean if bool(mean.any()) else None,
        activation="threshold" if by_threshold else "topk",
        k=config.k,
        threshold=state["threshold"],
        widths=tuple(config.widths or ()),
        hooks=hooks,
    )


def to_transcoder(weights: FoldedWeights, record: Conversion, *, k: int | None = None) -> Transcoder:
    """A Transcoder of these weights; its normalisation is the identity but for the bias on the input.

    Args:
        k: for BatchTopK training, instead of what the format says; without both, the smaller of 32 and d_sae. For TopK it
            decides the function, so another than the file's is refused unless the record allows it.
    """
    check_weights(f"{record.format} import: {record.path}", weights)
    if weights.activation == "topk" and k is not None and weights.k not in (None, k):
        record.change(f"TopK with k = {k}, the file's is {weights.k}")
    if k is None and weights.k is not None:
        # A mean L0 may be more than there are latents; TopK's own k may not.
        k = weights.k if weights.activation == "topk" else min(weights.k, weights.d_sae)
    if k is None:
        if weights.activation == "topk":
            raise ValueError(f"{record.format} import: expected k of TopK in the file, found none; give k= (--k)")
        k = min(32, weights.d_sae)
        record.add(f"the file does not say k; {k} is what further training would use (--k changes it)", "note")
    if k > weights.d_sae:
        raise ValueError(
            f"{record.format} import: {record.path}: k: expected at most the {weights.d_sae} latents, got {k}"
        )
    threshold = torch.tensor(-1.0) if weights.threshold is None else weights.threshold.detach().float()
    if weights.activation == "threshold" and bool((threshold < 0).any()):
        record.add("thresholds below 0 act as 0 (the ReLU): written as 0", "layout")
        threshold = threshold.clamp_min(0)
    if threshold.dim() == 1 and bool((threshold == threshold[0]).all()):
        # One number for all: BatchTopK's own form.
        threshold = threshold[0].clone()
    config = TranscoderConfig(
        weights.d_in,
        weights.d_out,
        weights.d_sae,
        k,
        activation="topk" if weights.activation == "topk" else "batch_topk",
        widths=weights.widths or None,
        skip=weights.W_skip is not None,
        latent_thresholds=weights.activation == "threshold" and threshold.dim() == 1,
    )
    model = Transcoder(config)
    skip = weights.W_skip
    if skip is not None and weights.input_bias is not None:
        # Ours reads the centred x with the skip connection too.
        record.add("the skip connection reads the centred input: b_dec took W_skip @ input_bias", "rounding")
        shifted = weights.b_dec.double() + torch.mv(skip.double(), weights.input_bias.double())
        weights = replace(weights, b_dec=shifted.float())
    tensors = {name: getattr(weights, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip")}
    tensors["source_mean"] = weights.input_bias
    tensors["threshold"] = threshold if threshold.dim() == 0 or config.latent_thresholds else torch.tensor(-1.0)
    with torch.no_grad():
        own = model.state_dict()
        for name, tensor in tensors.items():
            if tensor is not None:
                own[name].copy_(tensor)
    return model.eval()


def check_weights(where: str, weights: FoldedWeights) -> None:
    """ValueError unless the shapes belong together and every number is finite."""
    d_sae, d_in, d_out = weights.d_sae, weights.d_in, weights.d_out
    expected: dict[str, tuple[int, ...]] = {
        "W_enc": (d_sae, d_in),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        "W_skip": (d_out, d_in),
        "input_bias": (d_in,),
        "threshold": (d_sae,),
    }
    for name, shape in expected.items():
        tensor = getattr(weights, name)
        if tensor is None:
            continue
        if tuple(tensor.shape) != shape and not (name == "threshold" and tensor.dim() == 0):
            or_number = "a number or " * (name == "threshold")
            raise ValueError(
                f"{where}: {name}: expected {or_number}shape {list(shape)} with W_enc's {[d_sae, d_in]}, got "
                f"{list(tensor.shape)}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{where}: {name}: expected finite numbers, found NaN or Inf")
    if weights.widths and weights.widths[-1] != d_sae:
        raise ValueError(f"{where}: widths: expected the last to be d_sae = {d_sae}, got {list(weights.widths)}")
