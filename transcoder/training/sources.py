"""What training reads from: an activation stream, or any iterable of batches made to look like one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

from transcoder.activations import ActivationBatch


class Source(Protocol):
    """An endless iterator of batches with a state. `transcoder.activations.ActivationStream` is one."""

    d_in: int
    d_out: int

    def __next__(self) -> ActivationBatch: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
    def counters(self) -> dict[str, float]: ...
    def decode_tokens(self, ids: Sequence[int]) -> list[str]: ...


class IterableSource:
    """A user's own iterable of ActivationBatch.

    Where it has `state_dict` and `load_state_dict` (and is its own iterator), it is rewound and resumed through them;
    otherwise batches that were looked at are kept and handed out again, and a resume is refused.
    """

    def __init__(self, batches: Iterable[ActivationBatch]) -> None:
        self._iterator = iter(batches)
        self._stateful = all(callable(getattr(batches, n, None)) for n in ("state_dict", "load_state_dict"))
        self._origin: Any = batches
        self._returned: list[ActivationBatch] = []
        (first,) = self.look_ahead(1)
        if first.source.dim() != 2 or first.target.dim() != 2 or len(first) == 0:
            raise ValueError(
                "batches: expected source [B, d_in] and target [B, d_out] with B >= 1, got "
                f"{list(first.source.shape)} and {list(first.target.shape)}"
            )
        self.d_in, self.d_out = first.source.shape[1], first.target.shape[1]

    def __next__(self) -> ActivationBatch:
        return self._returned.pop(0) if self._returned else next(self._iterator)

    def take(self, tokens: int) -> list[ActivationBatch]:
        """Whole batches holding at least `tokens`, or all there are; ValueError where there is none."""
        taken: list[ActivationBatch] = []
        while sum(map(len, taken)) < tokens:
            try:
                taken.append(next(self))
            except StopIteration:
                break
        if not taken:
            raise ValueError("batches: expected at least one ActivationBatch, got an empty iterable")
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
            raise ValueError(
                "resume: these batches cannot go on where the run stopped: the iterable has no state_dict and "
                "load_state_dict; give it both, or start a new run"
            )
        self._origin.load_state_dict(state["origin"])

    def counters(self) -> dict[str, float]:
        return {}

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(i) for i in ids]


def look_ahead(source: Source, tokens: int) -> list[ActivationBatch]:
    """The next batches, holding at least `tokens`, without using them up."""
    if isinstance(source, IterableSource):
        return source.look_ahead(tokens)
    start = source.state_dict()
    taken: list[ActivationBatch] = []
    while sum(map(len, taken)) < tokens:
        taken.append(next(source))
    source.load_state_dict(start)
    return taken
