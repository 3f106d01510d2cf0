"""What a run's newest good checkpoint tells of its latents: the decoder and how often each fired."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from transcoder.checkpoint_folder import MODEL_FILE, TRAINER_FILE, CheckpointError, find_checkpoint, read_state
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
        rows: NDArray[np.float32] = self._tensor(MODEL_FILE, "W_dec").float().numpy()
        return rows

    @cached_property
    def firings(self) -> Firings:
        """Raises: RunPartMissingError: the correlation monitor, which counts them, was off or saw no token."""
        monitor = self._state["trainer"].get("monitor")
        if not isinstance(monitor, Mapping):
            why = "the correlation monitor, which counts them, was switched off"
            raise RunPartMissingError(f"run {str(self._folder.path)!r} has no firing counts: {why}")
        parts = [name for name in ("block", "past") if name in monitor]
        tokens = sum(int(monitor[name]["tokens_offered"]) for name in parts)
        if tokens == 0:
            why = f"the monitor had seen no token yet at step {self.step}"
            raise RunPartMissingError(f"run {str(self._folder.path)!r} has no firing counts: {why}")
        counts = [self._tensor(TRAINER_FILE, f"monitor/{name}/moments/count") for name in parts]
        return Firings(torch.stack(counts).sum(0).numpy().astype(np.int64), tokens)

    def _tensor(self, file: str, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / file, framework="pt") as tensors:
                return tensors.get_tensor(name)
        except (OSError, SafetensorError) as error:
            # A run that goes on deletes its older checkpoints.
            why = f"{self.path / file}: {error}; run.refresh() looks for the newest again"
            raise RunPartMissingError(f"run {str(self._folder.path)!r}: {name} cannot be read: {why}") from error

    def _why(self, error: Exception) -> str:
        if not isinstance(error, FileNotFoundError):
            return str(error)
        every = self._folder.setting("checkpoint.every")
        when = "" if every is None else f" (the run writes one every {every} steps and at its end)"
        second = self._folder.setting("checkpoint.second_location")
        elsewhere = "" if second is None else f"; look into checkpoint.second_location, {second}"
        return f"checkpoints/ holds none{when}{elsewhere}"
