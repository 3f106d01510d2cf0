"""What training reads from: an activation stream, or any iterable of batches made to look like one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch
from transcoder.training.state_tree import pack_state
from transcoder.training.tensor_file import tensor_bytes


class Source(Protocol):
    """An endless iterator of batches with a state. `transcoder.activations.ActivationStream` is one."""

    d_in: int
    d_out: int

    def __next__(self) -> ActivationBatch: ...
    def look_ahead(self, tokens: int) -> list[ActivationBatch]: ...
    def state_bytes_at_most(self) -> int: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def counters(self) -> dict[str, float]: ...
    def decode_tokens(self, ids: Sequence[int]) -> list[str]: ...


class TrainingDataError(ValueError):
    """What came from the iterator of batches cannot be trained on, or ended too soon."""


class IterableSource:
    """A user's own iterable of ActivationBatch.

    Where it has `state_dict` and `load_state_dict` (and is its own iterator), it is rewound and resumed through them;
    otherwise batches that were looked at are kept and handed out again, and a resume is refused.
    """

    def __init__(self, batches: Iterable[ActivationBatch], device: torch.device) -> None:
        self._iterator, self._device = iter(batches), device
        self._stateful = all(callable(getattr(batches, n, None)) for n in ("state_dict", "load_state_dict"))
        self._origin: Any = batches
        self._returned: list[ActivationBatch] = []
        (first,) = self.look_ahead(1)
        if first.source.dim() != 2 or first.target.dim() != 2 or len(first) == 0:
            raise TrainingDataError(
                "batches: expected source [B, d_in] and target [B, d_out] with B >= 1, got "
                f"{list(first.source.shape)} and {list(first.target.shape)}"
            )
        self.d_in, self.d_out = first.source.shape[1], first.target.shape[1]

    def __next__(self) -> ActivationBatch:
        return self._returned.pop(0) if self._returned else _moved(next(self._iterator), self._device)

    def take(self, tokens: int) -> list[ActivationBatch]:
        """Whole batches holding at least `tokens`, or all there are; TrainingDataError where there is none."""
        taken: list[ActivationBatch] = []
        while sum(map(len, taken)) < tokens:
            try:
                taken.append(next(self))
            except StopIteration:
                break
        if not taken:
            raise TrainingDataError("batches: expected at least one ActivationBatch, got an empty iterable")
        return taken

    def look_ahead(self, tokens: int) -> list[ActivationBatch]:
        """As `take`, and the batches will come again."""
        start = self._origin.state_dict() if self._stateful else None
        taken = self.take(tokens)
        if self._stateful:
            self._origin.load_state_dict(start)
        else:
            self._returned = [*taken, *self._returned]
        return taken

    def state_dict(self) -> dict[str, Any]:
        return {"origin": self._origin.state_dict() if self._stateful else None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not self._stateful or state["origin"] is None:
            raise TrainingDataError(
                "resume: these batches cannot go on where the run stopped: the iterable has no state_dict and "
                "load_state_dict; give it both, or start a new run"
            )
        self._origin.load_state_dict(state["origin"])

    def state_bytes_at_most(self) -> int:
        """What `state_dict` holds now: a user's iterable says nothing of how it grows."""
        tensors, _ = pack_state(self.state_dict())
        return tensor_bytes(tensors)

    def counters(self) -> dict[str, float]:
        return {}

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(i) for i in ids]


def _moved(batch: ActivationBatch, device: torch.device) -> ActivationBatch:
    if batch.source.device == device:
        return batch
    parts: dict[str, Any] = {f.name: getattr(batch, f.name) for f in fields(batch)}
    moved: dict[str, Any] = {n: t.to(device, non_blocking=True) for n, t in parts.items() if isinstance(t, Tensor)}
    return replace(batch, **moved)
