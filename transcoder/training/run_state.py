"""What a checkpoint holds of a run beside the weights, and how it is put back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from transcoder.antidup import DiversityRegularizer
from transcoder.model import Transcoder
from transcoder.training.baselines import LinearBaseline
from transcoder.training.meters import Meters
from transcoder.training.nonfinite import BadSteps
from transcoder.training.sources import Source

logger = logging.getLogger(__name__)

STATE_VERSION = 2
"""Of what the parts keep. 1, or none given: before 2026-11-21; the monitor's evidence had no error of its own."""
STATEFUL_PARTS = ("regularizer", "positions", "monitor", "samples", "recycler")
ESSENTIAL_PARTS = ("regularizer", "positions", "recycler")
"""Those of a few bytes a latent at most. The others can begin anew: they watch."""
_BEGINS_ANEW = "the rows in the shuffle buffer, the linear baseline, monitor and samples"


class Parts(Protocol):
    """The parts of a run that have a state; of those in `STATEFUL_PARTS` any may be None."""

    device: torch.device
    transcoder: Transcoder
    optimizer: Any
    source: Source
    baseline: LinearBaseline
    meters: Meters
    ledger: Any
    bad_steps: BadSteps
    regularizer: DiversityRegularizer | None
    evaluation: dict[str, float]
    tokens: int


def trainer_tree(run: Parts) -> dict[str, Any]:
    """Everything that a bitwise resume needs beside the transcoder's own tensors."""
    parts: dict[str, Any] = {
        "optimizer": run.optimizer.state_dict(),
        "source": run.source.state_dict(),
        "baseline": run.baseline.state_dict(),
        "meters": run.meters.state_dict(),
        "ledger": run.ledger.state_dict(),
        "evaluation": run.evaluation,
        "tokens": run.tokens,
        "bad_steps": run.bad_steps.state_dict(),
        "version": STATE_VERSION,
    }
    for name in STATEFUL_PARTS:
        part = getattr(run, name)
        if part is not None:
            parts[name] = part.state_dict()
    # Terms that are not evaluated at every step are logged and filed with their last figures.
    parts["regularizer_metrics"] = {} if run.regularizer is None else run.regularizer.metrics()
    return parts


def essential_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """What of `trainer_tree`'s result a run cannot go on without: moments, counters and the place in the data.

    A run resumed from it trains on, but not to the same bits: what is left out begins anew.
    """
    left_out = {"baseline", *(set(STATEFUL_PARTS) - set(ESSENTIAL_PARTS))}
    kept = {name: part for name, part in tree.items() if name not in left_out}
    source = dict(kept["source"])
    if "buffer" in source:
        # An activation stream: its rows are made again from the place behind them, which are then not trained on.
        source |= {"pending": {}, "peeked": {}, "buffer": {**source["buffer"], "rows": {}}}
    return {**kept, "source": source, "essential": True}


def _restore_part(name: str, part: Any, tree: Mapping[str, Any]) -> None:
    try:
        part.load_state_dict(tree[name])
    except ValueError as error:
        # What watches can begin anew where an earlier version wrote down something else.
        if int(tree.get("version", 1)) >= STATE_VERSION or name in ESSENTIAL_PARTS:
            raise
        logger.warning("%s begins anew: the checkpoint is of an earlier version (%s)", name, error)


def restore(run: Parts, model: Mapping[str, Tensor], tree: Mapping[str, Any]) -> None:
    """Put back what `trainer_tree`, or `essential_tree`, gave."""
    essential = bool(tree.get("essential", False))
    run.transcoder.load_state_dict(model)
    run.optimizer.load_state_dict(tree["optimizer"])
    run.source.load_state_dict(tree["source"])
    run.meters.load_state_dict(tree["meters"], run.device)
    run.ledger.load_state_dict(tree["ledger"])
    run.evaluation = dict(tree["evaluation"])
    run.tokens = int(tree["tokens"])
    # Checkpoints from before bad steps were skipped have none.
    run.bad_steps.load_state_dict(tree.get("bad_steps", {"count": 0, "last": []}))
    if not essential:
        run.baseline.load_state_dict(tree["baseline"])
    for name in ESSENTIAL_PARTS if essential else STATEFUL_PARTS:
        part = getattr(run, name)
        if part is not None:
            _restore_part(name, part, tree)
    if run.regularizer is not None:
        run.regularizer.set_metrics(tree.get("regularizer_metrics", {}))
    if essential:
        logger.warning(
            "this checkpoint was written when the disk was full and holds the essential state: %s begin anew",
            _BEGINS_ANEW,
        )
