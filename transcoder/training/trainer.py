"""Trainer: a run's loop, and what the loop needs."""

from __future__ import annotations

import functools
import logging
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import torch

from transcoder.activations import ActivationStream
from transcoder.config import RunConfig
from transcoder.files import replace_atomically
from transcoder.phases import phase
from transcoder.reporting import MetricsWriter, ProgressBar
from transcoder.reporting.progress import stage
from transcoder.settings import brief
from transcoder.training.checkpoint import CheckpointStore, Loaded
from transcoder.training.checkpointing import Saver
from transcoder.training.initial_weights import begin_from
from transcoder.training.layer_set import DIVERGENCE
from transcoder.training.layer_trainer import StepView
from transcoder.training.nonfinite import BadSteps
from transcoder.training.run_end import RunResult, write_run_report, write_summary
from transcoder.training.run_parts import RunParts
from transcoder.training.run_state import Stateful, restore_parts, trainer_tree
from transcoder.training.signals import StopRequest
from transcoder.training.sources import TrainingDataError
from transcoder.training.start_checks import (
    check_length,
)

logger = logging.getLogger(__name__)

T = TypeVar("T")
AHEAD = 2
"""Steps that the device may be ahead of the host: so many finite flags may still be on their way. On a CPU none is."""


class Trainer:
    """A run: its loop, and what the loop needs. Its own state is `step` and `tokens`.

    `stack` closes what has to be closed.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, device: torch.device, parts: RunParts, stack: ExitStack
    ) -> None:
        self.config, self.run_dir, self.device, self.parts, self._stack = config, run_dir, device, parts, stack
        self.source, self.layers, self.observers = parts.data.source, parts.layers, parts.observers
        self.ranks = parts.ranks
        self.saver = Saver(CheckpointStore(run_dir, config.checkpoint), config)
        self.step = self.tokens = 0
        """Optimizer steps done, and tokens of those that were good."""
        self.bad_steps = BadSteps()
        self._refused_step = -1
        """The last step at which a file could not be written."""
        self._unseen: deque[StepView] = deque()
        """Steps whose finite flag has not reached the host."""

    # -- the loop -------------------------------------------------------------------------------------------------

    def train(self, stop: StopRequest) -> RunResult:
        """Steps until the last one or a signal; then the run's summary and page. What was trained is saved in any case."""
        steps = self.config.training.steps
        self.parts.metrics_log.begin(self.tokens)
        stage("taking the first steps (the C++ backend is compiled once, about 20 s)")
        signal = None
        try:
            with self.parts.metrics_log.shares.running():
                while self.step < steps and (signal := self._stopped_by(stop)) is None:
                    self.advance()
        except Exception as error:
            if self.ranks is None or self.ranks.agreed:
                self.rescue()
            if not isinstance(error, StopIteration):
                raise
            raise TrainingDataError(
                f"training data ended after {self.step} of {steps} steps: expected an endless iterator; the state is "
                "saved, so with more data --resume goes on"
            ) from None
        return self._together(lambda: self.end(signal))

    def _stopped_by(self, stop: StopRequest) -> str | None:
        return stop.signal if self.ranks is None else self.ranks.signal(stop.signal)

    def _together(self, work: Callable[[], T]) -> T:
        """`work()`. Where it fails in one of several processes, it fails in all."""
        return work() if self.ranks is None else self.ranks.together(work)

    def end(self, signal: str | None, report: bool = True) -> RunResult:
        """Summary and page (unless `report` is False), after the last step or where `signal` stopped the run, whose state is
        then saved."""
        finished = self.step >= self.config.training.steps
        self.bar.close()
        if not finished and signal != DIVERGENCE:
            self.catch_up()
            self.save(wait=True)
        if self.ranks is not None:
            # What follows looks at the weights in each process for itself.
            self.layers[0].transcoder = self.ranks.gathered(self.layers[0].transcoder)
        stopped_by = None if finished else signal
        summary = write_summary(self, finished, stopped_by)
        page = write_run_report(self, finished) if report else None
        transcoder, heldout = self.layers[0].transcoder, self.parts.data.heldout
        return RunResult(self.run_dir, self.step, finished, stopped_by, summary, page, transcoder, heldout)

    def advance(self) -> None:
        """One step, and what is due after it. Public for callers that take the steps themselves: profiles, benchmarks."""
        if self.step % self.config.training.dead_refresh_steps == 0:
            with phase("dead counts, threshold"):
                for layer in self.layers:
                    layer.transcoder.refresh_dead()
        self._train_step()
        self.step += 1
        self.saver.flush(0.0)
        due = [observer for observer in self.observers if observer.due(self.step)]
        if due:
            self._together(self._settle)
        for observer in due:
            with phase(observer.act_phase):
                self._together(functools.partial(observer.act, self))

    def _train_step(self) -> None:
        """One step of every dictionary on the same batches. Reads nothing from the device."""
        with phase("batch"):
            count = self.config.training.accumulation
            if self.ranks is not None and isinstance(self.source, ActivationStream):
                self._together(functools.partial(self.source.ready, count))
            batches = [next(self.source) for _ in range(count)]
        self._unseen.extend(layer.step(self.step, batches) for layer in self.layers)
        self.look(AHEAD * len(self.layers))

    def look(self, unseen: int) -> None:
        """Let observers see each good step and record each bad one, in order, until at most `unseen` finite flags are on their
        way to the host. Waits only for those beyond."""
        while self._unseen and (len(self._unseen) > unseen or self._unseen[0].nonfinite.arrived()):
            view = self._unseen.popleft()
            batches = [micro.batch for micro in view.micro_batches]
            if view.nonfinite.read():
                record = self.bad_steps.add(view.step, batches, self.source.counters())
                logger.warning("step %d is NaN or Inf and was skipped", view.step + 1)
                self.writer.write_event("bad_step", record, step=view.step + 1)
                continue
            self.tokens += sum(map(len, batches))
            for observer in self.observers:
                if observer.layer.index == view.layer:
                    with phase(observer.see_phase):
                        observer.see(view)

    def catch_up(self) -> None:
        """Look at every step, and check that the weights are finite: a finite gradient can still carry one to infinity, which
        must not replace a good checkpoint, nor fail in a report's JSON."""
        self.look(0)
        for layer in self.layers:
            if self.ranks is not None:
                self.ranks.agree_on_counters(layer.transcoder)
            layer.check_weights(self.step)

    def _settle(self) -> None:
        """Before anything is read or written; a run of too many bad steps ends here."""
        self.catch_up()
        self.bad_steps.check(self.config.training.max_bad_steps, self.step)
        if self.ranks is not None and isinstance(self.source, ActivationStream):
            self.source.share_counters()

    # -- before the first step and after the last -------------------------------------------------------------------

    def prepare(self, resume: bool, runs: int = 1) -> None:
        """Restore the newest checkpoint, or fit the normalisation; check that the files of this run, and of as many like it as
        there are `runs`, will fit; open the logs."""
        store, begun = self.saver.store, None
        loaded = None if not resume else store.latest() if self.ranks is None else self.ranks.from_first(store.latest)
        stage("fitting the normalisation" if loaded is None else f"going on from step {loaded.step:,}")
        if loaded is None:
            for layer in self.layers:
                layer.fit_normalization(self.source)
                if self.config.training.init_from is not None:
                    begun = begin_from(layer.transcoder, self.config.training.init_from, self.parts.data.heldout)
        else:
            try:
                self._restore(loaded)
            except (KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                raise ValueError(
                    f"resume: {loaded.path} is whole but does not hold the state of this run "
                    f"({type(error).__name__}: {brief(error)}): it was written by another version or with other settings; "
                    "start a new run with another --out"
                ) from error
            check_length(self.config, self.run_dir, self.step)
        budget = self.saver.reserve(self.parts, runs) if self.ranks is None or self.ranks.rank == 0 else 0
        self._folder = self.run_dir.stat().st_ino
        self.write_config()
        enter, config = self._stack.enter_context, self.config
        self.writer = enter(MetricsWriter(self.run_dir, config, None if loaded is None else self.step))
        # Closed before the log: what became of the last write is in it.
        enter(self.saver.begin(self.writer))
        sinks = self.source.sinks if isinstance(self.source, ActivationStream) else None
        self.writer.write_event("data", {"source": self.parts.data.kind} | ({} if sinks is None else {"sinks": sinks}))
        if begun is not None:
            self.writer.write_event("begun_from", begun)
        self.writer.write_event("checkpoint_budget", {"bytes_each_at_most": budget})
        self.bar = ProgressBar(config.training.steps, self.step, config.logging.progress)
        self._stack.callback(self.bar.close)
        for layer in self.layers:
            layer.transcoder.train()

    def _stateful(self) -> dict[str, Stateful]:
        found: dict[str, Stateful] = {"source": self.source, "ledger": self.parts.ledger, "bad_steps": self.bad_steps}
        for parts in [layer.parts for layer in self.layers] + [observer.parts for observer in self.observers]:
            found |= parts
        return found

    def _restore(self, loaded: Loaded) -> None:
        tree = loaded.trainer_tree
        (layer,) = self.layers
        layer.transcoder.load_state_dict(loaded.model)
        restore_parts(self._stateful(), tree)
        if layer.regularizer is not None:
            layer.regularizer.set_metrics(tree.get("regularizer_metrics", {}))
        self.tokens, self.step = int(tree["tokens"]), loaded.step
        self.saver.saved_step = loaded.step

    def save(self, metric: float | None = None, wait: bool = False) -> None:
        """Save the state of this step, see `Saver.save`."""
        (layer,) = self.layers
        # Terms that are not evaluated at every step are logged and filed with their last values.
        metrics = {} if layer.regularizer is None else layer.regularizer.metrics()
        more = {"tokens": self.tokens, "regularizer_metrics": metrics}
        shape, latest = layer.transcoder.config.to_dict(), self.parts.evaluation.latest
        summary = {"transcoder": shape, "config": self.config.to_dict(), **latest}
        model = dict(layer.transcoder.state_dict())
        if self.ranks is None:
            self.saver.save(self.step, model, lambda: trainer_tree(self._stateful(), more), summary, metric, wait)
            return
        # All processes give their streams; the first one writes.
        tree = trainer_tree(self._stateful(), more)
        if self.ranks.rank == 0:
            self.saver.save(self.step, model, lambda: tree, summary, metric, wait)

    def leave(self) -> None:
        """Take no more of a stream that other layers read too."""
        if isinstance(self.source, ActivationStream):
            self.source.close()

    def rescue(self) -> None:
        """The run is about to fail for a reason of its data or files: what was trained since the last checkpoint is kept."""
        try:
            self.catch_up()
            self.save(wait=True)
        except Exception as error:
            logger.warning("the state of step %d could not be saved: %s", self.step, error)

    def write(self, what: str, write: Callable[[], object]) -> None:
        """A file that cannot be written now (a full disk) costs a warning: the next interval tries again."""
        try:
            write()
        except OSError as error:
            self._refused_step = self.step
            logger.warning("%s of step %d could not be written: %s; training goes on", what, self.step, error)
            self.writer.write_event("write_failed", {"what": what, "error": str(error)})

    def write_config(self) -> None:
        replace_atomically(self.run_dir / "config.yaml", self.config.to_yaml())

    def files_are_whole(self) -> bool:
        """No file of this step was refused, and the folder is the one that the run began in: it was not deleted meanwhile."""
        try:
            return self._refused_step != self.step and self.run_dir.stat().st_ino == self._folder
        except OSError:
            return False
