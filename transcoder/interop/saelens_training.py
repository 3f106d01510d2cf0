"""Transcoders that SAELens trains: TopK, BatchTopK and Matryoshka, in its registry once this module is imported.

SAELens' trainer hands a training SAE one tensor a step. A transcoder needs two, so a row holds both: source [d_in] and target
[d_out] of one token beside each other, [B, d_in + d_out]. `TranscoderTrainingRunner` is its runner with a store that reads two
hooks; `paired` makes such rows from anything else, for its `SAETrainer`.

    from transcoder.interop.saelens_training import MatryoshkaBatchTopKTranscoderConfig, TranscoderTrainingRunner

    sae = MatryoshkaBatchTopKTranscoderConfig(d_in=512, d_out=512, d_sae=8192, k=32, matryoshka_widths=[512, 2048, 8192])
    cfg = LanguageModelSAERunnerConfig(sae=sae, hook_name="blocks.0.ln2.hook_normalized", ...)
    TranscoderTrainingRunner(cfg, hook_name_out="blocks.0.hook_mlp_out").run()

What is saved for inference is a `jumprelu_transcoder`, which SAELens loads without this package.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from sae_lens import LanguageModelSAETrainingRunner, register_sae_training_class
from sae_lens.registry import SAE_TRAINING_CLASS_REGISTRY
from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig
from sae_lens.saes.matryoshka_batchtopk_sae import MatryoshkaBatchTopKTrainingSAE, MatryoshkaBatchTopKTrainingSAEConfig
from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig
from sae_lens.saes.transcoder import JumpReLUTranscoderConfig
from sae_lens.training.activations_store import ActivationsStore
from torch import Tensor, nn

from transcoder.activations.batch import ActivationBatch
from transcoder.interop.accelerate import accelerated_class
from transcoder.interop.accelerate.saelens import Matryoshka, Training


class _Config:
    """What the three configurations share. `d_out` is the target's width."""

    def __post_init__(self: Any) -> None:
        super().__post_init__()  # type: ignore[misc]
        if self.d_out < 1:
            raise ValueError(f"{type(self).__name__}.d_out: expected the target's width, got {self.d_out}")
        for name, wanted in (
            ("apply_b_dec_to_input", False),
            ("normalize_activations", "none"),
            ("reshape_activations", "none"),
        ):
            if getattr(self, name) != wanted:
                raise ValueError(
                    f"{type(self).__name__}.{name}: expected {wanted!r} for a transcoder, whose input and output differ, got "
                    f"{getattr(self, name)!r}"
                )

    def get_inference_config_class(self) -> type:
        return JumpReLUTranscoderConfig


@dataclass
class TopKTranscoderConfig(_Config, TopKTrainingSAEConfig):
    d_out: int = 0
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "topk_transcoder"


@dataclass
class BatchTopKTranscoderConfig(_Config, BatchTopKTrainingSAEConfig):
    d_out: int = 0
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "batchtopk_transcoder"


@dataclass
class MatryoshkaBatchTopKTranscoderConfig(_Config, MatryoshkaBatchTopKTrainingSAEConfig):
    d_out: int = 0
    apply_b_dec_to_input: bool = False

    @classmethod
    def architecture(cls) -> str:
        return "matryoshka_batchtopk_transcoder"


class _Paired:
    """In front of an accelerated SAELens class: another width out than in, and rows that hold source and target."""

    __reduce_ex__ = nn.Module.__reduce_ex__

    def initialize_weights(self: Any) -> None:
        d_in, d_out, d_sae = self.cfg.d_in, self.cfg.d_out, self.cfg.d_sae
        kind = {"dtype": self.dtype, "device": self.device}
        self.b_dec = nn.Parameter(torch.zeros(d_out, **kind))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **kind))
        self.W_dec = nn.Parameter(nn.init.kaiming_uniform_(torch.empty(d_sae, d_out, **kind)))
        rows = nn.init.kaiming_uniform_(torch.empty(d_sae, d_in, **kind))
        if self.cfg.decoder_init_norm is not None:
            with torch.no_grad():
                for matrix in (self.W_dec, rows):
                    matrix.mul_(self.cfg.decoder_init_norm / matrix.norm(dim=-1, keepdim=True))
        self.W_enc = nn.Parameter(rows.T.contiguous())

    def process_sae_in(self: Any, sae_in: Tensor) -> Any:
        return self.hook_sae_input(sae_in.to(self.dtype))

    def training_forward_pass(self: Any, step_input: Any) -> Any:
        """As the library's, with the loss against the target half of each row."""
        d_in, d_out = self.cfg.d_in, self.cfg.d_out
        rows = step_input.sae_in
        if rows.shape[-1] != d_in + d_out:
            raise ValueError(
                f"{type(self).__name__}: expected rows of source and target, {d_in} + {d_out} wide, got {rows.shape[-1]}; "
                "train with TranscoderTrainingRunner, or give SAETrainer the provider that `paired` makes"
            )
        self.__dict__["_source"] = rows[..., :d_in]
        try:
            return super().training_forward_pass(replace(step_input, sae_in=rows[..., d_in:]))  # type: ignore[misc]
        finally:
            self.__dict__["_source"] = None

    def encode_with_hidden_pre(self: Any, x: Tensor) -> Any:
        source = self.__dict__.get("_source")
        return super().encode_with_hidden_pre(x if source is None else source)  # type: ignore[misc]


class TopKTranscoder(_Paired, accelerated_class(TopKTrainingSAE, Training)):  # type: ignore[misc]
    """Keeps k latents a token. SAELens has no TopK transcoder to save it as: the smallest kept activation, averaged over tokens
    and tracked over steps, becomes the threshold of a `jumprelu_transcoder`, and saving warns that this approximates."""

    topk_threshold: Tensor

    def __init__(self, cfg: TopKTranscoderConfig, use_error_term: bool = False) -> None:
        super().__init__(cfg, use_error_term)
        self.register_buffer("topk_threshold", torch.zeros((), dtype=torch.double, device=self.W_dec.device))

    def training_forward_pass(self, step_input: Any) -> Any:
        output = super().training_forward_pass(step_input)
        with torch.no_grad():
            acts = output.feature_acts
            kept = acts.kept.view(acts.shape[0], -1) if hasattr(acts, "kept") else acts
            least = torch.where(kept > 0, kept, torch.inf).amin(-1)
            least = least[least.isfinite()].double()
            if least.numel():
                self.topk_threshold.lerp_(least.mean(), 0.05 if self.topk_threshold > 0 else 1.0)
        return output

    def process_state_dict_for_saving_inference(self, state_dict: dict[str, Any]) -> None:
        super().process_state_dict_for_saving_inference(state_dict)
        warnings.warn(
            "a TopK transcoder is saved as jumprelu_transcoder: one threshold in the place of k", stacklevel=2
        )
        state_dict["threshold"] = torch.ones_like(self.b_enc) * float(state_dict.pop("topk_threshold"))


class BatchTopKTranscoder(_Paired, accelerated_class(BatchTopKTrainingSAE, Training)):  # type: ignore[misc]
    """Keeps k latents a token on average of a batch; saved with its tracked threshold, as SAELens saves its own BatchTopK."""


class MatryoshkaBatchTopKTranscoder(_Paired, accelerated_class(MatryoshkaBatchTopKTrainingSAE, Matryoshka)):  # type: ignore[misc]
    """BatchTopK whose every prefix in `matryoshka_widths` reconstructs the target by itself."""


class PairedActivationsStore(ActivationsStore):
    """SAELens' store, reading two hooks in one pass: rows of source and target, shuffled together."""

    hook_name_out: str

    @classmethod
    def reading(cls, model: Any, cfg: Any, hook_name_out: str, dataset: Any = None) -> PairedActivationsStore:
        """From a runner's config: `cfg.hook_name` is the source, `hook_name_out` the target."""
        if cfg.use_cached_activations or cfg.hook_head_index is not None:
            raise ValueError("PairedActivationsStore: cached activations and hook_head_index know one hook only")
        store: PairedActivationsStore = cls.from_config(model, cfg, override_dataset=dataset)
        store.hook_name_out = hook_name_out
        store.d_in = cfg.sae.d_in + cfg.sae.d_out
        return store

    @torch.no_grad()
    def get_activations(self, batch_tokens: Tensor) -> Tensor:
        hooks = [self.hook_name, self.hook_name_out]
        with torch.autocast(batch_tokens.device.type, dtype=torch.bfloat16, enabled=self.autocast_lm):
            _, cache = self.model.run_with_cache(
                batch_tokens, names_filter=hooks, prepend_bos=False, **self.model_kwargs
            )
        parts = [cache[h][:, slice(*self.seqpos_slice)].flatten(2).float() for h in hooks]
        both = torch.cat(parts, dim=-1).to(self.device)
        if both.shape[-1] != self.d_in:
            raise ValueError(
                f"PairedActivationsStore: {hooks} are {[p.shape[-1] for p in parts]} wide; d_in + d_out is {self.d_in}"
            )
        return both


class TranscoderTrainingRunner(LanguageModelSAETrainingRunner):
    """SAELens' runner over two hooks. Its evaluator, which puts an SAE's output back at the hook that was read, is off."""

    def __init__(self, cfg: Any, hook_name_out: str, **overrides: Any) -> None:
        super().__init__(cfg, **overrides)
        self.hook_name_out = hook_name_out
        self.activations_store: Any = PairedActivationsStore.reading(
            self.model, cfg, hook_name_out, overrides.get("override_dataset")
        )
        self.evaluator: Any = None

    def _set_sae_metadata(self) -> None:
        super()._set_sae_metadata()
        self.sae.cfg.metadata.hook_name_out = self.hook_name_out


def paired(provider: Iterable[Any], source: Any = 0, target: Any = 1) -> Iterator[Tensor]:
    """Rows for SAELens' SAETrainer, [B, d_in + d_out], from pairs, or from dicts by hook name (SAELens' multi-hook loader)."""
    for batch in provider:
        yield torch.cat([batch[source], batch[target]], dim=-1)


def activation_batches(store: Iterable[Tensor], d_in: int) -> Iterator[ActivationBatch]:
    """Batches for `train_transcoder(config, batches=...)` from a SAELens store: a `PairedActivationsStore`, or its own
    ActivationsStore, whose rows are then both source and target (d_in is the whole row). Tokens and positions, which such a
    store does not keep, are 0."""
    for rows in store:
        source, target = (rows, rows) if rows.shape[1] == d_in else (rows[:, :d_in], rows[:, d_in:])
        nothing = torch.zeros(rows.shape[0], dtype=torch.int64)
        yield ActivationBatch(source.contiguous(), target.contiguous(), nothing, nothing)


for _config, _class in (
    (TopKTranscoderConfig, TopKTranscoder),
    (BatchTopKTranscoderConfig, BatchTopKTranscoder),
    (MatryoshkaBatchTopKTranscoderConfig, MatryoshkaBatchTopKTranscoder),
):
    if _config.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(_config.architecture(), _class, _config)
