"""Transcoder: a sparse dictionary that maps a layer's MLP input to its output."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from transcoder.kernels import SparseCodes, batch_topk_encode, sparse_decode, threshold_encode, topk_encode
from transcoder.kernels.checks import check_float_matrix, check_widths
from transcoder.losses import CONVENTIONS, Convention, auxk_loss, reconstruction_loss

WEIGHTS_FILE = "transcoder.safetensors"
CONFIG_FILE = "config.json"
CHECKPOINT_STATE_FILE = "state.json"


@dataclass(frozen=True)
class TranscoderConfig:
    """Shape and training rules of one transcoder. Errors name the field."""

    d_in: int
    d_out: int
    d_sae: int
    k: int
    activation: Literal["topk", "batch_topk"] = "topk"
    widths: Sequence[int] | None = None
    """Cumulative Matryoshka widths, strictly increasing, the last one d_sae; None is [d_sae]."""
    skip: bool = False
    prefix_weights: Sequence[float] | None = None
    """One a width; None weighs each 1."""
    loss: Convention = "mse"
    aux_k: int | None = None
    """Dead latents AuxK may use a token; None is d_in // 2 (at least 1), 0 switches it off."""
    aux_coefficient: float = 1 / 32
    dead_after_tokens: int = 10_000_000
    threshold_rate: float = 0.05

    def __post_init__(self) -> None:
        for name in ("d_in", "d_out", "d_sae", "k"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"TranscoderConfig.{name}: expected an int, got {value!r}")
            if value < 1:
                raise ValueError(f"TranscoderConfig.{name}: expected at least 1, got {value}")
        if self.k > self.d_sae:
            raise ValueError(f"TranscoderConfig.k: expected at most d_sae = {self.d_sae}, got {self.k}")
        if self.activation not in ("topk", "batch_topk"):
            raise ValueError(f"TranscoderConfig.activation: expected 'topk' or 'batch_topk', got {self.activation!r}")
        if self.loss not in CONVENTIONS:
            raise ValueError(f"TranscoderConfig.loss: expected one of {', '.join(CONVENTIONS)}, got {self.loss!r}")
        widths = (self.d_sae,) if self.widths is None else tuple(int(w) for w in self.widths)
        check_widths("TranscoderConfig", widths, self.d_sae)
        if widths[-1] != self.d_sae:
            raise ValueError(
                f"TranscoderConfig.widths: expected the last to be d_sae = {self.d_sae}, got {list(widths)}"
            )
        weights = (1.0,) * len(widths) if self.prefix_weights is None else tuple(float(w) for w in self.prefix_weights)
        if len(weights) != len(widths) or any(not math.isfinite(w) or w < 0 for w in weights) or sum(weights) <= 0:
            raise ValueError(
                f"TranscoderConfig.prefix_weights: expected {len(widths)} finite weights, none negative, not all 0, "
                f"got {list(weights)}"
            )
        object.__setattr__(self, "widths", widths)
        object.__setattr__(self, "prefix_weights", weights)
        for name, fits, expected in (
            ("aux_k", self.aux_k is None or self.aux_k >= 0, "None or at least 0"),
            ("aux_coefficient", 0 <= self.aux_coefficient < math.inf, "finite, at least 0"),
            ("dead_after_tokens", self.dead_after_tokens >= 1, "at least 1"),
            ("threshold_rate", 0 < self.threshold_rate <= 1, "in (0, 1]"),
        ):
            if not fits:
                raise ValueError(f"TranscoderConfig.{name}: expected {expected}, got {getattr(self, name)!r}")

    @property
    def aux_latents(self) -> int:
        return max(1, self.d_in // 2) if self.aux_k is None else self.aux_k

    def to_dict(self) -> dict[str, Any]:
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TranscoderConfig:
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"TranscoderConfig: unknown fields {unknown}; known: {sorted(known)}")
        return cls(**values)


class StepOutput(NamedTuple):
    """What `Transcoder.training_step` returns; every tensor stays on the device."""

    loss: Tensor
    """Scalar to differentiate: reconstruction + aux_coefficient * AuxK."""
    codes: SparseCodes
    """The batch's codes, values in the graph."""
    reconstruction_loss: Tensor
    """Scalar by the loss convention, detached."""
    aux_loss: Tensor
    """Scalar, 0 where no latent is dead, detached."""
    mse_per_prefix: Tensor
    """[P], normalised units, mean over tokens and d_out."""
    fvu_per_prefix: Tensor
    """[P], on this batch."""


class Transcoder(nn.Module):
    """y_hat = decode(encode(x)) [+ W_skip x], a latent being a row of W_enc [d_sae, d_in] and of W_dec [d_sae, d_out].

    Inputs and targets are raw activations; the module normalises each by its own statistics (`set_normalization`; identity
    until then) and gives reconstructions back in raw units. Parameters, thresholds, dead counters and statistics are fp32
    whatever the compute type; under `torch.autocast` the encoder's product runs in autocast's type.

    In training mode BatchTopK selects over the batch; in eval mode it uses the tracked threshold, so a token's codes do not
    depend on its neighbours.
    """

    threshold: Tensor
    source_mean: Tensor
    source_scale: Tensor
    target_mean: Tensor
    target_scale: Tensor
    tokens_since_fired: Tensor
    dead: Tensor

    def __init__(self, config: TranscoderConfig, *, seed: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.config = config
        generator = torch.Generator().manual_seed(seed)
        # Drawn on the CPU so that a seed means the same dictionary on every device.
        self.W_enc = nn.Parameter(_unit_rows(torch.randn(config.d_sae, config.d_in, generator=generator)))
        self.b_enc = nn.Parameter(torch.zeros(config.d_sae))
        self.W_dec = nn.Parameter(_unit_rows(torch.randn(config.d_sae, config.d_out, generator=generator)))
        self.b_dec = nn.Parameter(torch.zeros(config.d_out))
        self.W_skip = nn.Parameter(torch.zeros(config.d_out, config.d_in)) if config.skip else None
        # Below 0: no batch seen yet.
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.register_buffer("source_mean", torch.zeros(config.d_in))
        self.register_buffer("source_scale", torch.ones(()))
        self.register_buffer("target_mean", torch.zeros(config.d_out))
        self.register_buffer("target_scale", torch.ones(()))
        self.register_buffer("tokens_since_fired", torch.zeros(config.d_sae, dtype=torch.int64))
        self.register_buffer("dead", torch.zeros(config.d_sae, dtype=torch.bool))
        self._dead_ids: Tensor | None = None
        self.to(device)

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.config.widths or ())

    def encode(self, x: Tensor) -> SparseCodes:
        """Codes of raw activations x [B, d_in]."""
        self._check_source("encode", x)
        return self._encode_normalized(self.normalize_source(x))

    def decode(self, codes: SparseCodes) -> Tensor:
        """Raw-unit reconstruction [B, d_out] from codes alone: without the skip connection, which needs x."""
        return self._to_raw_target(sparse_decode(codes, self.W_dec, self.b_dec))

    def forward(self, x: Tensor) -> Tensor:
        """Raw-unit reconstruction [B, d_out] of the target from raw x [B, d_in]."""
        self._check_source("forward", x)
        x = self.normalize_source(x)
        y_hat = sparse_decode(self._encode_normalized(x), self.W_dec, self.b_dec)
        return self._to_raw_target(y_hat if self.W_skip is None else y_hat + self._skip(x))

    def training_step(self, x: Tensor, y: Tensor, *, token_weights: Tensor | None = None) -> StepOutput:
        """Loss of one batch, with AuxK over the latents listed by the last `refresh_dead`. Updates the threshold and the
        dead counters (in training mode). Reads nothing back to the host.

        Args:
            x: [B, d_in] raw source activations.   y: [B, d_out] raw target activations.
            token_weights: [B] importance weights of mean about 1, or None.
        """
        config = self.config
        self._check_source("training_step", x)
        check_float_matrix("Transcoder.training_step", "y", y, columns=config.d_out, rows=x.shape[0])
        x, y = self.normalize_source(x), self.normalize_target(y)
        codes = self._encode_normalized(x)
        target = self._without_skip(x, y)
        weights = tuple(config.prefix_weights or ())
        rec = reconstruction_loss(
            codes, self.W_dec, self.b_dec, target, self.widths, weights, config.loss, token_weights, explained=y
        )
        loss, aux = rec.loss, torch.zeros((), device=x.device)
        if self._dead_ids is not None and config.aux_latents > 0 and config.aux_coefficient > 0:
            aux = auxk_loss(
                x,
                rec.residual,
                self.W_enc,
                self.b_enc,
                self.W_dec,
                self._dead_ids,
                config.aux_latents,
                rec.target_variance,
                config.loss,
                token_weights,
            )
            loss = loss + config.aux_coefficient * aux
        if self.training:
            self._track(codes.detach())
        return StepOutput(loss, codes, rec.loss.detach(), aux.detach(), rec.mse_per_prefix, rec.fvu_per_prefix)

    @torch.no_grad()
    def refresh_dead(self) -> int:
        """Read which latents have not fired for `dead_after_tokens`: the AuxK list of the next steps. Returns how many.

        The one read of the host that AuxK needs, kept out of the step; call it every few dozen steps.
        """
        self.dead.copy_(self.tokens_since_fired >= self.config.dead_after_tokens)
        return self._list_dead()

    def _list_dead(self) -> int:
        ids = self.dead.nonzero().squeeze(1)
        self._dead_ids = ids if ids.numel() else None
        return ids.numel()

    @torch.no_grad()
    def set_normalization(self, source: Tensor, target: Tensor, mode: Literal["none", "rms", "standardize"]) -> None:
        """Fit the normalisation to samples source [T, d_in] and target [T, d_out], each by its own statistics.

        `rms` divides by the root mean square over tokens and coordinates, `standardize` subtracts the mean vector first.
        """
        if mode not in ("none", "rms", "standardize"):
            raise ValueError(f"set_normalization: mode: expected 'none', 'rms' or 'standardize', got {mode!r}")
        if mode == "none":
            return
        for name, sample in (("source", source), ("target", target)):
            sample = sample.double()
            mean = sample.mean(0) if mode == "standardize" else torch.zeros_like(sample[0])
            rms = (sample - mean).square().mean().sqrt()
            if not bool(torch.isfinite(rms)) or float(rms) == 0:
                raise ValueError(
                    f"set_normalization: {name}: expected finite activations that vary, got rms {float(rms)}"
                )
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_scale").copy_(1 / rms)

    def normalize_source(self, x: Tensor) -> Tensor:
        return (x.to(self.source_mean.dtype) - self.source_mean) * self.source_scale

    def normalize_target(self, y: Tensor) -> Tensor:
        return (y.to(self.target_mean.dtype) - self.target_mean) * self.target_scale

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Take from W_dec.grad its component along each unit-norm row: the step then moves on the sphere only."""
        grad = self.W_dec.grad
        if grad is not None:
            grad.addcmul_((grad * self.W_dec).sum(1, keepdim=True), self.W_dec, value=-1)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row back to unit norm."""
        self.W_dec.copy_(_unit_rows(self.W_dec))

    def save_pretrained(self, directory: str | Path) -> None:
        """Write transcoder.safetensors and config.json. An existing pair is replaced file by file, each atomically."""
        from safetensors.torch import save

        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.detach().cpu().contiguous() for name, t in self.state_dict().items()}
        text = json.dumps({"format": "transcoder", "version": 1, **self.config.to_dict()}, indent=2)
        for name, content in ((WEIGHTS_FILE, save(tensors)), (CONFIG_FILE, text.encode())):
            partial = folder / f".{name}.partial"
            partial.write_bytes(content)
            partial.replace(folder / name)

    @classmethod
    def from_pretrained(cls, directory: str | Path, *, device: torch.device | str = "cpu") -> Transcoder:
        """Load what `save_pretrained` wrote, or a run's checkpoint folder (`checkpoints/step_...`).

        FileNotFoundError or ValueError say what is missing or does not fit.
        """
        from safetensors.torch import load_file

        folder = Path(directory)
        if not (folder / WEIGHTS_FILE).is_file():
            raise FileNotFoundError(f"Transcoder.from_pretrained: expected {WEIGHTS_FILE} in {folder}, found none")
        model = cls(TranscoderConfig.from_dict(_read_config(folder)))
        model.load_state_dict(load_file(folder / WEIGHTS_FILE))
        return model.to(device).eval()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        result = super().load_state_dict(state_dict, strict=strict, assign=assign)
        self._list_dead()
        return result

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        # The list of dead latents is derived from the buffer `dead` and has to move with it.
        moved = super()._apply(fn, recurse)
        self._list_dead()
        return moved

    def _check_source(self, method: str, x: Tensor) -> None:
        # Before the normalisation, which would broadcast a wrong width.
        check_float_matrix(f"Transcoder.{method}", "x", x, columns=self.config.d_in)

    def _encode_normalized(self, x: Tensor) -> SparseCodes:
        config = self.config
        if config.activation == "topk":
            return topk_encode(x, self.W_enc, self.b_enc, config.k)
        if self.training:
            return batch_topk_encode(x, self.W_enc, self.b_enc, config.k)
        return threshold_encode(x, self.W_enc, self.b_enc, self.threshold)

    def residual_target(self, x: Tensor, y: Tensor) -> Tensor:
        """What the dictionary itself must reconstruct, normalised [B, d_out]: y less the skip connection, from raw x and y."""
        return self._without_skip(self.normalize_source(x), self.normalize_target(y))

    def _without_skip(self, x: Tensor, y: Tensor) -> Tensor:
        return y if self.W_skip is None else y - self._skip(x)

    def _skip(self, x: Tensor) -> Tensor:
        assert self.W_skip is not None
        return (x @ self.W_skip.T).to(x.dtype)

    def _to_raw_target(self, y_hat: Tensor) -> Tensor:
        return y_hat / self.target_scale + self.target_mean

    @torch.no_grad()
    def _track(self, codes: SparseCodes) -> None:
        active = codes.values > 0
        fired = torch.zeros_like(self.tokens_since_fired).index_add_(0, codes.indices, active.long())
        older = self.tokens_since_fired + codes.shape[0]
        self.tokens_since_fired.copy_(torch.where(fired > 0, torch.zeros_like(older), older))
        if codes.nnz:
            smallest = torch.where(active, codes.values, torch.full_like(codes.values, torch.inf)).min()
            smallest = smallest.to(self.threshold.dtype)
            moved = torch.lerp(self.threshold, smallest, self.config.threshold_rate)
            moved = torch.where(self.threshold < 0, smallest, moved)
            self.threshold.copy_(torch.where(torch.isfinite(smallest), moved, self.threshold))


def _read_config(folder: Path) -> dict[str, Any]:
    if (folder / CONFIG_FILE).is_file():
        values = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        if values.pop("format", None) != "transcoder" or values.pop("version", None) != 1:
            raise ValueError(
                f"Transcoder.from_pretrained: {folder / CONFIG_FILE}: not a transcoder config of version 1"
            )
        return dict(values)
    if (folder / CHECKPOINT_STATE_FILE).is_file():
        state = json.loads((folder / CHECKPOINT_STATE_FILE).read_text(encoding="utf-8"))
        return dict(state["summary"]["transcoder"])
    raise FileNotFoundError(
        f"Transcoder.from_pretrained: expected {CONFIG_FILE} or a checkpoint's {CHECKPOINT_STATE_FILE} in {folder}"
    )


def _unit_rows(W: Tensor) -> Tensor:
    # A zero row has no direction: it stays zero instead of becoming NaN.
    return W / torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
