"""When a run's state goes to the disk: while training waits, or from a copy of it while training goes on."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import wait as wait_for
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from transcoder.checkpoint_folder import CheckpointError
from transcoder.config import RunConfig
from transcoder.reporting import MetricsWriter
from transcoder.tensor_file import tensor_bytes
from transcoder.training.checkpoint import CheckpointStore
from transcoder.training.disk_space import CHECKPOINT_SLACK, log_bytes
from transcoder.training.run_state import essential_tree
from transcoder.training.state_tree import Snapshots, pack_state

if TYPE_CHECKING:
    from transcoder.training.run_parts import RunParts

logger = logging.getLogger(__name__)

STATE_SLACK = 1 << 20
"""Bytes for what the bound of a checkpoint does not count one by one."""
FLUSH_SECONDS = 600.0
"""The longest wait for a write in the background: at a signal, at the end, and before the next one begins."""


class Saver(contextlib.AbstractContextManager["Saver"]):
    """The checkpoints of one run.

    With `checkpoint.asynchronous` a save copies the state (a consistent one: the copy is complete before the next step can
    change anything) and a thread writes it, at most one at a time; its outcome is reported at the next step. The files are the
    same, to the bit, as those of a save that training waits for.
    """

    def __init__(self, store: CheckpointStore, config: RunConfig) -> None:
        self.store, self._config = store, config
        self._writer: MetricsWriter
        self.saved_step = -1
        """Step of the newest checkpoint that is known to be on the disk."""
        self._in_writing: Future[Path] | None = None
        self._snapshots = Snapshots()
        self._step_in_flight = -1

    def reserve(self, parts: RunParts, runs: int = 1) -> int:
        """Check that the files of this run, and of as many like it as there are `runs`, will fit; hold room for its last state.
        Returns what a checkpoint takes at most.

        Raises:
            CheckpointError: they will not; with the settings that would fit.
        """
        section, source = self._config.checkpoint, parts.data.source
        weights = STATE_SLACK
        for layer in parts.layers:
            # Adam keeps two moments a parameter.
            moments = 2 * sum(p.numel() * p.element_size() for p in layer.transcoder.parameters())
            weights += _packed_bytes(dict(layer.transcoder.state_dict())) + moments
        bounded = [source, *(part for part in (parts.monitor, parts.samples) if part is not None)]
        baseline = _packed_bytes(parts.evaluation.baseline.state_dict())
        whole = weights + baseline + sum(part.state_bytes_at_most() for part in bounded)
        reserve = weights + source.essential_bytes_at_most() + CHECKPOINT_SLACK if section.reserve else 0
        samples = 0 if parts.samples is None else parts.samples.state_bytes_at_most()
        others = runs * (log_bytes(self._config, samples) + reserve)
        self.store.check_space(runs * whole, self._config.training.steps, others)
        self.store.hold_reserve(reserve)
        return whole

    def begin(self, writer: MetricsWriter) -> Saver:
        """Events go to this log from now on."""
        self._writer = writer
        return self

    def save(
        self,
        step: int,
        model: Mapping[str, Tensor],
        tree: Callable[[], dict[str, Any]],
        summary: Mapping[str, Any],
        metric: float | None = None,
        wait: bool = False,
    ) -> None:
        """Save the state of `step`, unless it is saved.

        Args:
            model: the transcoder's state.  tree: gives the rest of the run's state.  summary: for readers of the folder.
            metric: held-out FVU of this state, where it was just taken.
            wait: no later one comes: return when it is on the disk, and raise where it cannot be. So for the last step's.

        Raises:
            CheckpointError: see `wait`.  Otherwise a failure is a warning, and the next interval tries again.
        """
        wait = wait or step >= self._config.training.steps
        if not self.flush():
            message = f"a checkpoint has been in writing for {FLUSH_SECONDS:g} s"
            if wait:
                raise CheckpointError(f"{message}: the state of step {step} cannot be written behind it")
            logger.warning("%s; that of step %d is left out", message, step)
            return
        if step == self.saved_step:
            return
        # The lines up to here must be on disk first: a resumed run drops those after its step and writes them again.
        self._writer.flush()
        state, arrived = (tree(), dict(model)), None
        in_background = self._config.checkpoint.asynchronous and not wait
        if in_background:
            state, arrived = self._snapshots.take(state)
        self._step_in_flight = step

        def write() -> Path:
            if arrived is not None:
                arrived()
            return self.store.save(step, state[1], state[0], dict(summary), metric, essential_tree, wait)

        if not in_background:
            self._settle(write, wait)
            return
        future: Future[Path] = Future()

        def run() -> None:
            try:
                future.set_result(write())
            except BaseException as error:
                future.set_exception(error)

        # A daemon: a write that never ends (a dead network disk) must not keep the process from ending.
        threading.Thread(target=run, name="transcoder-checkpoint", daemon=True).start()
        self._in_writing = future

    def flush(self, seconds: float | None = None) -> bool:
        """Wait for the write in the background, and report how it ended. False where it has not ended in time."""
        future = self._in_writing
        if future is not None and wait_for([future], FLUSH_SECONDS if seconds is None else seconds).done:
            self._in_writing = None
            self._settle(future.result, False)
        return self._in_writing is None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Wait for the write in the background, except at a second Ctrl-C, and give up the reserve."""
        if not self.flush(None if kind is None or issubclass(kind, Exception) else 0.0):
            logger.warning("the checkpoint of step %d was still being written when the run ended", self._step_in_flight)
        self.store.reserve.release()

    def _settle(self, outcome: Callable[[], Path], must: bool) -> None:
        step = self._step_in_flight
        try:
            path = outcome()
        except CheckpointError as error:
            if must:
                raise
            logger.warning("%s; training goes on, the next try is at the next interval", error)
            self._writer.write_event("checkpoint_failed", {"error": str(error)}, step)
            return
        self.saved_step = step
        said = {"step": step, "folder": path.name, **({"essential": True} if self.store.degraded else {})}
        self._writer.write_event("checkpoint", said, step)
        if self._config.logging.wandb_upload_checkpoints:
            self._writer.upload_checkpoint(path, step)


def _packed_bytes(state: object) -> int:
    return tensor_bytes(pack_state(state)[0])
