"""What a run's newest checkpoint tells of its latents without torch: how often each fired, and whose decoder rows are near."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.checkpoint_folder import MODEL_FILE, TRAINER_FILE, CheckpointError, candidates, read_state

NEIGHBOURS = 8
MOST_PRODUCTS = 4e11
"""Multiplications that looking for neighbours may take: about ten seconds of one core."""
TILE_ROWS = 256


@dataclass(frozen=True, eq=False)
class CheckpointFacts:
    """Fields:
    step: of the checkpoint.
    fired: [d_sae] int64, tokens each latent fired on in the monitor's last block or two; None without a monitor.
    tokens: tokens looked at for that.
    """

    step: int
    fired: NDArray[np.int64] | None
    tokens: int
    _path: Path

    def neighbours(self, latents: Sequence[int]) -> dict[int, list[tuple[int, float]]]:
        """Of each latent the others whose decoder rows point most nearly the same way, (id, cosine), nearest first.

        Of the first so many `latents` only where all would take too long (`MOST_PRODUCTS`).
        """
        rows = read_tensor(self._path / MODEL_FILE, "W_dec").astype(np.float32, copy=False)
        d_sae, d_out = rows.shape
        unit = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
        asked = [i for i in latents if 0 <= i < d_sae][: int(MOST_PRODUCTS // (d_sae * d_out))]
        count = min(NEIGHBOURS, d_sae - 1)
        found: dict[int, list[tuple[int, float]]] = {}
        for begin in range(0, len(asked), TILE_ROWS) if count > 0 else ():
            tile = asked[begin : begin + TILE_ROWS]
            cosine = unit[tile] @ unit.T
            cosine[np.arange(len(tile)), tile] = -np.inf
            best = np.argpartition(-cosine, count - 1, axis=1)[:, :count]
            for n, latent in enumerate(tile):
                near = best[n][np.argsort(-cosine[n, best[n]], kind="stable")]
                found[latent] = [(int(i), float(cosine[n, i])) for i in near]
        return found


def read_checkpoint_facts(run_dir: Path) -> CheckpointFacts:
    """Of the newest checkpoint whose state can be read; its checksums are left to those who go on from it.

    Raises:
        ValueError: there is none; the message says so.
    """
    for _, path in candidates([run_dir / "checkpoints"]):
        try:
            state = read_state(path)
            fired, tokens = read_firings(path, state["trainer"].get("monitor"))
            return CheckpointFacts(int(state["step"]), fired, tokens, path)
        except (OSError, ValueError, KeyError, CheckpointError):
            # Of another version, half deleted by the run that goes on: an older one may do.
            continue
    raise ValueError("checkpoints/ holds none that can be read")


def read_firings(path: Path, monitor: Any) -> tuple[NDArray[np.int64] | None, int]:
    """[d_sae] int64 tokens that each latent fired on, and the tokens looked at; (None, 0) where no monitor counted any.

    Args:
        path: the checkpoint's folder.
        monitor: the monitor's part of its state.
    """
    if not isinstance(monitor, Mapping):
        return None, 0
    parts = [name for name in ("block", "past") if name in monitor]
    tokens = sum(int(monitor[name]["tokens_offered"]) for name in parts)
    if tokens == 0:
        return None, 0
    counts = [read_tensor(path / TRAINER_FILE, f"monitor/{name}/moments/count").astype(np.int64) for name in parts]
    return np.sum(counts, axis=0), tokens


def read_tensor(file: Path, name: str) -> NDArray[Any]:
    """One tensor of a safetensors file. Raises: OSError, ValueError: the file or the tensor cannot be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np") as tensors:
            found: NDArray[Any] = tensors.get_tensor(name)
            return found
    except SafetensorError as error:
        raise ValueError(f"{file.name}: {error}") from error
