"""What a checkpoint holds of a run besides the weights, and how it is put back."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any, Protocol

logger = logging.getLogger(__name__)

STATE_VERSION = 2
"""Of the parts' states. 1, or none given: before 2026-11-21; the monitor's evidence had no error of its own."""
WATCHING = ("baseline", "monitor", "samples")
"""Parts that only look at training. They can start from nothing, and take most of a state's bytes."""


class Stateful(Protocol):
    """A part of a run that has a state: nested dicts and lists, tensors or JSON values at the leaves."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


def trainer_tree(parts: Mapping[str, Stateful], more: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that a bitwise resume needs besides the transcoder's own tensors: the state of each part by its name, and
    `more`, which the trainer itself puts back."""
    return {**{name: part.state_dict() for name, part in parts.items()}, **more, "version": STATE_VERSION}


def essential_tree(tree: Mapping[str, Any]) -> dict[str, Any]:
    """The part of `trainer_tree`'s result that a run cannot go on without: moments, counters and the place in the data.

    A run resumed from it trains on, but not to the same bits: what is left out starts from nothing.
    """
    kept = {name: part for name, part in tree.items() if name not in WATCHING}
    return {**kept, "source": _without_rows(kept["source"]), "essential": True}


def _without_rows(source: Mapping[str, Any]) -> dict[str, Any]:
    """Of an activation stream, the state in which its rows are made again from the place behind them, which are then not
    trained on."""
    if "streams" in source:
        return {"streams": {name: _without_rows(stream) for name, stream in source["streams"].items()}}
    if "buffer" not in source:
        return dict(source)
    return {**source, "pending": {}, "peeked": {}, "buffer": {**source["buffer"], "rows": {}}}


def restore_parts(parts: Mapping[str, Stateful], tree: Mapping[str, Any]) -> None:
    """Put back what `trainer_tree`, or `essential_tree`, holds of each part.

    Raises: KeyError, ValueError and others where the tree is not of such a run.
    """
    essential, version = bool(tree.get("essential", False)), int(tree.get("version", 1))
    for name, part in parts.items():
        if essential and name in WATCHING:
            continue
        # Checkpoints from before bad steps were skipped have none.
        state = tree.get(name, {"count": 0, "last": []}) if name == "bad_steps" else tree[name]
        try:
            part.load_state_dict(state)
        except ValueError as error:
            if version >= STATE_VERSION or name not in WATCHING:
                raise
            logger.warning("%s begins anew: the checkpoint is of an earlier version (%s)", name, error)
    if essential:
        logger.warning(
            "this checkpoint was written when the disk was full and holds the essential state: the rows in the shuffle buffer, "
            "the linear baseline, monitor and samples start from nothing"
        )
