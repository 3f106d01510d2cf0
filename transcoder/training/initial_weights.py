"""Weights that exist are a beginning: a transcoder that was trained or imported, put into a new run's units."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from transcoder.activations import ActivationBatch
from transcoder.checkpoint_folder import STATE_FILE, candidates, find_checkpoint
from transcoder.config import ConfigError
from transcoder.files import local_path
from transcoder.model import Transcoder
from transcoder.training.evaluation import evaluate

logger = logging.getLogger(__name__)

SAME_NORM = 1e-4
"""Relative difference up to which decoder rows count as equally long."""


def begin_from(transcoder: Transcoder, path: str, heldout: Sequence[ActivationBatch]) -> dict[str, float | str]:
    """Give a fresh `transcoder`, whose normalisation is fitted, the function of the weights at `path`.

    The function stays the same in exact arithmetic where both select alike, except that TopK of decoder rows of unequal length
    selects by what an activation contributes (value times length), since training keeps the rows at unit norm.

    Args:
        path: a run folder (its newest good checkpoint), a checkpoint, a saved or imported transcoder, or the hub's org/name.
        heldout: what the weights are evaluated on before the first step; may be empty.

    Returns: the record of it: where from, and the held-out metrics.

    Raises:
        ConfigError: the dictionary has another shape; it names the settings that fit.
        FileNotFoundError, ValueError, CheckpointError: there are no such weights, or they are torn.
    """
    folder = local_path(path, "training.init_from")
    of_a_run = (folder / STATE_FILE).is_file() or candidates([folder / "checkpoints", folder])
    # A hub's name is no path: from_pretrained tells the two apart.
    given = Transcoder.from_pretrained(find_checkpoint(folder) if of_a_run else path)
    _check_shape(given, transcoder, path)
    notes = _put(given, transcoder)
    found: dict[str, float | str] = {"init_from": path, **(evaluate(transcoder, heldout) if heldout else {})}
    fvu = f", held-out FVU {found['evaluation/fvu']:.4g}" if heldout else ""
    logger.warning("begins from the weights of %s%s%s", path, fvu, "".join(f"; {note}" for note in notes))
    return found


def _check_shape(given: Transcoder, transcoder: Transcoder, path: str) -> None:
    have, want = given.config, transcoder.config
    where = {"d_in": "activations.source_hook", "d_out": "activations.target_hook"}
    wrong = [
        f"{name} {getattr(have, name)}, this run {getattr(want, name)} ({where.get(name, f'transcoder.{name}')})"
        for name in ("d_in", "d_out", "d_sae", "skip")
        if getattr(have, name) != getattr(want, name)
    ]
    if wrong:
        raise ConfigError(
            f"training.init_from: the weights of {path} have {'; '.join(wrong)}: give these settings the values of the weights"
        )


@torch.no_grad()
def _put(given: Transcoder, transcoder: Transcoder) -> list[str]:
    """Copy the weights, each function of raw activations kept: `pre` stays as it is up to the length of the decoder row, which
    moves into the encoder. Returns what a reader should know."""
    old = {name: tensor.detach().double().cpu() for name, tensor in given.state_dict().items()}
    new = {name: tensor.detach().double().cpu() for name, tensor in transcoder.state_dict().items()}
    into = new["target_scale"] / old["target_scale"]
    shift = (new["source_mean"] - old["source_mean"]) * old["source_scale"]
    lengths = old["W_dec"].norm(dim=1) * into
    alive = torch.where(lengths > 0, lengths, torch.ones_like(lengths))
    weights = {
        "W_enc": old["W_enc"] * (old["source_scale"] / new["source_scale"] * alive[:, None]),
        "b_enc": (old["b_enc"] + old["W_enc"] @ shift) * alive,
        "W_dec": old["W_dec"] * into / alive[:, None],
        "b_dec": old["b_dec"] * into + (old["target_mean"] - new["target_mean"]) * new["target_scale"],
    }
    if given.W_skip is not None:
        weights["W_skip"] = old["W_skip"] * (into * old["source_scale"] / new["source_scale"])
        weights["b_dec"] += old["W_skip"] @ shift * into
    notes = []
    even = bool(((lengths - lengths.mean()).abs() <= SAME_NORM * lengths.mean()).all())
    threshold = old["threshold"]
    by_latent = threshold.clamp_min(0).expand(len(alive)) * alive
    if bool((threshold < 0).all()):
        pass  # no batch has set it: it starts unset
    elif new["threshold"].dim() == 1:
        weights["threshold"] = by_latent
    elif even:
        weights["threshold"] = by_latent.mean()
        if threshold.dim() == 1 and bool((threshold != threshold[0]).any()):
            notes.append("its thresholds of single latents become their mean, one threshold that training moves")
    if not even and not (given.selection.by_threshold and transcoder.selection.by_threshold):
        notes.append(
            "its decoder rows have different lengths: they become 1, and a latent is selected by value times length"
        )
    was, now = given.config, transcoder.config
    if (was.activation, was.k) != (now.activation, now.k):
        notes.append(f"it was {was.activation} with k = {was.k}, this run is {now.activation} with k = {now.k}")
    own = transcoder.state_dict()
    for name, value in weights.items():
        own[name].copy_(value)
    return notes
