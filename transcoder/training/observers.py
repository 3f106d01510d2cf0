"""What looks at training: each observer sees every good step, and acts between steps where it is due.

To add one: write it here, and add it to the list in `RunParts`. They act in the order of that list.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from transcoder.activations import ActivationStream
from transcoder.antidup import ActivationSampleCollector, CorrelationMonitor
from transcoder.antidup.ledger import LedgerError
from transcoder.antidup.merge_cost import MergeResult
from transcoder.antidup.monitor import Judge
from transcoder.antidup.workload import SEARCH, TEST, step_work
from transcoder.files import replace_atomically
from transcoder.phases import TimeShares, phase
from transcoder.training.baselines import LinearBaseline
from transcoder.training.evaluation import cross_entropy, evaluate, merge_test, merge_test_work
from transcoder.training.layer_trainer import LayerTrainer, StepView
from transcoder.training.recycling import Recycler
from transcoder.training.run_state import Stateful
from transcoder.training.schedule import Calendar, learning_rate
from transcoder.training.similarity import CODES_FILE, REPORT_FILE, HeldoutCodes, prefix_similarity, similarity_metrics

if TYPE_CHECKING:
    from transcoder.training.trainer import Trainer

logger = logging.getLogger(__name__)


class Observer:
    """One thing that looks at the training of one dictionary. By default it does nothing."""

    see_phase = "other"
    act_phase = "other"
    """What `transcoder profile` calls the time of `see`, and of `act`."""

    def __init__(self, layer: LayerTrainer, calendar: Calendar, **parts: Stateful) -> None:
        self.layer, self.calendar = layer, calendar
        self.parts = parts
        """What has a state, by its name in checkpoints."""

    def due(self, step: int) -> bool:
        """Whether `act` is to be called after this many steps."""
        return False

    def see(self, view: StepView) -> None:
        """Take note of a good step. Touches nothing that training depends on, and reads nothing from the device."""

    def act(self, run: Trainer) -> None:
        """Between two steps: may read the device and write files. `run.write` guards what a full disk may refuse."""

    def metrics(self) -> dict[str, float]:
        """Numbers for every line of the log. Reads nothing from the device."""
        return {}

    def summary(self) -> dict[str, float]:
        """Numbers for the run's summary."""
        return {}


class CorrelationReports(Observer):
    """Counts which latents fire together, reports duplicates, and names pairs to penalise."""

    see_phase = "anti-duplication: monitor"
    act_phase = "anti-duplication: report"

    def __init__(self, layer: LayerTrainer, calendar: Calendar, monitor: CorrelationMonitor) -> None:
        super().__init__(layer, calendar, monitor=monitor)
        self.monitor = monitor

    def due(self, step: int) -> bool:
        return self.calendar.reporting(step) or self.calendar.searching(step)

    def see(self, view: StepView) -> None:
        config = self.layer.transcoder.config
        for micro in view.micro_batches:
            self.monitor.evidence.add(micro.measured)
            batch, codes = micro.batch, micro.codes
            self.monitor.update_correlations(codes, view.step, sequences=batch.sequences, weights=batch.weights)
            self.monitor.work.earn(step_work(len(batch), config.d_sae, config.d_in, codes.nnz))

    def act(self, run: Trainer) -> None:
        step, weights, work = run.step, self.layer.transcoder, self.monitor.work
        # What acts on the result, and what stays as it is, rests on the present weights.
        whole = self.calendar.last(step) or self.calendar.recycling(step)
        search, test = whole or work.affords(SEARCH), whole or work.affords(TEST)
        judge = self._judge(run)
        if not self.calendar.reporting(step):
            if search:
                with phase("anti-duplication: target pairs"):
                    self.monitor.refresh_targets(judge, test=test)
            return
        run.write(
            "correlation report",
            lambda: self.monitor.report(
                step,
                weights.W_dec.detach(),
                judge,
                W_enc=weights.W_enc.detach(),
                cosines_by_block=not self.calendar.last(step),
                search=search,
                test=test,
            ),
        )

    def _judge(self, run: Trainer) -> Judge | None:
        """The merge test on held-out tokens, on all of them at the end; of latents that are too rare for those, on the training
        tokens since the pair was found."""
        tokens: int | None = self.monitor.section.merge_test_tokens
        heldout = run.parts.data.heldout
        if tokens == 0 or not heldout:
            return None
        evidence, transcoder, work = self.monitor.evidence, self.layer.transcoder, self.monitor.work
        if self.calendar.last(run.step):
            tokens = None

        def judge(i: Tensor, j: Tensor) -> MergeResult:
            with self.layer.autocast():
                found = merge_test(transcoder, heldout, i, j, tokens)
            work.spend(TEST, merge_test_work(transcoder, heldout, i, j, tokens))
            return evidence.completed(found, transcoder.W_dec, transcoder.widths)

        return judge

    def metrics(self) -> dict[str, float]:
        return self.monitor.metrics()

    def summary(self) -> dict[str, float]:
        return self.monitor.metrics()


class Recycling(Observer):
    """Folds pairs that the report of the same step found foldable: the one observer that changes weights."""

    act_phase = "anti-duplication: report"

    def __init__(
        self,
        layer: LayerTrainer,
        calendar: Calendar,
        recycler: Recycler,
        monitor: CorrelationMonitor,
        samples: ActivationSampleCollector | None,
    ) -> None:
        super().__init__(layer, calendar, recycler=recycler)
        self.recycler, self.monitor, self.samples = recycler, monitor, samples

    def due(self, step: int) -> bool:
        return self.calendar.recycling(step)

    def act(self, run: Trainer) -> None:
        def heldout_fvu() -> float:
            with self.layer.autocast():
                return evaluate(self.layer.transcoder, run.parts.data.heldout)["evaluation/fvu"]

        lines = self.recycler.act(run.step, self.layer.transcoder, self.layer.optimizer, self.monitor, heldout_fvu)
        if self.samples is not None:
            self.samples.forget(torch.tensor([int(line["dropped"]) for line in lines], device=run.device).long())
        run.write("recycled.jsonl", lambda: self.recycler.log(run.step, lines))

    def metrics(self) -> dict[str, float]:
        return {"duplicates/recycled": float(self.recycler.total)}


class PartLog(Observer):
    """Writes a part's own file with each report.

    Args: `save` writes `file` of a step; `parts` as in `Observer`.
    """

    act_phase = "anti-duplication: report"

    def __init__(
        self, layer: LayerTrainer, calendar: Calendar, file: str, save: Callable[[int], object], **parts: Stateful
    ) -> None:
        super().__init__(layer, calendar, **parts)
        self._file, self._save = file, save

    def due(self, step: int) -> bool:
        return self.calendar.reporting(step)

    def act(self, run: Trainer) -> None:
        run.write(self._file, lambda: self._save(run.step))


class Samples(Observer):
    """Collects activation samples and writes their files."""

    see_phase = "anti-duplication: samples"
    act_phase = "anti-duplication: sample files"

    def __init__(self, layer: LayerTrainer, calendar: Calendar, samples: ActivationSampleCollector) -> None:
        super().__init__(layer, calendar, samples=samples)
        self.samples = samples

    def due(self, step: int) -> bool:
        return self.calendar.sampling(step)

    def see(self, view: StepView) -> None:
        for n, micro in enumerate(view.micro_batches):
            self.samples.collect(micro.codes, micro.batch, view.step, n)

    def act(self, run: Trainer) -> None:
        # The first good batch settles the width of contexts; before it there is nothing to save.
        if self.samples.opened:
            run.write("activation samples", lambda: self.samples.save(run.step, run.source.decode_tokens))


class Proof(Observer):
    """Tells the ledger what the regularizer did, writes usage.json, and once verifies that every enabled anti-duplication part
    was really used."""

    act_phase = "anti-duplication: ledger"

    def due(self, step: int) -> bool:
        return self.calendar.reporting(step) or self.calendar.sampling(step)

    def see(self, view: StepView) -> None:
        for record in view.penalty_records:
            record()

    def act(self, run: Trainer) -> None:
        run.write("usage.json", run.parts.ledger.write)
        if not self.calendar.verifying(run.step):
            return
        try:
            run.parts.ledger.verify(run.step)
        except (LedgerError, OSError) as error:
            # OSError: the disk does not say what is on it. A part whose file the disk has just refused is verified later.
            if isinstance(error, LedgerError) and run.files_are_whole():
                raise
            self.calendar.verify_step = run.step + run.config.antidup.monitor.correlation_save_frequency
            logger.warning(
                "%s. Files could not be written: this is looked at again at step %d", error, self.calendar.verify_step
            )


class Meters:
    """Means of a logging interval, kept on the device and read once: `add` accumulates device tensors (0-dim, or vectors under
    a list of names), `read` transfers all of them at once."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().to(torch.float64, copy=True)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, also: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Means since the last read, and the present values in `also`: one transfer. Starts the next interval."""
        parts = {name: total / self._counts[name] for name, total in self._sums.items()}
        parts.update({name: value.detach().double() for name, value in (also or {}).items()})
        self._sums, self._counts = {}, {}
        if not parts:
            return {}
        return dict(zip(parts, torch.stack(list(parts.values())).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        sums, counts = dict(state["sums"]), dict(state["counts"])
        if sums.keys() != counts.keys():
            raise ValueError(
                f"Meters.load_state_dict: expected a count for each sum, got {sorted(sums)} and {sorted(counts)}"
            )
        self._sums, self._counts = {name: value.to(self._device) for name, value in sums.items()}, counts


class MetricsLog(Observer):
    """Means of the logging interval to metrics.jsonl and the progress bar."""

    see_phase = "logging"
    act_phase = "logging"

    def __init__(self, layer: LayerTrainer, calendar: Calendar) -> None:
        self.meters = Meters(layer.device)
        super().__init__(layer, calendar, meters=self.meters)
        self._since = (time.monotonic(), 0)
        self.shares = TimeShares()
        """Of the time since the last line, while `running`."""

    def begin(self, tokens: int) -> None:
        """The first interval starts now."""
        self._since = (time.monotonic(), tokens)

    def due(self, step: int) -> bool:
        return self.calendar.every(self.layer.config.logging.every, step)

    def see(self, view: StepView) -> None:
        for micro in view.micro_batches:
            self.meters.add(micro.values)
        self.meters.add({"details/gradient_norm": view.gradient_norm})

    def act(self, run: Trainer) -> None:
        transcoder = self.layer.transcoder
        dead = transcoder.tokens_since_fired >= transcoder.config.dead_after_tokens
        metrics = self.meters.read(
            {
                "metrics/topk_threshold": transcoder.threshold.detach().mean(),
                "sparsity/dead_features": dead.sum(),
                "sparsity/dead_share": dead.double().mean(),
            }
        )
        (before, seen), now = self._since, time.monotonic()
        self._since = (now, run.tokens)
        metrics["details/n_training_samples"] = float(run.tokens)
        metrics["details/learning_rate"] = learning_rate(run.step - 1, run.config.training, self.layer.peak)
        if now > before:
            metrics["metrics/tokens_per_second"] = (run.tokens - seen) / (now - before)
        metrics |= self.shares.taken()
        metrics["details/bad_steps"] = float(run.bad_steps.count)
        for observer in run.observers:
            metrics.update(observer.metrics())
        metrics.update({f"data/{name}": value for name, value in run.source.counters().items()})
        run.writer.write(run.step, metrics)
        run.bar.update(run.step, metrics)


class Evaluation(Observer):
    """Held-out metrics next to the baselines, which it fits on the way; cross-entropy and similarity at the end."""

    see_phase = "linear baseline"
    act_phase = "evaluation"

    TOKENS_PER_INPUT = 64
    """Tokens for each source coordinate in the linear baseline's fit: its held-out excess over the best map is about 1/64."""
    TOKENS = 65536
    """And never fewer than this."""

    def __init__(self, layer: LayerTrainer, calendar: Calendar, heldout: bool) -> None:
        config, self._heldout = layer.transcoder.config, heldout
        limit = max(self.TOKENS, self.TOKENS_PER_INPUT * config.d_in)
        self.baseline = LinearBaseline(config.d_in, config.d_out, limit, layer.device)
        super().__init__(layer, calendar, baseline=self.baseline, evaluation=self)
        self.latest: dict[str, float] = {}
        self.step = -1
        """Of the latest evaluation of this process."""

    def due(self, step: int) -> bool:
        return self._heldout and self.calendar.every(self.layer.config.training.evaluation_every, step)

    def see(self, view: StepView) -> None:
        for micro in view.micro_batches:
            self.baseline.update(micro.batch.source, micro.batch.target)

    def act(self, run: Trainer) -> None:
        self.latest = evaluate(
            self.layer.transcoder, run.parts.data.heldout, run.parts.data.heldout_sinks, self.baseline
        )
        self.step = run.step
        if self.calendar.last(run.step):
            tokens = run.config.training.evaluation_ce_tokens
            if tokens and isinstance(run.source, ActivationStream):
                self.latest |= self._cross_entropy(run.source, tokens)
            self.latest |= self._similarity(run)
        run.writer.write(run.step, self.latest)

    def _cross_entropy(self, stream: ActivationStream, tokens: int) -> dict[str, float]:
        """Whatever goes wrong in the language model, the run is not lost to it."""
        try:
            return cross_entropy(self.layer.transcoder, stream, tokens)
        except Exception as error:
            logger.warning(
                "cross-entropy with the transcoder in place could not be taken: %s: %s", type(error).__name__, error
            )
            return {}

    def _similarity(self, run: Trainer) -> dict[str, float]:
        """CKA between prefixes, and the file that comparing runs by it needs."""
        codes = HeldoutCodes.of(self.layer.transcoder, run.parts.data.heldout, run.config.training.similarity_tokens)
        if codes is None:
            return {}
        run.write(CODES_FILE, lambda: codes.save(run.run_dir / CODES_FILE))
        report = prefix_similarity(codes, self.layer.transcoder.W_dec)
        if report is None:
            return {}
        text = json.dumps(report, indent=1, allow_nan=False)
        run.write(REPORT_FILE, lambda: replace_atomically(run.run_dir / REPORT_FILE, text))
        return similarity_metrics(report)

    def state_dict(self) -> dict[str, Any]:
        return dict(self.latest)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.latest = dict(state)

    def summary(self) -> dict[str, float]:
        fvu, mean = (self.latest.get(f"evaluation/{name}") for name in ("fvu", "baseline_mean_fvu"))
        if fvu is not None and mean is not None and not fvu < mean:
            logger.warning(
                "held-out FVU %.4g is no better than predicting the mean (%.4g): too few steps, or a learning rate (%.3g) that "
                "does not fit",
                fvu,
                mean,
                self.layer.peak,
            )
        return self.latest


class Checkpoints(Observer):
    """Saves the run's state, with the held-out FVU where it has just been taken."""

    act_phase = "checkpoint"

    def __init__(self, layer: LayerTrainer, calendar: Calendar, evaluation: Evaluation) -> None:
        super().__init__(layer, calendar)
        self._evaluation = evaluation

    def due(self, step: int) -> bool:
        return self.calendar.every(self.layer.config.checkpoint.every, step)

    def act(self, run: Trainer) -> None:
        found = self._evaluation
        run.save(found.latest["evaluation/fvu"] if found.step == run.step else None)
        # Not Path.exists, which raises where a disk no longer answers.
        if not os.path.exists(run.run_dir / "config.yaml"):
            # The folder was deleted: the checkpoints that it gets from now on cannot be resumed without this.
            run.write("config.yaml", run.write_config)
