"""What a run's newest good checkpoint tells of its latents: the decoder and how often each fired."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.checkpoint_folder import MODEL_FILE, CheckpointError, find_checkpoint, read_state
from transcoder.reporting.checkpoint_facts import read_firings, read_tensor
from transcoder.reporting.run_errors import RunPartMissingError
from transcoder.reporting.runfolder import RunFolder


@dataclass(frozen=True, eq=False)
class Firings:
    """How often latents fired in the monitor's last block that is full and the one in progress.

    Fields:
        counts: [d_sae] int64, tokens on which each latent fired.
        tokens: tokens that were looked at.
    """

    counts: NDArray[np.int64]
    tokens: int


class RunCheckpoint:
    """The newest checkpoint of a run folder whose checksums hold. Tensors are read one by one when asked for.

    Raises:
        RunPartMissingError: there is none, or none that is whole.
    """

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder
        try:
            self.path: Path = find_checkpoint(folder.path)
            self._state = read_state(self.path)
        except (OSError, ValueError, CheckpointError) as error:
            raise RunPartMissingError(f"run {str(folder.path)!r} has no checkpoint: {self._why(error)}") from error
        self.step = int(self._state["step"])

    @cached_property
    def decoder(self) -> NDArray[np.float32]:
        """[d_sae, d_out] float32: a latent is a row."""
        return self._read("decoder", lambda: read_tensor(self.path / MODEL_FILE, "W_dec")).astype(
            np.float32, copy=False
        )

    @cached_property
    def firings(self) -> Firings:
        """Raises: RunPartMissingError: the correlation monitor, which counts them, was off or saw no token."""
        monitor = self._state["trainer"].get("monitor")
        counts, tokens = self._read("firing counts", lambda: read_firings(self.path, monitor))
        if counts is None:
            off = "was switched off" if monitor is None else f"had seen no token yet at step {self.step}"
            why = f"the correlation monitor, which counts them, {off}"
            raise RunPartMissingError(f"run {str(self._folder.path)!r} has no firing counts: {why}")
        return Firings(counts, tokens)

    def _read(self, what: str, read: Callable[[], Any]) -> Any:
        try:
            return read()
        except (OSError, ValueError) as error:
            # A run that goes on deletes its older checkpoints.
            why = f"{self.path}: {error}; run.refresh() looks for the newest again"
            raise RunPartMissingError(f"run {str(self._folder.path)!r}: the {what} cannot be read: {why}") from error

    def _why(self, error: Exception) -> str:
        if not isinstance(error, FileNotFoundError):
            return str(error)
        every = self._folder.setting("checkpoint.every")
        when = "" if every is None else f" (the run writes one every {every} steps and at its end)"
        second = self._folder.setting("checkpoint.second_location")
        elsewhere = "" if second is None else f"; look into checkpoint.second_location, {second}"
        return f"checkpoints/ holds none{when}{elsewhere}"
