"""What training reads from: an activation stream, or any iterable of batches, checked and made to look like one.

The first batch of an iterable is read in full, the others by their types and shapes alone.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch, ActivationStream
from transcoder.kernels.checks import FLOATS
from transcoder.tensor_file import tensor_bytes
from transcoder.training.state_tree import pack_state

_WHOLE = (torch.int64,)
_KINDS: dict[str, tuple[str, tuple[torch.dtype, ...]]] = {
    "source": ("[B, d_in]", FLOATS),
    "target": ("[B, d_out]", FLOATS),
    "tokens": ("[B]", _WHOLE),
    "positions": ("[B]", _WHOLE),
    "sequences": ("[B]", _WHOLE),
    "weights": ("[B]", FLOATS),
    "contexts": ("[B, C]", (torch.int32, torch.int64)),
}
_OPTIONAL = ("sequences", "weights", "contexts")

Layout = dict[str, Any]
"""What every batch of a run shares: which fields there are, their widths, the context anchor."""


class TrainingDataError(ValueError):
    """The iterator of batches gave something that cannot be trained on, or ended too soon."""


def check_batch(batch: object, where: str, like: Layout | None = None) -> Layout:
    """The layout of `batch`; equal to `like` where that is given. Looks at types and shapes, never at values.

    Raises:
        TypeError: not an ActivationBatch, or a field of another type or dtype.
        TrainingDataError: a field of another shape, or of another layout than the batches before. Both name the field.
    """
    if not isinstance(batch, ActivationBatch):
        raise TypeError(f"{where}: expected an ActivationBatch, got {type(batch).__name__}")
    rows: int | None = None
    layout: Layout = {}
    for name, (shape, dtypes) in _KINDS.items():
        value = getattr(batch, name)
        if value is None and name in _OPTIONAL:
            layout[name] = None
            continue
        if not isinstance(value, Tensor):
            raise TypeError(f"{where}: {name}: expected a tensor {shape}, got {type(value).__name__}")
        if value.dtype not in dtypes:
            wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise TypeError(f"{where}: {name}: expected {wanted}, got {str(value.dtype).removeprefix('torch.')}")
        if value.dim() != shape.count(",") + 1 or 0 in value.shape or (rows is not None and value.shape[0] != rows):
            said = shape if rows is None else f"{shape} with B = {rows} as in source"
            raise TrainingDataError(f"{where}: {name}: expected {said}, no size 0, got {list(value.shape)}")
        rows = value.shape[0]
        layout[name] = list(value.shape[1:])
    width = 1 if batch.contexts is None else batch.contexts.shape[1]
    if not isinstance(batch.context_anchor, int) or not 0 <= batch.context_anchor < width:
        raise TrainingDataError(
            f"{where}: context_anchor: expected the column of contexts that holds the token, below {width}, got "
            f"{batch.context_anchor!r}"
        )
    layout["context_anchor"] = batch.context_anchor
    for name, expected in (like or {}).items():
        if layout[name] != expected:
            raise TrainingDataError(
                f"{where}: {name}: expected the same layout in every batch, {_said(expected)} so far, got {_said(layout[name])}"
            )
    return layout


def check_values(batch: ActivationBatch, where: str) -> None:
    """Finite activations and weights, no weight below 0, no position or token id below 0. Reads the device.

    Raises:
        TrainingDataError: naming the field and the first row.
    """
    for name in ("source", "target", "weights", "tokens", "positions"):
        value: Tensor | None = getattr(batch, name)
        if value is None:
            continue
        bad = ~torch.isfinite(value) if value.is_floating_point() else value < 0
        expected = "finite numbers" if value.is_floating_point() else "none below 0"
        if name == "weights":
            bad, expected = bad | (value < 0), "finite numbers, none below 0"
        rows = bad.reshape(len(value), -1).any(1).nonzero().flatten().tolist()
        if rows:
            raise TrainingDataError(
                f"{where}: {name}: expected {expected}; {len(rows)} of {len(value)} rows are not, the first is row {rows[0]}"
            )


def _said(part: object) -> str:
    return "absent" if part is None else f"width {part[0]}" if isinstance(part, list) and part else repr(part)


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
        with contextlib.suppress(StopIteration):
            while have < tokens:
                taken.append(next(self))
                have += len(taken[-1])
        if not taken:
            raise TrainingDataError(f"{self._name}: expected at least one ActivationBatch, got an empty iterable")
        return taken

    def look_ahead(self, tokens: int) -> list[ActivationBatch]:
        """As `take`, and the batches will come again."""
        start, given = self.state_dict(), self._given
        taken = self.take(tokens)
        if self._stateful:
            self._origin.load_state_dict(start["origin"])
            self._given = given
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
        """Bytes of the present state: a user's iterable does not say how its state grows."""
        tensors, _ = pack_state(self.state_dict())
        return tensor_bytes(tensors)

    def essential_bytes_at_most(self) -> int:
        return self.state_bytes_at_most()

    def counters(self) -> dict[str, float]:
        return {}

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        return [str(i) for i in ids]


BatchSource: TypeAlias = ActivationStream | IterableSource
"""An endless iterator of batches with a state."""


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
    """On the device, and detached: a step's backward must not go on into the language model that made it."""
    tensors = {name: value for name in _KINDS if (value := getattr(batch, name)) is not None}
    return replace(batch, **{name: value.detach().to(device, non_blocking=True) for name, value in tensors.items()})
