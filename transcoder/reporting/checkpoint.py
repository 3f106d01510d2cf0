"""The decoder of a run's newest checkpoint and its nearest rows, read without torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.checkpoint_folder import (
    MODEL_FILE,
    CheckpointError,
    candidates,
    read_state,
)
from transcoder.reporting.parts import RunPartMissingError

NEIGHBOURS = 8
MOST_PRODUCTS = 4e11
"""Multiplications that looking for neighbours may take: about ten seconds of one core."""
TILE_ROWS = 256


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One checkpoint. Tensors are read one by one when asked for; one that cannot be read is a RunPartMissingError.

    Fields:
        path: the checkpoint's folder.
        step: the training step of it.
    """

    path: Path
    step: int

    @cached_property
    def decoder(self) -> NDArray[np.float32]:
        """[d_sae, d_out] float32: a latent is a row."""
        return self._tensor("W_dec").astype(np.float32, copy=False)

    def neighbours(self, latents: Sequence[int], count: int = NEIGHBOURS) -> dict[int, list[tuple[int, float]]]:
        """Of each latent the others whose decoder rows point most nearly the same way, (id, cosine), nearest first.

        Of the first so many `latents` only where all would take too long (`MOST_PRODUCTS`).
        """
        unit = self._unit_decoder
        asked = [i for i in latents if 0 <= i < len(unit)][: int(MOST_PRODUCTS // unit.size)]
        count = max(0, min(count, len(unit) - 1))
        found: dict[int, list[tuple[int, float]]] = {}
        for begin in range(0, len(asked), TILE_ROWS):
            tile = asked[begin : begin + TILE_ROWS]
            cosine = unit[tile] @ unit.T
            cosine[np.arange(len(tile)), tile] = -np.inf
            for latent, row in zip(tile, cosine, strict=True):
                near = np.argpartition(-row, count)[:count]
                near = near[np.argsort(-row[near], kind="stable")]
                found[latent] = [(int(i), float(row[i])) for i in near]
        return found

    @cached_property
    def _unit_decoder(self) -> NDArray[np.float32]:
        length = np.linalg.norm(self.decoder, axis=1, keepdims=True)
        unit: NDArray[np.float32] = self.decoder / np.maximum(length, np.finfo(np.float32).tiny)
        return unit

    def _tensor(self, name: str) -> NDArray[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / MODEL_FILE, framework="np") as tensors:
                found: NDArray[Any] = tensors.get_tensor(name)
                return found
        except (OSError, ValueError, SafetensorError) as error:
            # A run that goes on deletes its older checkpoints.
            raise RunPartMissingError(
                f"checkpoint {str(self.path)!r}: {name} of {MODEL_FILE} cannot be read: {error}; "
                "run.refresh() looks for the newest checkpoint again"
            ) from error


def newest_readable(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose state can be read, or None; its checksums are not looked at."""
    for _, path in candidates([run_dir / "checkpoints"]):
        try:
            return read_checkpoint(path)
        except (OSError, ValueError, CheckpointError):
            # Of another version, or half deleted by the run that goes on: an older one may do.
            continue
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, see `checkpoint_folder.read_state` for what it raises."""
    state = read_state(path)
    return Checkpoint(path, int(state["step"]))
