"""What a user's own batches must look like: the first one is read in full, the others by their shapes alone."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch
from transcoder.kernels.checks import FLOATS

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
    """What came from the iterator of batches cannot be trained on, or ended too soon."""


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


def tensors_of(batch: ActivationBatch) -> dict[str, Tensor]:
    """The fields that are tensors, by name."""
    every = {f.name: getattr(batch, f.name) for f in fields(batch)}
    return {name: value for name, value in every.items() if isinstance(value, Tensor)}


def _said(part: object) -> str:
    return "absent" if part is None else f"width {part[0]}" if isinstance(part, list) and part else repr(part)
