"""train_transcoder: one run from a config to a folder of results, resumable bit for bit."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch, ActivationStream, build_stream
from transcoder.antidup import (
    ActivationSampleCollector,
    CorrelationMonitor,
    DiversityRegularizer,
    PositionSampler,
)
from transcoder.antidup.ledger import LedgerError
from transcoder.antidup.merge_cost import MergeResult
from transcoder.antidup.monitor import Judge
from transcoder.config import ConfigError, RegularizerSection, RunConfig
from transcoder.files import replace_atomically
from transcoder.model import StepOutput, Transcoder
from transcoder.reporting import MetricsWriter, ProgressBar
from transcoder.reporting.report_subprocess import write_report_apart
from transcoder.training.baselines import LinearBaseline
from transcoder.training.checkpoint import CheckpointStore
from transcoder.training.checkpointing import Saver
from transcoder.training.evaluation import cross_entropy, evaluate, merge_test
from transcoder.training.latent_facts import write_latent_facts
from transcoder.training.meters import Meters
from transcoder.training.nonfinite import (
    HELD_STEPS,
    BadSteps,
    HeldStep,
    Observed,
    StepLedger,
    TrainingDivergedError,
    before_step,
    take_back,
    verdict_of,
)
from transcoder.training.optimizer import make_optimizer, optimizer_step
from transcoder.training.recycling import Recycler
from transcoder.training.run_folder import RunStart
from transcoder.training.run_state import restore
from transcoder.training.schedule import learning_rate, peak_learning_rate
from transcoder.training.signals import StopRequest
from transcoder.training.similarity import (
    CODES_FILE,
    REPORT_FILE,
    HeldoutCodes,
    prefix_similarity,
    similarity_figures,
    write_similarity,
)
from transcoder.training.sources import Source, TrainingDataError, own_data

logger = logging.getLogger(__name__)

BASELINE_TOKENS_PER_INPUT = 64
"""Tokens a source coordinate gets in the linear baseline's fit: its held-out excess over the best map is then about 1/64."""
BASELINE_TOKENS = 65536
"""And never fewer than this."""
FIRST_TARGETS = 10
"""Step of the first survey for pairs to penalise: by then batches of 1024 tokens have given 10k tokens of evidence."""
MAY_CHANGE = ("model.device", "activations.prefetch", "activations.allow_changed_data", "training.max_bad_steps")
"""Settings that a resumed run may be given anew: they do not touch its results, or say in so many words that they may."""
REPORT_PAIRS = 4096
"""Pairs whose latents get promoted tokens in the report, beside those that samples are kept of."""
REPORT_SECONDS, INTERRUPTED_REPORT_SECONDS = 900.0, 20.0
"""How long a run waits for its page at its end, and at an interrupt."""


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
    heldout: Sequence[ActivationBatch] = field(repr=False)
    """What evaluation read, on the run's device."""


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
        heldout: only with `batches`: what evaluation reads; None takes the first `training.evaluation_tokens` of `batches`
            away from training.

    Raises:
        ConfigError, ValueError, TypeError: settings or data that cannot be trained on, before any work is done; a field of
            `batches` by name.
        FileExistsError: the folder holds a run and `resume` is off.  RunLockedError: another process is using it.
        LedgerError: an enabled anti-duplication part was not called, had no effect or wrote nothing.
        TrainingDivergedError: more than training.max_bad_steps steps were NaN or Inf, or the weights overflowed.
        CheckpointError: the disk cannot take a checkpoint.
    """
    run_dir = Path("runs") / config.name if out is None else Path(out)
    device = _device(config.model.device)
    _check_switches(config, batches, heldout)
    with ExitStack() as stack:
        start = stack.enter_context(RunStart(run_dir))
        _check_folder(run_dir, config, resume)
        stop = stack.enter_context(StopRequest())
        run = _Run(config, run_dir, device, batches, heldout, stack)
        run.prepare(resume)
        start.begun()
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
        self.ledger = StepLedger(
            {
                "diversity_regularizer": anti.regularizer.enabled,
                "position_sampler": anti.positions.enabled,
                "correlation_monitor": anti.monitor.enabled,
                "activation_samples": anti.samples.enabled,
            },
            run_dir / "usage.json",
        )
        self.own_batches = batches is not None
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
            self.source, self.heldout = own_data(batches, heldout, config.training.evaluation_tokens, device)

        shape = config.transcoder
        self.transcoder = Transcoder(shape.config(self.source.d_in, self.source.d_out), seed=seed, device=device)
        self.peak = peak_learning_rate(config)
        self.optimizer = make_optimizer(self.transcoder, config.training, self.peak)
        self.baseline = LinearBaseline(
            self.source.d_in,
            self.source.d_out,
            max(BASELINE_TOKENS, BASELINE_TOKENS_PER_INPUT * self.source.d_in),
            device,
        )
        self.regularizer = (
            DiversityRegularizer(
                _regularizer_section(config),
                shape.d_sae,
                device,
                seed,
                self.ledger,
                out_dir=logs,
                accumulation=config.training.accumulation,
                special_ids=special_ids,
                steps=config.training.steps,
                scale=penalty_scale(shape.loss, self.source.d_out, self.transcoder.config.prefix_weights or ()),
            )
            if anti.regularizer.enabled
            else None
        )
        self.monitor = (
            CorrelationMonitor(anti.monitor, shape.d_sae, device, logs, self.ledger) if anti.monitor.enabled else None
        )
        if self.monitor is not None and (shape.d_sae == 1 or (shape.k == 1 and shape.activation == "topk")):
            self.ledger.record_no_pairs_possible()
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
        if self.regularizer is not None and self.monitor is None and anti.regularizer.correlation_weight > 0:
            logger.warning(
                "antidup.monitor is off: nobody finds pairs, so antidup.regularizer.correlation_weight acts as 0"
            )
        self.recycler = (
            Recycler(anti.recycle, config.training.steps, seed, logs)
            if anti.recycle.enabled and self.monitor is not None
            else None
        )
        self.store = CheckpointStore(run_dir, config.checkpoint)
        self.saver = Saver(self, self.store)
        self.meters = Meters()
        self.step = self.tokens = 0
        self.evaluation: dict[str, float] = {}
        self.verify_step = min(anti.verify_at_step, config.training.steps)
        self.window = (time.monotonic(), 0)
        self.unwritten_step = -1
        """The last step at which a file could not be written."""
        self.bad_steps = BadSteps()
        self.held: deque[HeldStep] = deque()
        """Steps computed and not yet counted: nobody knows whether they are good."""

    # -- before the first step ------------------------------------------------------------------------------------

    def prepare(self, resume: bool) -> None:
        """Restore the newest checkpoint, or fit the normalisation; check that the run's files will fit; open the logs."""
        loaded = self.store.latest() if resume else None
        if loaded is not None:
            try:
                restore(self, loaded.model, loaded.trainer_tree)
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                raise ValueError(
                    f"resume: {loaded.path} is whole but does not hold the state of this run "
                    f"({type(error).__name__}: {error}): it was written by another version or with other settings; start a "
                    "new run with another --out"
                ) from error
            self.step = self.saver.saved_step = loaded.step
        else:
            self._fit_normalization()
        budget = self.saver.begin()
        self.folder_id = self.run_dir.stat().st_ino
        self._write_config()
        self.writer = self.stack.enter_context(
            MetricsWriter(self.run_dir, self.config, self.step if loaded is not None else None)
        )
        # Before the log is closed: what became of the last write is in it.
        self.stack.enter_context(self.saver)
        self.writer.write_event("data", {"source": "own batches" if self.own_batches else self.config.activations.kind})
        self.writer.write_event("checkpoint_budget", {"bytes_each_at_most": budget})
        self.bar = ProgressBar(self.config.training.steps, self.step, self.config.logging.progress)
        self.stack.callback(self.bar.close)

    def _same_folder(self) -> bool:
        """Whether the run's folder is the one that it began in, and not one that was made again after somebody deleted it."""
        try:
            return self.run_dir.stat().st_ino == self.folder_id
        except OSError:
            return False

    def _write_config(self) -> None:
        replace_atomically(self.run_dir / "config.yaml", self.config.to_yaml())

    def _fit_normalization(self) -> None:
        mode = self.config.transcoder.normalize
        if mode == "none":
            return
        # The sample is handed back to training: it is looked at, not used up.
        taken = self.source.look_ahead(self.config.transcoder.normalization_tokens)
        self.transcoder.set_normalization(
            torch.cat([b.source for b in taken]), torch.cat([b.target for b in taken]), mode
        )

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest) -> RunResult:
        section = self.config.training
        self.window = (time.monotonic(), self.tokens)
        self.transcoder.train()
        try:
            while self.step < section.steps and stop.signal is None:
                self.advance()
        except StopIteration:
            self._rescue()
            raise TrainingDataError(
                f"training data ended after {self.step} of {section.steps} steps: expected an endless iterator; the state is "
                "saved, so with more data --resume goes on"
            ) from None
        except Exception:
            self._rescue()
            raise
        finished = self.step >= section.steps
        if not finished:
            self._catch_up()
            self.saver.save(wait=True)
        summary = self._finish(finished, stop.signal)
        return RunResult(
            self.run_dir,
            self.step,
            finished,
            None if finished else stop.signal,
            summary,
            self._report(finished),
            self.transcoder,
            self.heldout,
        )

    def advance(self) -> None:
        """One step, and what is due after it. Public for those who take the steps of a run themselves: profiles, benchmarks."""
        if self.step % self.config.training.dead_refresh_steps == 0:
            self.transcoder.refresh_dead()
        self._train_step()
        self.step += 1
        self._between_steps()

    def _train_step(self) -> None:
        """Forward, penalty, backward, update. Nothing here waits for the device.

        A step of NaN or Inf leaves everything as it was; what others are shown of a step is held until that is known.
        """
        section = self.config.training
        lr = learning_rate(self.step, section, self.peak)
        before = before_step(self.transcoder, self.regularizer)
        bad = torch.zeros((), dtype=torch.bool, device=self.device)
        seen = []
        self.ledger.hold()
        for micro in range(section.accumulation):
            batch = next(self.source)
            with torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=section.compute_dtype == "bfloat16"):
                out = self.transcoder.training_step(batch.source, batch.target, token_weights=batch.weights)
            loss = self._penalized(out, batch, micro)
            (loss / section.accumulation).backward()
            bad |= ~torch.isfinite(loss.detach())
            seen.append(self._observed(out, batch, loss, micro))
        norm = optimizer_step(self.transcoder, self.optimizer, lr, section.gradient_clip, bad)
        take_back(bad, before, self.transcoder, self.regularizer)
        self.held.append(HeldStep(self.step, seen, norm, self.ledger.release(), verdict_of(bad)))
        self._count(HELD_STEPS)

    def _penalized(self, out: StepOutput, batch: ActivationBatch, micro: int) -> Tensor:
        if self.regularizer is None:
            return out.loss
        pairs = None if self.monitor is None else self.monitor.target_pairs(self.config.antidup.regularizer.max_pairs)
        return self.regularizer.apply_penalty(
            out.loss, self.transcoder, codes=out.codes, batch=batch, pairs=pairs, step=self.step, micro=micro
        )

    @torch.no_grad()
    def _observed(self, out: StepOutput, batch: ActivationBatch, loss: Tensor, micro: int) -> Observed:
        """What monitor, samples, baseline and meters need: they read it, and touch nothing that training depends on."""
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
        if self.regularizer is not None:
            values["losses/diversity_penalty"] = loss.detach() - out.loss.detach()
            values.update(self.regularizer.metrics())
        measured = None
        if self.monitor is not None:
            target = self.transcoder.normalize_target(batch.target)
            measured = self.monitor.evidence.measure(codes, out.residual, target, self.transcoder.W_dec, batch.weights)
        return Observed(codes, batch, values, micro, measured)

    def _count(self, keep: int) -> None:
        """Show the parts that watch every held step that is known to be good, and record every bad one, until the verdicts
        of at most `keep` are open. Waits only for those beyond."""
        while self.held and (len(self.held) > keep or self.held[0].verdict.arrived()):
            held = self.held.popleft()
            if held.verdict.read():
                record = self.bad_steps.add(held, self.config.training.accumulation, self.source.counters())
                logger.warning("step %d is NaN or Inf and was skipped", held.step + 1)
                self.writer.write_event("bad_step", record, step=held.step + 1)
            else:
                self._show(held)

    @torch.no_grad()
    def _show(self, held: HeldStep) -> None:
        for seen in held.seen:
            batch = seen.batch
            self.tokens += len(batch)
            self.baseline.update(batch.source, batch.target)
            if self.monitor is not None:
                self.monitor.evidence.add(seen.measured)
                self.monitor.update_correlations(
                    seen.codes, held.step, sequences=batch.sequences, weights=batch.weights
                )
            if self.samples is not None:
                self.samples.collect(seen.codes, batch, held.step, seen.micro)
            self.meters.add(seen.values)
        for record in held.records:
            record()
        self.meters.add({"details/gradient_norm": held.norm})

    # -- between steps: the only places that read the device or write files ---------------------------------------------

    def _between_steps(self) -> None:
        config, step = self.config, self.step
        self.saver.look()
        last = step >= config.training.steps
        every = config.training.evaluation_every
        reporting = step % config.antidup.monitor.correlation_save_frequency == 0 or last
        reporting |= self.recycler is not None and self.recycler.due(step)
        sampling = step % config.antidup.samples.save_frequency == 0 or last
        verifying = step == self.verify_step
        logging_now = step % config.logging.every == 0 or last
        evaluating = ((every > 0 and step % every == 0) or last) and bool(self.heldout)
        saving = step % config.checkpoint.every == 0 or last
        if reporting or sampling or verifying or logging_now or evaluating or saving:
            self._settle()
        if reporting or verifying:
            self._report_antidup()
        elif self.monitor is not None and self._targets_are_due():
            self.monitor.refresh_targets(self._judge())
        # Opened by the first good batch: a save before that would fix the width of contexts that nobody has seen.
        if self.samples is not None and (sampling or verifying) and self.samples.opened:
            samples = self.samples
            self._write("activation samples", lambda: samples.save(step, self.source.decode_tokens))
        if reporting or sampling or verifying:
            self._write("usage.json", self.ledger.write)
        if verifying:
            self._verify()
        if logging_now:
            self._log()
        if evaluating:
            self.evaluation = evaluate(self.transcoder, self.heldout, self.sinks, self.baseline)
            tokens = config.training.evaluation_ce_tokens
            if last and tokens and isinstance(self.source, ActivationStream):
                self.evaluation.update(self._cross_entropy(self.source, tokens))
            if last:
                self.evaluation.update(self._similarity())
            self.writer.write(step, self.evaluation)
        if saving:
            self.saver.save(self.evaluation.get("evaluation/fvu") if evaluating else None)
            if not os.path.exists(self.run_dir / "config.yaml"):
                # Somebody deleted the folder: the checkpoints that it gets from now on cannot be resumed without this.
                self._write("config.yaml", self._write_config)

    def _catch_up(self) -> None:
        """Every step is counted, and the weights are numbers: finite gradients can still carry one to infinity, which must
        not push a good checkpoint out, nor fail in a report's JSON."""
        self._count(0)
        ranges = {name: torch.stack(p.detach().aminmax()) for name, p in self.transcoder.named_parameters()}
        broken = [name for name, ends in ranges.items() if not bool(torch.isfinite(ends).all())]
        if broken:
            raise TrainingDivergedError(
                f"step {self.step}: {', '.join(broken)} overflowed (the gradients were finite): the last checkpoint is from "
                "before and is kept. Lower training.lr"
            )

    def _settle(self) -> None:
        """Before anything is read or written; a run of too many bad steps ends here."""
        self._catch_up()
        allowed = self.config.training.max_bad_steps
        if self.bad_steps.count > allowed:
            raise TrainingDivergedError(
                f"{self.bad_steps.count} of {self.step} steps were NaN or Inf, more than training.max_bad_steps = {allowed}: "
                f"{self.bad_steps.diagnosis()}. They changed nothing, and each is in metrics.jsonl with its batch; the state "
                f"of step {self.step} is saved, and --resume goes on from it with a larger training.max_bad_steps"
            )

    def _targets_are_due(self) -> bool:
        """The pair penalty needs its targets well before the first report: at steps 10, 20, 40, 80, ... until then."""
        doublings, rest = divmod(self.step, FIRST_TARGETS)
        early = self.step < self.config.antidup.monitor.correlation_save_frequency
        return early and self.regularizer is not None and rest == 0 and doublings & (doublings - 1) == 0

    def _cross_entropy(self, stream: ActivationStream, tokens: int) -> dict[str, float]:
        """A figure more at the end; whatever goes wrong in the language model, the run is not lost to it."""
        try:
            return cross_entropy(self.transcoder, stream, tokens)
        except Exception as error:
            logger.warning(
                "cross-entropy with the transcoder in place could not be taken: %s: %s", type(error).__name__, error
            )
            return {}

    def _similarity(self) -> dict[str, float]:
        """CKA between prefixes, and what comparing runs by it needs."""
        codes = HeldoutCodes.of(self.transcoder, self.heldout, self.config.training.similarity_tokens)
        if codes is None:
            return {}
        self._write(CODES_FILE, lambda: codes.save(self.run_dir / CODES_FILE))
        report = prefix_similarity(codes, self.transcoder.W_dec)
        if report is None:
            return {}
        self._write(REPORT_FILE, lambda: write_similarity(self.run_dir / REPORT_FILE, report))
        return similarity_figures(report)

    def _judge(self) -> Judge | None:
        """The merge test on held-out tokens, on all of them at the end; of latents that are too rare for those, on the training
        tokens since the pair was found."""
        tokens = self.config.antidup.monitor.merge_test_tokens
        if tokens == 0 or not self.heldout or self.monitor is None:
            return None
        evidence = self.monitor.evidence
        last = self.step >= self.config.training.steps

        def judge(i: Tensor, j: Tensor) -> MergeResult:
            with self._autocast():
                found = merge_test(self.transcoder, self.heldout, i, j, None if last else tokens)
            return evidence.completed(found, self.transcoder.W_dec, self.transcoder.widths)

        return judge

    def _heldout_fvu(self) -> float:
        with self._autocast():
            return evaluate(self.transcoder, self.heldout)["evaluation/fvu"]

    def _autocast(self) -> torch.autocast:
        """In training's own compute type: what is asked between steps should not cost more than a step."""
        wanted = self.config.training.compute_dtype == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=wanted)

    def _report_antidup(self) -> None:
        step = self.step
        if self.monitor is not None:
            monitor = self.monitor
            judge, weights, last = self._judge(), self.transcoder, step >= self.config.training.steps
            self._write(
                "correlation report",
                lambda: monitor.report(
                    step, weights.W_dec.detach(), judge, W_enc=weights.W_enc.detach(), cosines_by_block=not last
                ),
            )
            if self.recycler is not None and self.recycler.due(step):
                recycler = self.recycler
                lines = recycler.act(step, self.transcoder, self.optimizer, monitor, self._heldout_fvu)
                if self.samples is not None:
                    self.samples.forget(
                        torch.tensor([int(line["dropped"]) for line in lines], device=self.device).long()
                    )
                self._write("recycled.jsonl", lambda: recycler.log(step, lines))
        if self.regularizer is not None:
            regularizer = self.regularizer
            self._write("regularizer.jsonl", lambda: regularizer.save(step))
        if self.positions is not None:
            positions = self.positions
            self._write("positions.json", lambda: positions.save(step))

    def _verify(self) -> None:
        """The ledger's proof. A part whose file the disk refused in this very step is looked at again later."""
        try:
            self.ledger.verify(self.step)
        except (LedgerError, OSError) as error:
            # OSError: the disk does not say what is on it.
            if isinstance(error, LedgerError) and self._same_folder() and self.unwritten_step != self.step:
                raise
            self.verify_step = self.step + self.config.antidup.monitor.correlation_save_frequency
            logger.warning(
                "%s. Files could not be written: this is looked at again at step %d", error, self.verify_step
            )

    def _write(self, what: str, write: Callable[[], object]) -> None:
        """A file that cannot be written now (a full disk) costs a warning: the next interval tries again."""
        try:
            write()
        except OSError as error:
            self.unwritten_step = self.step
            logger.warning("%s of step %d could not be written: %s; training goes on", what, self.step, error)
            self.writer.write_event("write_failed", {"what": what, "error": str(error)})

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
        now = time.monotonic()
        seconds, tokens = now - self.window[0], self.tokens - self.window[1]
        self.window = (now, self.tokens)
        figures["details/n_training_samples"] = float(self.tokens)
        figures["details/learning_rate"] = learning_rate(self.step - 1, section, self.peak)
        if seconds > 0:
            figures["metrics/tokens_per_second"] = tokens / seconds
        if self.monitor is not None:
            figures.update(self.monitor.metrics())
        figures["details/bad_steps"] = float(self.bad_steps.count)
        if self.recycler is not None:
            figures["duplicates/recycled"] = float(self.recycler.total)
        figures.update({f"data/{name}": value for name, value in self.source.counters().items()})
        self.writer.write(self.step, figures)
        self.bar.update(self.step, figures)

    # -- the end --------------------------------------------------------------------------------------------------------

    def _rescue(self) -> None:
        """The run is about to fail for a reason of its data or files: what was trained since the last checkpoint is kept."""
        try:
            self._catch_up()
            self.saver.save(wait=True)
        except Exception as error:
            logger.warning("the state of step %d could not be saved: %s", self.step, error)

    def _finish(self, finished: bool, interrupted_by: str | None) -> dict[str, Any]:
        self._write("usage.json", self.ledger.write)
        fvu, mean = (self.evaluation.get(f"evaluation/{name}") for name in ("fvu", "baseline_mean_fvu"))
        if fvu is not None and mean is not None and not fvu < mean:
            logger.warning(
                "held-out FVU %.4g is no better than predicting the mean (%.4g): too few steps, or a learning rate (%.3g) that "
                "does not fit",
                fvu,
                mean,
                self.peak,
            )
        summary = {
            "name": self.config.name,
            "step": self.step,
            "finished": finished,
            "interrupted_by": None if finished else interrupted_by,
            "tokens": self.tokens,
            "d_in": self.source.d_in,
            "d_out": self.source.d_out,
            **self.evaluation,
            **(self.monitor.metrics() if self.monitor is not None else {}),
            "bad_steps": self.bad_steps.count,
            "data": self.source.counters(),
        }
        text = json.dumps(summary, indent=2)
        self._write("summary.json", lambda: replace_atomically(self.run_dir / "summary.json", text))
        return summary

    def _latent_facts(self) -> None:
        """What only the model and the held-out tokens can say of each latent, for the report."""
        listed = [] if self.samples is None else [self.samples.latents]
        if self.monitor is not None:
            listed.extend(self.monitor.target_pairs(REPORT_PAIRS))
        shown = torch.cat([part.cpu() for part in listed]).unique() if listed else None
        stream = self.source if isinstance(self.source, ActivationStream) else None
        unembedding = "the run had no language model at hand" if stream is None else stream.unembedding()
        decode = None if stream is None else stream.decode_tokens
        write_latent_facts(self.run_dir, self.transcoder, self.heldout, shown, unembedding, decode)

    def _report(self, finished: bool) -> Path | None:
        """The HTML page, by a process of its own; a run that trained for hours is not lost to a fault in drawing it."""
        if not self.config.logging.report:
            return None
        self.writer.flush()
        try:
            if finished:
                self._latent_facts()
        except Exception as error:
            logger.warning("latents.parquet could not be written: %s: %s", type(error).__name__, error)
        try:
            # Whoever interrupts a run may soon kill it: the page is then finished without it.
            path = write_report_apart(self.run_dir, REPORT_SECONDS if finished else INTERRUPTED_REPORT_SECONDS)
        except Exception as error:
            logger.warning("report.html could not be written: %s; try `transcoder report %s`", error, self.run_dir)
            return None
        if path is None:
            logger.warning("report.html is still being written, by a process of its own")
        return path


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


def _check_switches(
    config: RunConfig, batches: Iterable[ActivationBatch] | None, heldout: Sequence[ActivationBatch] | None
) -> None:
    """Settings that contradict each other are refused here: the ledger would only notice after the first steps."""
    if heldout is not None and batches is None:
        raise ValueError(
            "train_transcoder: heldout: expected it only with `batches`: config.activations has held-out data"
        )
    if batches is not None and config.antidup.positions.enabled:
        raise ConfigError(
            "antidup.positions.enabled: the position sampler chooses among a sequence's tokens before they become batches, "
            "which it cannot do for your own `batches`; set it to false"
        )
    anti = config.antidup
    if anti.recycle.enabled and not (anti.monitor.enabled and anti.monitor.merge_test_tokens):
        raise ConfigError(
            "antidup.recycle.enabled: it folds what the monitor flags and the merge test passes; set antidup.monitor.enabled "
            "to true and antidup.monitor.merge_test_tokens above 0"
        )
    if anti.recycle.enabled and (config.transcoder.aux_k == 0 or config.transcoder.aux_coefficient == 0):
        raise ConfigError(
            "antidup.recycle.enabled: AuxK trains the latents that it frees; set transcoder.aux_k and "
            "transcoder.aux_coefficient above 0"
        )
    evidence = anti.monitor.blocks_to_flag * anti.monitor.block_tokens
    trained = config.training.steps * config.training.batch_size * config.training.accumulation
    if anti.recycle.enabled and evidence > anti.recycle.until * trained:
        logger.warning(
            "antidup.recycle: a flag needs %d blocks of %d tokens, and the run's last round comes after %d tokens: nothing "
            "will be recycled; lower antidup.monitor.block_tokens",
            anti.monitor.blocks_to_flag,
            anti.monitor.block_tokens,
            int(anti.recycle.until * trained),
        )
    regularizer = _regularizer_section(config)
    weights = (
        "correlation_weight",
        "orthogonality_weight",
        "all_pairs_weight",
        "position_entropy_weight",
        "sink_mass_weight",
    )
    if regularizer.enabled and all(getattr(regularizer, name) == 0 for name in weights):
        raise ConfigError(
            f"antidup.regularizer: enabled with every weight 0 ({', '.join(weights)}): it would have no effect; set one, or "
            "set antidup.regularizer.enabled to false"
        )


def penalty_scale(convention: str, d_out: int, prefix_weights: Sequence[float]) -> float:
    """What turns a weight relative to the `mse` convention into one for another: the factor between their losses."""
    if convention == "saelens":
        return d_out * sum(prefix_weights)
    if convention == "dictionary_learning":
        return d_out * sum(prefix_weights) / len(prefix_weights)
    return 1.0


def _regularizer_section(config: RunConfig) -> RegularizerSection:
    """Without the monitor nobody names pairs: the pair term is off then."""
    section = config.antidup.regularizer
    if config.antidup.monitor.enabled or section.correlation_weight == 0:
        return section
    return dataclasses.replace(section, correlation_weight=0.0, correlation_weight_max=0.0)


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
        fixed = ("model", "activations", "transcoder", "training", "antidup")
        changed = [
            f"{section}.{key}" for section in fixed for key in now[section] if now[section][key] != before[section][key]
        ]
        changed = [name for name in changed if name not in MAY_CHANGE]
        if changed:
            raise ConfigError(
                f"resume: {', '.join(changed)} differ from {run_dir / 'config.yaml'}: a resumed run goes on exactly as it was "
                "started; leave them out, or start a new run with another --out"
            )
