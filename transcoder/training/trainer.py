"""train_transcoder: one run from a config to a folder of results, resumable bit for bit."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch, build_stream
from transcoder.antidup import (
    ActivationSampleCollector,
    CorrelationMonitor,
    DiversityRegularizer,
    PositionSampler,
    UsageLedger,
)
from transcoder.config import ConfigError, RunConfig
from transcoder.model import StepOutput, Transcoder, TranscoderConfig
from transcoder.reporting import MetricsWriter, ProgressBar, write_report
from transcoder.training.baselines import LinearBaseline
from transcoder.training.checkpoint import CheckpointError, CheckpointStore, FolderLock, pack_state
from transcoder.training.evaluation import evaluate
from transcoder.training.interrupts import StopRequest
from transcoder.training.meters import Meters
from transcoder.training.optimizer import make_optimizer, optimizer_step
from transcoder.training.schedule import learning_rate, peak_learning_rate
from transcoder.training.sources import IterableSource, Source, look_ahead
from transcoder.training.storage import replace_atomically
from transcoder.training.tensor_file import tensor_bytes

logger = logging.getLogger(__name__)

BASELINE_TOKENS_PER_INPUT = 64
"""Tokens a source coordinate gets in the linear baseline's fit: its held-out excess over the best map is then about 1/64."""
BASELINE_TOKENS = 65536
"""And never fewer than this."""


class TrainingDivergedError(RuntimeError):
    """The loss is no longer a number. The last checkpoint is from before that was noticed."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    step: int
    """Optimizer steps done."""
    finished: bool
    interrupted_by: str | None
    """Name of the signal that stopped it; its state is saved, resume goes on."""
    summary: dict[str, Any]
    """Final figures, as in summary.json."""
    report: Path | None
    transcoder: Transcoder = field(repr=False)


def train_transcoder(
    config: RunConfig,
    out: Path | str | None = None,
    resume: bool = False,
    *,
    batches: Iterable[ActivationBatch] | None = None,
    heldout: Sequence[ActivationBatch] | None = None,
) -> RunResult:
    """Train one transcoder and leave a run folder: config, metrics, checkpoints, anti-duplication reports, samples, report.

    Args:
        config: the run, see `transcoder.config`.
        out: run folder; None is runs/<name>.
        resume: go on from the folder's newest good checkpoint (from the start where there is none). Without it a folder
            that holds a run is refused.
        batches: train on these instead of config.activations: any iterable of ActivationBatch. It resumes exactly only if
            it has `state_dict` and `load_state_dict`.
        heldout: with `batches`, what evaluation reads; None takes the first `training.evaluation_tokens` of `batches`
            away from training.

    Raises:
        ConfigError, ValueError: settings or data that cannot be trained on, before any work is done.
        FileExistsError: the folder holds a run and `resume` is off.  RunLockedError: another process is using it.
        LedgerError: an enabled anti-duplication part was not called, had no effect or wrote nothing.
        TrainingDivergedError: the loss became NaN or Inf.  CheckpointError: the disk cannot take a checkpoint.
    """
    run_dir = Path("runs") / config.name if out is None else Path(out)
    device = _device(config.model.device)
    _check_switches(config, batches)
    with ExitStack() as stack:
        stack.enter_context(FolderLock(run_dir))
        _check_folder(run_dir, config, resume)
        stop = stack.enter_context(StopRequest())
        run = _Run(config, run_dir, device, batches, heldout, stack)
        run.prepare(resume)
        return run.train(stop)


class _Run:
    """The parts of one run and the order they are called in."""

    def __init__(
        self,
        config: RunConfig,
        run_dir: Path,
        device: torch.device,
        batches: Iterable[ActivationBatch] | None,
        heldout: Sequence[ActivationBatch] | None,
        stack: ExitStack,
    ) -> None:
        self.config, self.run_dir, self.device, self.stack = config, run_dir, device, stack
        anti, seed = config.antidup, config.training.seed
        logs = run_dir / "anti_duplication_logs"
        self.ledger = UsageLedger(
            {
                "diversity_regularizer": anti.regularizer.enabled,
                "position_sampler": anti.positions.enabled,
                "correlation_monitor": anti.monitor.enabled,
                "activation_samples": anti.samples.enabled,
            },
            run_dir / "usage.json",
        )
        self.positions = (
            PositionSampler(anti.positions, seed, (), self.ledger, out_dir=logs) if anti.positions.enabled else None
        )
        self.source: Source
        self.sinks: ActivationBatch | None = None
        special_ids: Sequence[int] = ()
        sequence_length = config.activations.sequence_length
        if batches is None:
            stream = build_stream(
                config,
                device,
                position_sampler=self.positions,
                context_tokens=anti.samples.context_tokens if anti.samples.enabled else 0,
            )
            stack.callback(stream.close)
            self.source = stream
            self.heldout = stream.heldout(config.training.evaluation_tokens)
            self.sinks = stream.heldout_sinks()
            special_ids, sequence_length = stream.special_ids, stream.sequence_length
            if self.positions is not None:
                self.positions.special_ids = special_ids
        else:
            own = IterableSource(batches)
            self.heldout = list(heldout) if heldout is not None else own.take(config.training.evaluation_tokens)
            self.source = own

        shape = config.transcoder
        self.transcoder = Transcoder(
            TranscoderConfig(
                d_in=self.source.d_in,
                d_out=self.source.d_out,
                d_sae=shape.d_sae,
                k=shape.k,
                activation=shape.activation,
                widths=shape.widths,
                skip=shape.skip,
                prefix_weights=shape.prefix_weights,
                loss=shape.loss,
                aux_k=shape.aux_k,
                aux_coefficient=shape.aux_coefficient,
                dead_after_tokens=shape.dead_after_tokens,
                threshold_rate=shape.threshold_rate,
            ),
            seed=seed,
            device=device,
        )
        self.peak = peak_learning_rate(config)
        self.optimizer = make_optimizer(self.transcoder, config.training, self.peak)
        self.baseline = LinearBaseline(
            self.source.d_in,
            self.source.d_out,
            max(BASELINE_TOKENS, BASELINE_TOKENS_PER_INPUT * self.source.d_in),
            device,
        )
        self.regularizer = (
            DiversityRegularizer(anti.regularizer, shape.d_sae, device, seed, self.ledger, out_dir=logs)
            if anti.regularizer.enabled
            else None
        )
        self.monitor = (
            CorrelationMonitor(anti.monitor, shape.d_sae, device, logs, self.ledger) if anti.monitor.enabled else None
        )
        self.samples = (
            ActivationSampleCollector(
                anti.samples,
                shape.d_sae,
                device,
                seed,
                run_dir / "activation_samples",
                special_ids,
                sequence_length,
                self.ledger,
            )
            if anti.samples.enabled
            else None
        )
        self.store = CheckpointStore(run_dir, config.checkpoint)
        self.meters = Meters()
        self.step = 0
        self.evaluation: dict[str, float] = {}
        self.verify_step = min(anti.verify_at_step, config.training.steps)
        self.verified = False
        self.window = (time.monotonic(), 0)

    # -- before the first step ------------------------------------------------------------------------------------

    def prepare(self, resume: bool) -> None:
        """Restore the newest checkpoint, or fit the normalisation; check that the run's files will fit; open the logs."""
        loaded = self.store.latest() if resume else None
        if loaded is not None:
            self._restore(loaded.model, loaded.trainer_tree)
            self.step = loaded.step
        else:
            self._fit_normalization()
        # Adam's two moments do not exist before its first step.
        moments = 2 * sum(p.numel() * p.element_size() for p in self.transcoder.parameters()) if loaded is None else 0
        tensors, _ = pack_state(self._trainer_tree())
        size = tensor_bytes(dict(self.transcoder.state_dict())) + tensor_bytes(tensors) + moments
        self.store.check_space(size, self.config.training.steps)
        replace_atomically(self.run_dir / "config.yaml", self.config.to_yaml().encode())
        self.writer = self.stack.enter_context(
            MetricsWriter(self.run_dir, self.config, self.step if loaded is not None else None)
        )
        self.bar = ProgressBar(self.config.training.steps, self.step, self.config.logging.progress)
        self.stack.callback(self.bar.close)

    def _fit_normalization(self) -> None:
        mode = self.config.transcoder.normalize
        if mode == "none":
            return
        # The sample is handed back to training: it is looked at, not used up.
        taken = look_ahead(self.source, self.config.transcoder.normalization_tokens)
        self.transcoder.set_normalization(
            torch.cat([b.source for b in taken]), torch.cat([b.target for b in taken]), mode
        )

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest) -> RunResult:
        section = self.config.training
        self.window = (time.monotonic(), self.step)
        self.transcoder.train()
        while self.step < section.steps and stop.signal is None:
            if self.step % section.dead_refresh_steps == 0:
                self.transcoder.refresh_dead()
            try:
                self._train_step()
            except StopIteration:
                raise ValueError(
                    f"training data ended after {self.step} of {section.steps} steps: expected an endless iterator, or set "
                    f"--training.steps {max(1, self.step)}"
                ) from None
            self.step += 1
            self._between_steps()
        finished = self.step >= section.steps
        if not finished:
            self._save()
        summary = self._finish(finished, stop.signal)
        return RunResult(
            self.run_dir,
            self.step,
            finished,
            None if finished else stop.signal,
            summary,
            self._report(),
            self.transcoder,
        )

    def _train_step(self) -> None:
        """Forward, penalty, backward, update. Nothing here waits for the device."""
        section = self.config.training
        lr = learning_rate(self.step, section, self.peak)
        for _ in range(section.accumulation):
            batch = next(self.source)
            self.baseline.update(batch.source, batch.target)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=section.compute_dtype == "bfloat16"):
                out = self.transcoder.training_step(batch.source, batch.target, token_weights=batch.weights)
            loss = self._penalized(out, batch)
            (loss / section.accumulation).backward()
            self._observe(out, batch, loss)
        norm = optimizer_step(self.transcoder, self.optimizer, lr, section.gradient_clip)
        self.meters.add({"details/gradient_norm": norm})

    def _penalized(self, out: StepOutput, batch: ActivationBatch) -> Tensor:
        if self.regularizer is None:
            return out.loss
        pairs = None if self.monitor is None else self.monitor.target_pairs(self.config.antidup.regularizer.max_pairs)
        return self.regularizer.apply_penalty(
            out.loss, self.transcoder, codes=out.codes, batch=batch, pairs=pairs, step=self.step
        )

    @torch.no_grad()
    def _observe(self, out: StepOutput, batch: ActivationBatch, loss: Tensor) -> None:
        """Monitor, samples and meters: read the codes, touch nothing that training depends on."""
        codes, anti = out.codes.detach(), self.config.antidup
        if self.monitor is not None and self.step % anti.monitor.update_every == 0:
            self.monitor.update_correlations(codes, self.step, sequences=batch.sequences)
        if self.samples is not None and self.step % anti.samples.collect_every == 0:
            self.samples.collect(codes, batch, self.step)
        values = {
            "losses/overall_loss": loss,
            "losses/mse_loss": out.mse_per_prefix[-1],
            "losses/auxiliary_reconstruction_loss": out.aux_loss,
            "metrics/fvu": out.fvu_per_prefix[-1],
            "metrics/explained_variance": 1 - out.fvu_per_prefix[-1],
            "metrics/l0": (codes.values > 0).sum() / max(1, len(batch)),
        }
        for i, width in enumerate(self.transcoder.widths):
            values[f"losses/inner_mse_loss_{width}"] = out.mse_per_prefix[i]
            values[f"metrics/fvu_prefix_{width}"] = out.fvu_per_prefix[i]
        if self.regularizer is not None:
            values["losses/diversity_penalty"] = loss - out.loss
            values.update(self.regularizer.metrics())
        self.meters.add(values)

    # -- between steps: the only places that read the device or write files ---------------------------------------------

    def _between_steps(self) -> None:
        config, step = self.config, self.step
        last = step >= config.training.steps
        every = config.training.evaluation_every
        if self.monitor is not None and (step % config.antidup.monitor.correlation_save_frequency == 0 or last):
            self._report_antidup()
        if self.samples is not None and (step % config.antidup.samples.save_frequency == 0 or last):
            self.samples.save(step, self.source.decode_tokens)
        if step == self.verify_step:
            self._verify_ledger()
        if step % config.logging.every == 0 or last:
            self._log()
        evaluated = (every > 0 and step % every == 0) or last
        if evaluated and self.heldout:
            self.evaluation = evaluate(self.transcoder, self.heldout, self.sinks, self.baseline)
            self.writer.write(step, self.evaluation)
        if step % config.checkpoint.every == 0 or last:
            self._save(self.evaluation.get("evaluation/fvu") if evaluated else None)

    def _report_antidup(self) -> None:
        if self.monitor is not None:
            self.monitor.report(self.step, self.transcoder.W_dec.detach())
        if self.regularizer is not None:
            self.regularizer.save(self.step)
        if self.positions is not None:
            self.positions.save(self.step)
        self.ledger.write()

    def _verify_ledger(self) -> None:
        self._report_antidup()
        if self.samples is not None:
            self.samples.save(self.step, self.source.decode_tokens)
        self.ledger.write()
        self.ledger.verify(self.step)

    def _log(self) -> None:
        tracked = self.transcoder.tokens_since_fired >= self.transcoder.config.dead_after_tokens
        figures = self.meters.read(
            {
                "metrics/topk_threshold": self.transcoder.threshold,
                "sparsity/dead_features": tracked.sum(),
                "sparsity/dead_share": tracked.double().mean(),
            }
        )
        section = self.config.training
        per_step = section.batch_size * section.accumulation
        now = time.monotonic()
        seconds, steps = now - self.window[0], self.step - self.window[1]
        self.window = (now, self.step)
        figures["details/n_training_samples"] = float(self.step * per_step)
        figures["details/learning_rate"] = learning_rate(self.step - 1, section, self.peak)
        if seconds > 0:
            figures["metrics/tokens_per_second"] = steps * per_step / seconds
        if self.monitor is not None:
            figures.update(self.monitor.metrics())
        figures.update({f"data/{name}": value for name, value in self.source.counters().items()})
        self.writer.write(self.step, figures)
        self.bar.update(self.step, figures)
        if not math.isfinite(figures["losses/overall_loss"]):
            raise TrainingDivergedError(
                f"loss is {figures['losses/overall_loss']} between steps {self.step - steps} and {self.step} (gradient norm "
                f"{figures.get('details/gradient_norm')}); the last checkpoint is kept. Lower training.lr, or look for NaN in "
                "the activations"
            )

    # -- state ----------------------------------------------------------------------------------------------------------

    def _trainer_tree(self) -> dict[str, Any]:
        parts: dict[str, Any] = {
            "optimizer": self.optimizer.state_dict(),
            "source": self.source.state_dict(),
            "baseline": self.baseline.state_dict(),
            "meters": self.meters.state_dict(),
            "ledger": self.ledger.state_dict(),
            "evaluation": self.evaluation,
        }
        for name in ("regularizer", "monitor", "samples"):
            part = getattr(self, name)
            if part is not None:
                parts[name] = part.state_dict()
        return parts

    def _restore(self, model: Mapping[str, Tensor], tree: dict[str, Any]) -> None:
        self.transcoder.load_state_dict(model)
        self.optimizer.load_state_dict(tree["optimizer"])
        self.source.load_state_dict(tree["source"])
        self.baseline.load_state_dict(tree["baseline"])
        self.meters.load_state_dict(tree["meters"], self.device)
        self.ledger.load_state_dict(tree["ledger"])
        self.evaluation = dict(tree["evaluation"])
        for name in ("regularizer", "monitor", "samples"):
            part = getattr(self, name)
            if part is not None:
                part.load_state_dict(tree[name])

    def _save(self, metric: float | None = None) -> None:
        # The lines up to here must be on disk first: a resumed run drops those after its step and writes them again.
        self.writer.flush()
        summary = {
            "transcoder": self.transcoder.config.to_dict(),
            "config": self.config.to_dict(),
            **self.evaluation,
        }
        try:
            path = self.store.save(self.step, dict(self.transcoder.state_dict()), self._trainer_tree(), summary, metric)
        except CheckpointError as error:
            if self.step >= self.config.training.steps:
                raise
            logger.warning("%s; training goes on, the next try is at the next interval", error)
            self.writer.write_event("checkpoint_failed", {"error": str(error)})
            return
        self.writer.write_event("checkpoint", {"step": self.step, "folder": path.name})
        if self.config.logging.wandb_upload_checkpoints:
            self.writer.upload_checkpoint(path, self.step)

    def _finish(self, finished: bool, interrupted_by: str | None) -> dict[str, Any]:
        self.ledger.write()
        summary = {
            "name": self.config.name,
            "step": self.step,
            "finished": finished,
            "interrupted_by": None if finished else interrupted_by,
            "tokens": self.step * self.config.training.batch_size * self.config.training.accumulation,
            "d_in": self.source.d_in,
            "d_out": self.source.d_out,
            **self.evaluation,
            **(self.monitor.metrics() if self.monitor is not None else {}),
            "data": self.source.counters(),
        }
        replace_atomically(self.run_dir / "summary.json", json.dumps(summary, indent=2).encode())
        return summary

    def _report(self) -> Path | None:
        """The HTML page; a run that trained for hours is not lost to a fault in drawing it."""
        self.writer.flush()
        try:
            return write_report(self.run_dir)
        except Exception as error:
            logger.warning("report.html could not be written: %s; try `transcoder report %s`", error, self.run_dir)
            return None


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(
            f"model.device: expected 'auto' or a device of this machine, got {name!r}: {error}"
        ) from error
    return device


def _check_switches(config: RunConfig, batches: Iterable[ActivationBatch] | None) -> None:
    """Settings that contradict each other are refused here: the ledger would only notice after the first steps."""
    if batches is not None and config.antidup.positions.enabled:
        raise ConfigError(
            "antidup.positions.enabled: the position sampler chooses among a sequence's tokens before they become batches, "
            "which it cannot do for your own `batches`; set it to false"
        )
    regularizer = config.antidup.regularizer
    weights = ("correlation_weight", "orthogonality_weight", "all_pairs_weight", "position_entropy_weight")
    if regularizer.enabled and all(getattr(regularizer, name) == 0 for name in weights):
        raise ConfigError(
            f"antidup.regularizer: enabled with every weight 0 ({', '.join(weights)}): it would have no effect; set one, or "
            "set antidup.regularizer.enabled to false"
        )


def _check_folder(run_dir: Path, config: RunConfig, resume: bool) -> None:
    """A folder that holds a run is resumed, with the settings it was started with, or left alone."""
    present = [name for name in ("config.yaml", "metrics.jsonl", "checkpoints") if (run_dir / name).exists()]
    if present and not resume:
        raise FileExistsError(
            f"{run_dir} holds a run already ({', '.join(present)}): add --resume to go on with it, or choose another --out"
        )
    if resume and (run_dir / "config.yaml").exists():
        before = RunConfig.load(run_dir / "config.yaml").to_dict()
        now = config.to_dict()
        changed = [
            f"{s}.{k}" for s in ("activations", "transcoder", "antidup") for k in now[s] if now[s][k] != before[s][k]
        ]
        changed += [f"training.{k}" for k in now["training"] if now["training"][k] != before["training"][k]]
        if changed:
            raise ConfigError(
                f"resume: {', '.join(changed)} differ from {run_dir / 'config.yaml'}: a resumed run goes on exactly as it was "
                "started; leave them out, or start a new run with another --out"
            )
