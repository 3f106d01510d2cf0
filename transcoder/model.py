"""Transcoder: a sparse dictionary that maps a layer's MLP input to its output."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from transcoder.dictionary_config import TranscoderConfig
from transcoder.files import local_path
from transcoder.kernels import SparseCodes, sparse_decode
from transcoder.kernels.checks import Checks, check_finite_rows, check_float_matrix, check_mode
from transcoder.losses import Reconstruction, auxk_loss, penalty_scale, reconstruction_loss
from transcoder.phases import phase
from transcoder.pretrained import check_tensors, local_folder, read_config, read_weights, write_pair
from transcoder.selection import SELECTIONS, Selected

__all__ = ["StepOutput", "Transcoder", "TranscoderConfig"]

LEAST_RMS, MOST_RMS = 1e-30, 1e30
"""Bounds of the root mean square that a normalisation divides by: its inverse, and activations 1e8 times as large, still fit
fp32."""


class StepOutput(NamedTuple):
    """What `Transcoder.training_step` returns; every tensor stays on the device."""

    loss: Tensor
    """Scalar to differentiate: reconstruction + aux_coefficient * AuxK + the selection's penalty."""
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
    residual: Tensor
    """[B, d_out] reconstruction by the full width minus target, normalised units, detached."""
    penalty: Tensor | None = None
    """Scalar, detached: what the selection adds to the loss; None where it has no such term."""


class Transcoder(nn.Module):
    """y_hat = decode(encode(x)) [+ W_skip x], a latent being a row of W_enc [d_sae, d_in] and of W_dec [d_sae, d_out].

    Inputs and targets are raw activations; the module normalises each by its own statistics (`set_normalization`; identity
    until then) and returns reconstructions in raw units. Parameters, thresholds, dead counters and statistics are fp32 for any
    compute type; under `torch.autocast` the encoder's product runs in autocast's type.

    `selection` decides how latents are selected (transcoder.selection). In training mode BatchTopK selects over the batch; in
    eval mode a token's codes do not depend on the other tokens of its batch.
    """

    W_enc: nn.Parameter
    b_enc: nn.Parameter
    W_dec: nn.Parameter
    b_dec: nn.Parameter
    W_skip: nn.Parameter | None
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
        self.selection = SELECTIONS[config.activation](config)
        self.in_one_process = True
        """Whether its tensors are whole. One-op updates need that."""
        for name, (shape, dtype) in _tensors_of(config).items():
            # Dtype and device are explicit: a process may have set other defaults.
            zeros = torch.zeros(shape, dtype=dtype, device="cpu")
            if name.startswith(("W_", "b_")) or (name == "threshold" and self.selection.trains_threshold):
                self.register_parameter(name, nn.Parameter(zeros))
            else:
                self.register_buffer(name, zeros)
        if not config.skip:
            self.register_parameter("W_skip", None)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for matrix in (self.W_enc, self.W_dec):
                matrix.copy_(_random_rows(matrix.shape, generator))
            self.threshold.fill_(self.selection.initial_threshold)
            self.source_scale.fill_(1)
            self.target_scale.fill_(1)
        self._dead_ids: Tensor | None = None
        self.to(device)

    def extra_repr(self) -> str:
        config = self.config
        widths = f", widths={list(self.widths)}" if len(self.widths) > 1 else ""
        skip = ", skip=True" if config.skip else ""
        count = sum(parameter.numel() for parameter in self.parameters())
        return (
            f"d_in={config.d_in}, d_out={config.d_out}, d_sae={config.d_sae}, {config.activation}, k={config.k}{widths}{skip}, "
            f"parameters={count:,}, device={self.W_enc.device}"
        )

    @property
    def widths(self) -> tuple[int, ...]:
        return tuple(self.config.widths or ())

    @property
    def latent_parameters(self) -> list[Tensor]:
        """The parameters that have a row a latent."""
        return [self.W_enc, self.b_enc, self.W_dec, *([self.threshold] if self.selection.trains_threshold else [])]

    def encode(self, x: Tensor, *, checks: Checks = "fast") -> SparseCodes:
        """Codes of raw activations x [B, d_in].

        `checks="full"` reads the device and refuses NaN and Inf with a ValueError that names the first such row. `fast` reads
        nothing back: TopK's values of such a row are NaN, and where a threshold selects, the row has no codes, since no
        comparison with NaN holds.
        """
        self._check_source("encode", x)
        check_mode("Transcoder.encode", checks)
        if checks == "full":
            # Before the normalisation, so that the error is about the caller's x.
            check_finite_rows("Transcoder.encode", "x", x)
        return self._select(self.normalize_source(x)).codes

    def decode(self, codes: SparseCodes) -> Tensor:
        """Raw-unit reconstruction [B, d_out] from codes alone: without the skip connection, which needs x."""
        return self._to_raw_target(sparse_decode(codes, self.W_dec, self.b_dec))

    def forward(self, x: Tensor) -> Tensor:
        """Raw-unit reconstruction [B, d_out] of the target from raw x [B, d_in]."""
        self._check_source("forward", x)
        x = self.normalize_source(x)
        y_hat = sparse_decode(self._select(x).codes, self.W_dec, self.b_dec)
        return self._to_raw_target(y_hat if self.W_skip is None else y_hat + self._skip(x))

    def training_step(
        self, x: Tensor, y: Tensor, *, token_weights: Tensor | None = None, penalty_factor: float = 1.0
    ) -> StepOutput:
        """Loss of one batch, with AuxK over the latents listed by the last `refresh_dead`. Updates the threshold and the
        dead counters (in training mode). Reads nothing back to the host except JumpReLU's number of codes.

        Args:
            x: [B, d_in] raw source activations.   y: [B, d_out] raw target activations.
            token_weights: [B] importance weights of mean about 1, or None.
            penalty_factor: on the selection's penalty, for its warm-up.
        """
        config = self.config
        self._check_source("training_step", x)
        check_float_matrix("Transcoder.training_step", "y", y, columns=config.d_out, rows=x.shape[0])
        x, y = self.normalize_source(x), self.normalize_target(y)
        with phase("encode"):
            codes, penalty = self._select(x, token_weights)
        target = self._without_skip(x, y)
        rec = self._reconstruction(codes, target, y, token_weights)
        loss, aux = rec.loss, torch.zeros((), dtype=rec.loss.dtype, device=x.device)
        if self._dead_ids is not None and config.aux_latents > 0 and config.aux_coefficient > 0:
            with phase("AuxK"):
                aux = self._auxk(x, rec, self._dead_ids, token_weights)
            loss = loss + config.aux_coefficient * aux
        if penalty is not None:
            penalty = penalty_factor * penalty_scale(config.loss, config.d_out, config.prefix_weights or ()) * penalty
            loss = loss + penalty
            penalty = penalty.detach()
        if self.training:
            with phase("dead counts, threshold"):
                self._track(codes.detach())
        return StepOutput(
            loss,
            codes,
            rec.loss.detach(),
            aux.detach(),
            rec.mse_per_prefix,
            rec.fvu_per_prefix,
            rec.residual.detach(),
            penalty,
        )

    @torch.no_grad()
    def refresh_dead(self) -> int:
        """List the latents that have not fired for `dead_after_tokens`, for AuxK in the next steps. Returns how many.

        AuxK's only device-to-host read. It is not part of the step: call it every few dozen steps.
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

        Raises:
            ValueError: NaN or Inf, no rows, another width, a root mean square that fp32 cannot divide by, or (`standardize`)
            activations that do not vary beyond fp32's rounding. Nothing is set then.
        """
        if mode not in ("none", "rms", "standardize"):
            raise ValueError(f"set_normalization: mode: expected 'none', 'rms' or 'standardize', got {mode!r}")
        if mode == "none":
            return
        fitted = {}
        for name, sample, width in (("source", source, self.config.d_in), ("target", target, self.config.d_out)):
            check_float_matrix("set_normalization", name, sample, columns=width)
            if len(sample) == 0 or len(sample) != len(source):
                raise ValueError(
                    f"set_normalization: {name}: expected at least one row, and as many rows of source and target, got "
                    f"{len(source)} and {len(target)}"
                )
            check_finite_rows("set_normalization", name, sample)
            sample = sample.double()
            mean = sample.mean(0) if mode == "standardize" else torch.zeros_like(sample[0])
            rms, size = (float(part.square().mean().sqrt()) for part in (sample - mean, sample))
            if mode == "standardize" and rms <= torch.finfo(torch.float32).eps * size < math.inf:
                raise ValueError(
                    f"set_normalization: {name}: expected finite activations that vary, got rms {rms:.3g} around their mean"
                )
            if not LEAST_RMS <= rms <= MOST_RMS:
                raise ValueError(
                    f"set_normalization: {name}: expected a root mean square between {LEAST_RMS:g} and {MOST_RMS:g}, "
                    f"got {rms:.3g}"
                )
            fitted[name] = mean, 1 / rms
        for name, (mean, scale) in fitted.items():
            getattr(self, f"{name}_mean").copy_(mean)
            getattr(self, f"{name}_scale").fill_(scale)

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

    def clip_gradients(self, limit: float, bad: Tensor | None = None) -> Tensor:
        """Scale the gradients so that their global norm is at most `limit`. Returns the norm before that, 0-dim.

        bad: 0-dim bool; a step that has it set anywhere is bad everywhere (`transcoder.parallel`)."""
        return torch.nn.utils.clip_grad_norm_(self.parameters(), limit).detach()

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Scale every decoder row back to unit norm."""
        self.W_dec.copy_(_unit_rows(self.W_dec))

    @torch.no_grad()
    def recycle(self, kept: Tensor, dropped: Tensor, scale: Tensor, *, seed: int) -> None:
        """Fold each latent of `dropped` into its partner of `kept`, and reset it to a dead latent with random rows.

        The kept latent's decoder row becomes W[kept] + scale W[dropped], scaled back to unit norm; its encoder row and bias are
        multiplied by the length taken off. Where both were active the reconstruction stays the same. The larger activation may
        also be selected on further tokens, in place of other latents, which training corrects. The encoder row of the reset
        latent has a fifth of the usual norm, so that it is rarely selected until AuxK has trained it (with a twentieth, four
        times as many of them stay dead).

        Args:
            kept, dropped: [n] int64, no latent twice in the two together.
            scale: [n] a >= 0, as the merge test gives it.
            seed: of the random rows of the reset latents.

        Raises: ValueError for ids out of range or given twice, unequal lengths, or rows that cancel each other.
        """
        both = torch.cat([kept, dropped])
        if not (kept.shape == dropped.shape == scale.shape) or both.unique().numel() != both.numel():
            raise ValueError(
                f"recycle: expected kept, dropped and scale, each [n], with no latent twice, got {kept.tolist()}, "
                f"{dropped.tolist()} and a scale of shape {list(scale.shape)}"
            )
        if both.numel() and not (int(both.min()) >= 0 and int(both.max()) < self.config.d_sae):
            raise ValueError(f"recycle: expected latents in [0, {self.config.d_sae}), got {both.tolist()}")
        usual = self.W_enc.norm(dim=1).mean()
        folded = self.W_dec[kept] + scale.to(self.W_dec.dtype)[:, None] * self.W_dec[dropped]
        length = folded.norm(dim=1, keepdim=True)
        if bool((length < 1e-3).any()):
            raise ValueError(
                f"recycle: the decoder rows of {kept[length.squeeze(1) < 1e-3].tolist()} and their partners cancel"
            )
        self.W_dec[kept] = folded / length
        self.W_enc[kept] *= length
        self.b_enc[kept] *= length.squeeze(1)
        if self.selection.trains_threshold:
            # Scaled like its pre-activations, so that the kept latent is active on the same tokens.
            self.threshold[kept] *= length.squeeze(1)
        generator = torch.Generator().manual_seed(seed)
        for matrix, norm in ((self.W_enc, 0.2 * usual), (self.W_dec, torch.ones_like(usual))):
            matrix[dropped] = norm * _random_rows((dropped.numel(), matrix.shape[1]), generator).to(matrix.device)
        self.b_enc[dropped] = 0
        self.tokens_since_fired[dropped] = self.config.dead_after_tokens

    def save_pretrained(self, directory: str | Path) -> None:
        """Write transcoder.safetensors and config.json. An existing pair is replaced after both are written in full.

        OSError: the folder cannot be written. An existing pair is unchanged then, and no partial file is left.
        """
        write_pair(local_path(directory), self.config.to_dict(), self.state_dict())

    @classmethod
    def from_pretrained(
        cls, directory: str | Path, *, device: torch.device | str = "cpu", revision: str | None = None
    ) -> Transcoder:
        """Load what `save_pretrained` wrote, a run's checkpoint folder (`checkpoints/step_...`), or `"org/name"` from the hub.

        Args:
            revision: a branch, tag or commit of the hub's repository.

        Raises:
            FileNotFoundError: a file is missing, or the hub does not give it.
            ValueError: a file is torn or does not fit; the message names it and the expected content.
        """
        try:
            folder = local_folder(directory, revision)
            path, values = read_config(folder)
            try:
                config = TranscoderConfig.from_dict(values)
            except (ValueError, TypeError) as error:
                raise ValueError(f"{path}: {error}") from error
            # Compared before a model is made, so that a wrong config cannot allocate huge tensors.
            tensors = read_weights(folder, _tensors_of(config))
        except (FileNotFoundError, ValueError) as error:
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(f"Transcoder.from_pretrained: {error}") from error
        model = cls(config)
        model.load_state_dict(tensors)
        return model.to(device).eval()

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module`; with `strict`, a state that does not fit is a ValueError before anything is loaded."""
        if strict:
            shapes = {name: shape for name, (shape, _) in _tensors_of(self.config).items()}
            check_tensors("Transcoder.load_state_dict", state_dict, shapes)
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

    def _select(self, x: Tensor, token_weights: Tensor | None = None) -> Selected:
        weights = x, self.W_enc, self.b_enc, self.threshold
        if self.training:
            return self.selection.select(*weights, token_weights)
        return Selected(self.selection.encode(*weights))

    def _reconstruction(
        self, codes: SparseCodes, target: Tensor, explained: Tensor, token_weights: Tensor | None
    ) -> Reconstruction:
        config = self.config
        return reconstruction_loss(
            codes,
            self.W_dec,
            self.b_dec,
            target,
            self.widths,
            config.prefix_weights or (),
            config.loss,
            token_weights,
            explained=explained,
        )

    def _auxk(self, x: Tensor, rec: Reconstruction, dead: Tensor, token_weights: Tensor | None) -> Tensor:
        weights, config = (self.W_enc, self.b_enc, self.W_dec), self.config
        return auxk_loss(
            x, rec.residual, *weights, dead, config.aux_latents, rec.target_variance, config.loss, token_weights
        )

    def residual_target(self, x: Tensor, y: Tensor) -> Tensor:
        """The target of the dictionary alone, normalised [B, d_out]: y minus the skip connection, from raw x and y."""
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
        self.selection.track(self.threshold, codes)


def _tensors_of(config: TranscoderConfig) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """{name: (shape, dtype)} of the state of a Transcoder of this config."""
    d_in, d_out, d_sae = config.d_in, config.d_out, config.d_sae
    shapes: dict[str, tuple[int, ...]] = {
        "W_enc": (d_sae, d_in),
        "b_enc": (d_sae,),
        "W_dec": (d_sae, d_out),
        "b_dec": (d_out,),
        **({"W_skip": (d_out, d_in)} if config.skip else {}),
        "threshold": SELECTIONS[config.activation](config).threshold_shape,
        "source_mean": (d_in,),
        "source_scale": (),
        "target_mean": (d_out,),
        "target_scale": (),
        "tokens_since_fired": (d_sae,),
        "dead": (d_sae,),
    }
    others = {"tokens_since_fired": torch.int64, "dead": torch.bool}
    return {name: (shape, others.get(name, torch.float32)) for name, shape in shapes.items()}


def _random_rows(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    # Drawn on the CPU, so that a seed means the same rows on every device.
    return _unit_rows(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu"))


def _unit_rows(W: Tensor) -> Tensor:
    # A zero row has no direction: it stays zero instead of becoming NaN.
    return W / torch.linalg.vector_norm(W, dim=1, keepdim=True).clamp_min(torch.finfo(W.dtype).tiny)
