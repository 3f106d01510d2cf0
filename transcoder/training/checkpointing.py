"""When a run's state goes to the disk: in the step, or beside training from a copy of it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Protocol

from transcoder.antidup import ActivationSampleCollector, CorrelationMonitor
from transcoder.config import RunConfig
from transcoder.reporting import MetricsWriter
from transcoder.tensor_file import tensor_bytes
from transcoder.training.background_task import Beside
from transcoder.training.checkpoint import CheckpointError, CheckpointStore, pack_state
from transcoder.training.disk_budget import SLACK, log_bytes
from transcoder.training.run_state import Parts, essential_tree, trainer_tree
from transcoder.training.snapshot import Snapshots

logger = logging.getLogger(__name__)

STATE_SLACK = 1 << 20
"""Bytes for what the bound of a checkpoint does not count one by one."""
FLUSH_SECONDS = 600.0
"""The longest wait for a write beside training: at a signal, at the end, and before the next one begins."""


class Run(Parts, Protocol):
    config: RunConfig
    step: int
    writer: MetricsWriter
    monitor: CorrelationMonitor | None
    samples: ActivationSampleCollector | None


class Saver:
    """The checkpoints of one run.

    With `checkpoint.asynchronous` a save copies the state (a consistent one: the copy is complete before the next step can
    change anything) and a thread writes it, at most one at a time; what became of it is told at the next step. The files are
    the same, to the bit, as those of a save that training waits for.
    """

    def __init__(self, run: Run, store: CheckpointStore) -> None:
        self._run, self._store = run, store
        self.saved_step = -1
        """Step of the newest checkpoint that is known to be on the disk."""
        self._beside: Beside[Path] = Beside("transcoder-checkpoint")
        self._snapshots = Snapshots()
        self._step_in_flight = -1

    def begin(self) -> int:
        """Check that the run's files will fit, and hold room for its last state. Returns what a checkpoint takes at most.

        Raises:
            CheckpointError: they will not; with the settings that would fit.
        """
        run, section = self._run, self._run.config.checkpoint
        parameters = sum(p.numel() * p.element_size() for p in run.transcoder.parameters())
        # Adam keeps two moments a parameter.
        weights = self._packed_bytes(dict(run.transcoder.state_dict())) + 2 * parameters + STATE_SLACK
        parts = [run.source, *(part for part in (run.monitor, run.samples) if part is not None)]
        whole = weights + self._packed_bytes(run.baseline.state_dict()) + sum(p.state_bytes_at_most() for p in parts)
        reserve = weights + run.source.essential_bytes_at_most() + SLACK if section.reserve else 0
        samples = 0 if run.samples is None else run.samples.state_bytes_at_most()
        self._store.check_space(whole, run.config.training.steps, log_bytes(run.config, samples) + reserve)
        self._store.hold_reserve(reserve)
        return whole

    @staticmethod
    def _packed_bytes(state: object) -> int:
        return tensor_bytes(pack_state(state)[0])

    def save(self, metric: float | None = None, wait: bool = False) -> None:
        """Save the state of the run's present step, unless it is saved.

        Args:
            metric: held-out FVU of this state, where it was just taken.
            wait: no later one comes: return when it is on the disk, and raise where it cannot be. So for the last step's.

        Raises:
            CheckpointError: see `wait`.  Otherwise a failure is a warning, and the next interval tries again.
        """
        run, step = self._run, self._run.step
        wait = wait or step >= run.config.training.steps
        if not self.flush():
            message = f"a checkpoint has been in writing for {FLUSH_SECONDS:g} s"
            if wait:
                raise CheckpointError(f"{message}: the state of step {step} cannot be written behind it")
            logger.warning("%s; that of step %d is left out", message, step)
            return
        if step == self.saved_step:
            return
        # The lines up to here must be on disk first: a resumed run drops those after its step and writes them again.
        run.writer.flush()
        summary = {"transcoder": run.transcoder.config.to_dict(), "config": run.config.to_dict(), **run.evaluation}
        tree, model = trainer_tree(run), dict(run.transcoder.state_dict())
        self._step_in_flight = step
        if wait or not run.config.checkpoint.asynchronous:
            self._settle(lambda: self._store.save(step, model, tree, summary, metric, essential_tree, wait), wait)
            return
        (tree, model), arrived = self._snapshots.take((tree, model))

        def write() -> Path:
            arrived()
            return self._store.save(step, model, tree, summary, metric, essential_tree)

        self._beside.start(write)

    def look(self) -> None:
        """Tell what became of a write beside training, if it has ended. Waits for nothing."""
        if self._beside.busy:
            self.flush(0.0)

    def flush(self, seconds: float | None = None) -> bool:
        """Wait for the write beside training, and tell what became of it. False where it has not ended in time."""
        if self._beside.busy:
            self._settle(lambda: self._beside.collect(FLUSH_SECONDS if seconds is None else seconds), False)
        return not self._beside.busy

    def __enter__(self) -> Saver:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left in writing, and no space is held. A second Ctrl-C waits for nothing."""
        if not self.flush(None if kind is None or issubclass(kind, Exception) else 0.0):
            logger.warning("the checkpoint of step %d was still being written when the run ended", self._step_in_flight)
        self._store.reserve.release()

    def _settle(self, outcome: Callable[[], Path | None], must: bool) -> None:
        run, step = self._run, self._step_in_flight
        try:
            path = outcome()
        except CheckpointError as error:
            if must:
                raise
            logger.warning("%s; training goes on, the next try is at the next interval", error)
            run.writer.write_event("checkpoint_failed", {"error": str(error)}, step)
            return
        if path is None:
            return
        self.saved_step = step
        said = {"step": step, "folder": path.name, **({"essential": True} if self._store.degraded else {})}
        run.writer.write_event("checkpoint", said, step)
        if run.config.logging.wandb_upload_checkpoints:
            run.writer.upload_checkpoint(path, step)
