"""What training reads from: an activation stream, or any iterable of batches made to look like one."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch

from transcoder.activations import ActivationBatch
from transcoder.tensor_file import tensor_bytes
from transcoder.training.batch_checks import Layout, TrainingDataError, check_batch, check_values, tensors_of
from transcoder.training.state_tree import pack_state


class BatchSource(Protocol):
    """An endless iterator of batches with a state. `transcoder.activations.ActivationStream` is one."""

    d_in: int
    d_out: int

    def __next__(self) -> ActivationBatch: ...
    def look_ahead(self, tokens: int) -> list[ActivationBatch]: ...
    def state_bytes_at_most(self) -> int: ...
    def essential_bytes_at_most(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def counters(self) -> dict[str, float]: ...
    def decode_tokens(self, ids: Sequence[int]) -> list[str]: ...


class IterableSource:
    """A user's own iterable of ActivationBatch.

    Where it has `state_dict` and `load_state_dict` (and is its own iterator), it is rewound and resumed through them;
    otherwise batches that were looked at are kept and handed out again, and a resume is refused.

    The first batch is checked in full, every later one by types and shapes (no value is read in a step).

    Args:
        batches: the iterable.
        device: where its tensors are moved to.
        name: what errors call it.

    Raises:
        TypeError, TrainingDataError: naming the batch and the field; here for the first, at `next` for others.
    """

    def __init__(self, batches: Iterable[ActivationBatch], device: torch.device, name: str = "batches") -> None:
        if not isinstance(batches, Iterable):
            raise TypeError(f"{name}: expected an iterable of ActivationBatch, got {type(batches).__name__}")
        self._iterator, self._device, self._name = iter(batches), device, name
        self._stateful = all(callable(getattr(batches, n, None)) for n in ("state_dict", "load_state_dict"))
        self._origin: Any = batches
        self._returned: list[ActivationBatch] = []
        self._layout: Layout | None = None
        self._given = 0
        (first,) = self.look_ahead(1)
        check_values(first, f"{name}: the first batch")
        self.d_in, self.d_out = first.source.shape[1], first.target.shape[1]

    def __next__(self) -> ActivationBatch:
        if self._returned:
            return self._returned.pop(0)
        batch = next(self._iterator)
        where = f"{self._name}: batch {self._given}" if self._given else f"{self._name}: the first batch"
        self._layout = check_batch(batch, where, self._layout)
        self._given += 1
        return _moved(batch, self._device)

    def take(self, tokens: int) -> list[ActivationBatch]:
        """Whole batches holding at least `tokens`, or all there are; TrainingDataError where there is none."""
        taken: list[ActivationBatch] = []
        have = 0
        while have < tokens:
            try:
                taken.append(next(self))
            except StopIteration:
                break
            have += len(taken[-1])
        if not taken:
            raise TrainingDataError(f"{self._name}: expected at least one ActivationBatch, got an empty iterable")
        return taken

    def look_ahead(self, tokens: int) -> list[ActivationBatch]:
        """As `take`, and the batches will come again."""
        start = (self._origin.state_dict(), self._given) if self._stateful else None
        taken = self.take(tokens)
        if start is not None:
            self._origin.load_state_dict(start[0])
            self._given = start[1]
        else:
            self._returned = [*taken, *self._returned]
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"origin": self._origin.state_dict() if self._stateful else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self._stateful or state.get("origin") is None:
            raise TrainingDataError(
                "resume: these batches cannot go on where the run stopped: the iterable has no state_dict and "
                "load_state_dict; give it both, or start a new run"
            )
        self._origin.load_state_dict(state["origin"])

    def state_bytes_at_most(self) -> int:
        """What `state_dict` holds now: a user's iterable says nothing of how it grows."""
        tensors, _ = pack_state(self.state_dict())
        return tensor_bytes(tensors)

    def essential_bytes_at_most(self) -> int:
        return self.state_bytes_at_most()

    def counters(self) -> dict[str, float]:
        return {}

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(i) for i in ids]


def own_data(
    batches: Iterable[ActivationBatch], heldout: Sequence[ActivationBatch] | None, tokens: int, device: torch.device
) -> tuple[IterableSource, list[ActivationBatch]]:
    """(training source, held-out batches, checked in full) of a user's own batches; where `heldout` is None, the first
    `tokens` tokens are held out."""
    source = IterableSource(batches, device)
    if heldout is None:
        held = source.take(tokens)
    else:
        other = IterableSource(heldout, device, "heldout")
        if (other.d_in, other.d_out) != (source.d_in, source.d_out):
            raise TrainingDataError(
                f"heldout: expected source and target of the widths of `batches`, {source.d_in} and {source.d_out}, got "
                f"{other.d_in} and {other.d_out}"
            )
        held = other.take(sys.maxsize)
    for number, batch in enumerate(held):
        check_values(batch, f"heldout: batch {number}")
    return source, held


def _moved(batch: ActivationBatch, device: torch.device) -> ActivationBatch:
    """On the device, and cut off from the graph that made it: a step's backward must not walk into a language model."""
    moved: dict[str, Any] = {n: t.detach().to(device, non_blocking=True) for n, t in tensors_of(batch).items()}
    return replace(batch, **moved)
