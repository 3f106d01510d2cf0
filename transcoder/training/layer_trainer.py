"""LayerTrainer: one dictionary and its training step."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch
from transcoder.activations.masking import heavy_tokens
from transcoder.antidup import CorrelationMonitor, DiversityRegularizer
from transcoder.antidup.merge_cost_streaming import Measured
from transcoder.config import RegularizerSection, RunConfig
from transcoder.kernels import SparseCodes
from transcoder.losses import penalty_scale
from transcoder.model import StepOutput, Transcoder
from transcoder.phases import phase
from transcoder.training.cross_layer import confine
from transcoder.training.nonfinite import Flag, StateBefore, StepLedger, TrainingDivergedError, flag_of
from transcoder.training.optimizer import make_optimizer, optimizer_step
from transcoder.training.run_state import Stateful
from transcoder.training.schedule import learning_rate, peak_learning_rate
from transcoder.training.sources import BatchSource

if TYPE_CHECKING:
    from transcoder.parallel.ranks import Ranks

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What observers see of one micro-batch. All tensors are detached and on the device."""

    batch: ActivationBatch
    codes: SparseCodes
    values: dict[str, Tensor]
    """Losses and metrics by their names in metrics.jsonl, each 0-dim."""
    measured: Measured | None
    """Of the followed pairs' merge cost, with the decoder that the forward pass used."""


@dataclass(frozen=True, eq=False)
class StepView:
    """What observers see of one step of one dictionary, and whether it may be seen."""

    layer: int
    """Place of its trainer in the run's list."""
    step: int
    """Index of the step, from 0."""
    micro_batches: list[MicroBatch]
    gradient_norm: Tensor
    """0-dim, before clipping."""
    penalty_records: list[Callable[[], None]]
    """What the regularizer reports to the ledger, to be called once."""
    nonfinite: Flag
    """1 where loss or gradients were NaN or Inf: the step changed nothing, and no observer sees it."""


class LayerTrainer:
    """One transcoder with its optimizer, schedule and regularizer.

    Args:
        config: of the run.
        d_in, d_out: widths of the activations.
        device: of everything.
        ledger: told what the regularizer does.
        monitor: names the pairs that the regularizer pushes apart; its merge cost of followed pairs is measured in the step.
        special_ids: token ids that count as sinks.
        logs: folder of `regularizer.jsonl`.
        index: place in the run's list of layer trainers.
        ranks: the processes that each train on a part of every batch; what is seen and penalised is the whole.
    """

    def __init__(
        self,
        config: RunConfig,
        d_in: int,
        d_out: int,
        device: torch.device,
        ledger: StepLedger,
        monitor: CorrelationMonitor | None,
        special_ids: Sequence[int],
        logs: Path,
        index: int = 0,
        ranks: Ranks | None = None,
    ) -> None:
        self.config, self.device, self.monitor, self.index = config, device, monitor, index
        self.ranks = ranks
        shape, seed = config.transcoder, config.training.seed
        self.transcoder = Transcoder(shape.config(d_in, d_out), seed=seed, device=device)
        if config.activations.cross_layer:
            confine(self.transcoder, len(config.activations.pairs))
        if ranks is not None:
            self.transcoder = ranks.shared(self.transcoder)
        self.peak = peak_learning_rate(config)
        self.optimizer = make_optimizer(self.transcoder, config.training, self.peak)
        self.regularizer: DiversityRegularizer | None = None
        self._ledger = ledger
        if config.antidup.regularizer_acts:
            self.regularizer = DiversityRegularizer(
                acting_penalties(config),
                shape.d_sae,
                device,
                seed,
                ledger,
                out_dir=logs,
                accumulation=config.training.accumulation,
                special_ids=special_ids,
                steps=config.training.steps,
                scale=penalty_scale(shape.loss, d_out, self.transcoder.config.prefix_weights or ()),
            )
            for record in ledger.take():
                record()
        self.parts: dict[str, Stateful] = {"optimizer": self.optimizer}
        """What has a state besides the transcoder, by its name in checkpoints."""
        if self.regularizer is not None:
            self.parts["regularizer"] = self.regularizer

    def step(self, step: int, batches: Sequence[ActivationBatch]) -> StepView:
        """One optimizer step on the mean loss of `batches`, its micro-batches. Reads nothing from the device.

        A step whose loss or gradients are NaN or Inf leaves weights, moments, threshold, dead counters and the regularizer as
        they were: masked on the device. What observers see of it must not be counted, see `StepView.nonfinite`.
        """
        with phase("bad-step guard"):
            before = StateBefore(self.transcoder, self.regularizer)
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        seen = []
        for micro, batch in enumerate(batches):
            with phase("loss"), self.autocast():
                out = self.transcoder.training_step(
                    batch.source,
                    batch.target,
                    token_weights=batch.weights,
                    penalty_factor=self.transcoder.selection.penalty_factor(step),
                )
            if self.ranks is not None:
                out, batch = self.ranks.whole(out, batch)
            loss = self._penalized(out, batch, step, micro)
            with phase("backward"):
                (loss / len(batches)).backward()
            bad |= ~torch.isfinite(loss.detach())
            with phase("logging"):
                seen.append(self._view(out, batch, loss, step))
        section = self.config.training
        lr = learning_rate(step, section, self.peak)
        with phase("optimizer"):
            norm = optimizer_step(self.transcoder, self.optimizer, lr, section.gradient_clip, bad)
        with phase("bad-step guard"):
            before.put_back_where(bad)
        return StepView(self.index, step, seen, norm, self._ledger.take(), flag_of(bad))

    def fit_normalization(self, source: BatchSource) -> None:
        """Fit the transcoder's normalisation to a sample, which `source` gives to training again. Where the sample's source and
        target are the same, the encoder begins as the decoder's transpose."""
        shape = self.config.transcoder
        taken = source.look_ahead(shape.normalization_tokens)
        sample = {name: torch.cat([getattr(batch, name) for batch in taken]) for name in ("source", "target")}
        for name, rows in sample.items():
            heavy = heavy_tokens(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32))
            if heavy:
                logger.warning(
                    "sinks that are not masked: %s of the %s. Latents that fire on them alone look like duplicates; see "
                    "activations.mask_norm_multiple", heavy, name,
                )  # fmt: skip
        if shape.normalize != "none":
            self.transcoder.set_normalization(sample["source"], sample["target"], shape.normalize)
        if sample["source"].shape == sample["target"].shape and torch.equal(sample["source"], sample["target"]):
            # An autoencoder: a latent that adds what it fires on reduces the error from the first step on (Gao et al. 2024).
            self.transcoder.W_enc.data.copy_(self.transcoder.W_dec)

    def check_weights(self, step: int) -> None:
        """TrainingDivergedError where a weight is NaN or Inf. Reads the device."""
        ranges = {name: torch.stack(p.detach().aminmax()) for name, p in self.transcoder.named_parameters()}
        broken = [name for name, ends in ranges.items() if not bool(torch.isfinite(ends).all())]
        if broken:
            raise TrainingDivergedError(
                f"step {step}: {', '.join(broken)} overflowed (the gradients were finite): the last checkpoint is from before "
                "and is kept. Lower training.lr"
            )

    def autocast(self) -> torch.autocast:
        """Products in `training.compute_dtype`: those between steps should not cost more than those of a step."""
        wanted = self.config.training.compute_dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)

    def _penalized(self, out: StepOutput, batch: ActivationBatch, step: int, micro: int) -> Tensor:
        if self.regularizer is None:
            return out.loss
        pairs = None
        if self.monitor is not None:
            with phase("anti-duplication: target pairs"):
                pairs = self.monitor.target_pairs(self.config.antidup.regularizer.max_pairs)
        with phase("anti-duplication: penalty"):
            return self.regularizer.apply_penalty(
                out.loss, self.transcoder, codes=out.codes, batch=batch, pairs=pairs, step=step, micro=micro
            )

    @torch.no_grad()
    def _view(self, out: StepOutput, batch: ActivationBatch, loss: Tensor, step: int) -> MicroBatch:
        codes = out.codes.detach()
        values = {
            "losses/overall_loss": loss.detach(),
            "losses/mse_loss": out.mse_per_prefix[-1],
            "losses/auxiliary_reconstruction_loss": out.aux_loss,
            "metrics/fvu": out.fvu_per_prefix[-1],
            "metrics/explained_variance": 1 - out.fvu_per_prefix[-1],
            "metrics/l0": (codes.values > 0).sum().double() / max(1, len(batch)),
        }
        for i, width in enumerate(self.transcoder.widths):
            values[f"losses/inner_mse_loss_{width}"] = out.mse_per_prefix[i]
            values[f"metrics/fvu_prefix_{width}"] = out.fvu_per_prefix[i]
        if out.penalty is not None:
            values["losses/sparsity_penalty"] = out.penalty
        if self.regularizer is not None:
            values["losses/diversity_penalty"] = loss.detach() - out.loss.detach()
            values.update(self.regularizer.metrics())
        measured = None
        if self.monitor is not None and len(self.monitor.evidence):
            target = self.transcoder.normalize_target(batch.target)
            decoder, weights = self.transcoder.W_dec, batch.weights
            measured = self.monitor.evidence.measure(codes, out.residual, target, decoder, weights, step)
        return MicroBatch(batch, codes, values, measured)


def acting_penalties(config: RunConfig) -> RegularizerSection:
    """The regularizer's settings; without the monitor, which finds the pairs, the pair term has weight 0."""
    section = config.antidup.regularizer
    if config.antidup.monitor.enabled or section.correlation_weight == 0:
        return section
    return dataclasses.replace(section, correlation_weight=0.0, correlation_weight_max=0.0)
