"""What a run's newest checkpoint tells of its latents, read without torch: how often each fired, the nearest decoder rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from transcoder.checkpoint_folder import (
    MODEL_FILE,
    TRAINER_FILE,
    CheckpointError,
    candidates,
    read_state,
)
from transcoder.reporting.parts import RunPartMissingError

NEIGHBOURS = 8
MOST_PRODUCTS = 4e11
"""Multiplications that looking for neighbours may take: about ten seconds of one core."""
TILE_ROWS = 256


class Firings(NamedTuple):
    """How often latents fired in the monitor's last full block and the one in progress.

    Fields:
        counts: [d_sae] int64, tokens on which each latent fired.
        tokens: tokens that were looked at.
    """

    counts: NDArray[np.int64]
    tokens: int


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """One checkpoint. Tensors are read one by one when asked for; one that cannot be read is a RunPartMissingError.

    Fields:
        path: the checkpoint's folder.
        step: the training step of it.
    """

    path: Path
    step: int
    _monitor: Any

    @cached_property
    def decoder(self) -> NDArray[np.float32]:
        """[d_sae, d_out] float32: a latent is a row."""
        return self._tensor(MODEL_FILE, "W_dec").astype(np.float32, copy=False)

    @property
    def firings(self) -> Firings:
        """Raises: RunPartMissingError: the correlation monitor, which counts them, was off or saw no token."""
        if self.known_firings is None:
            off = "was switched off" if self._monitor is None else f"had seen no token yet at step {self.step}"
            raise RunPartMissingError(
                f"checkpoint {str(self.path)!r} has no firing counts: the correlation monitor, which counts them, {off}"
            )
        return self.known_firings

    @cached_property
    def known_firings(self) -> Firings | None:
        """`firings`, or None where no monitor counted any."""
        monitor = self._monitor if isinstance(self._monitor, Mapping) else {}
        parts = [name for name in ("block", "past") if name in monitor]
        tokens = sum(int(monitor[name]["tokens_offered"]) for name in parts)
        if tokens == 0:
            return None
        counts = [self._tensor(TRAINER_FILE, f"monitor/{name}/moments/count").astype(np.int64) for name in parts]
        return Firings(np.sum(counts, axis=0), tokens)

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

    def _tensor(self, file: str, name: str) -> NDArray[Any]:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path / file, framework="np") as tensors:
                found: NDArray[Any] = tensors.get_tensor(name)
                return found
        except (OSError, ValueError, SafetensorError) as error:
            # A run that goes on deletes its older checkpoints.
            raise RunPartMissingError(
                f"checkpoint {str(self.path)!r}: {name} of {file} cannot be read: {error}; "
                "run.refresh() looks for the newest checkpoint again"
            ) from error


def newest_readable(run_dir: Path) -> Checkpoint | None:
    """The newest checkpoint whose state and counts can be read, or None; its checksums are not looked at."""
    for _, path in candidates([run_dir / "checkpoints"]):
        try:
            found = read_checkpoint(path)
            found.known_firings  # noqa: B018 - reads the counts: they may be lacking where the state is whole
            return found
        except (OSError, ValueError, LookupError, CheckpointError):
            # Of another version, or half deleted by the run that goes on: an older one may do.
            continue
    return None


def read_checkpoint(path: Path) -> Checkpoint:
    """The checkpoint in a folder, see `checkpoint_folder.read_state` for what it raises."""
    state = read_state(path)
    return Checkpoint(path, int(state["step"]), state["trainer"].get("monitor"))
