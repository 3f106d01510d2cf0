"""How a format names and turns its tensors, one description for writing and reading.

    LAYOUT = {"encoder.weight": "W_enc", "decoder.weight": "W_dec.T"}

The file's `encoder.weight` is the field W_enc of `FoldedWeights`, its `decoder.weight` is W_dec transposed.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.folded_weights import FoldedWeights

Layout = Mapping[str, str]
_FLOATING = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
_WHOLE = {getattr(torch, name): name for name in ("uint8", "int8", "int16", "int32", "int64")}

_STATISTIC = re.compile(
    r"sparsity|fired|firing|not_active|act_freq|frequenc|dead|num_batches|num_tokens|n_forward|steps?$"
)
"""Names of what trainers count; the function has none of it."""


def to_layout(weights: FoldedWeights, layout: Layout) -> dict[str, Tensor]:
    """The file's tensors by name, without those that the weights do not have."""
    fields = {name: getattr(weights, field.removesuffix(".T")) for name, field in layout.items()}
    return {
        name: (tensor.T if layout[name].endswith(".T") else tensor).contiguous()
        for name, tensor in fields.items()
        if tensor is not None
    }


def from_layout(
    where: str,
    tensors: Mapping[str, Any],
    layout: Layout,
    record: Conversion,
    optional: Collection[str] = (),
    ignored: Collection[str] = (),
    counts: Collection[str] = (),
) -> dict[str, Any]:
    """{field of `FoldedWeights`: tensor}, contiguous on the CPU: fp32 of fp32, bf16, fp16 or fp64 (recorded where that rounds).

    Args:
        where: begins the errors: the conversion and the file.
        layout: what the file has to hold, with `counts`, except for what is `optional`.
        ignored: not taken.
        counts: integers among the tensors; they keep their names and types.

    Raises:
        ValueError: a tensor is missing, unknown, of another type, a W_ that is no matrix, or not a dense one whose numbers are
            all in the file.
    """
    required = [name for name in (*layout, *counts) if name not in optional]
    tensors = _without_wrappers(tensors, required)
    missing = [name for name in required if name not in tensors]
    others = sorted(map(str, set(tensors) - {*required, *optional, *ignored}))
    statistics = [
        name for name in others if _STATISTIC.search(name) and isinstance(tensors[name], (Tensor, int, float))
    ]
    if statistics:
        record.add(f"left out, as statistics of training: {', '.join(statistics)}", "note")
    unknown = [name for name in others if name not in statistics]
    if missing or unknown:
        parts = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise ValueError(
            f"{where}: expected the tensors {', '.join(required)}"
            + (f" (and perhaps {', '.join(optional)})" if optional else "")
            + f"; {'; '.join(parts)}. Is this the right format?"
        )
    found: dict[str, Any] = {name: _dense(where, name, tensors[name], _WHOLE) for name in counts if name in tensors}
    rounded = []
    for name, field in layout.items():
        if name not in tensors:
            continue
        tensor = _dense(where, name, tensors[name], _FLOATING)
        fp32 = tensor.float().contiguous()
        if tensor.dtype == torch.float64 and not torch.equal(fp32.double(), tensor):
            rounded.append(name)
            if bool((fp32.isinf() & tensor.isfinite()).any()):
                raise ValueError(
                    f"{where}: {name}: expected numbers that fp32 holds, got fp64 up to {tensor.abs().max():.3g}"
                )
        if field.startswith("W_") and (fp32.dim() != 2 or 0 in fp32.shape):
            raise ValueError(f"{where}: {name}: expected a matrix, got shape {list(fp32.shape)}")
        found[field.removesuffix(".T")] = fp32.T.contiguous() if field.endswith(".T") else fp32
    if rounded:
        record.add(f"{', '.join(rounded)}: fp64, rounded to fp32", "rounding")
    return found


def _without_wrappers(tensors: Mapping[str, Any], required: Collection[str]) -> Mapping[str, Any]:
    """Without the prefix that a wrapper puts before every name: module. of data parallel training, _orig_mod. of torch.compile,
    the attribute of a module around it."""
    first = next(iter(required))
    for name in tensors:
        prefix = str(name).removesuffix(first)
        if prefix.endswith(".") and prefix != name and all(prefix + wanted in tensors for wanted in required):
            return {str(key).removeprefix(prefix): value for key, value in tensors.items()}
    return tensors


def _dense(where: str, name: str, tensor: object, types: Mapping[torch.dtype, str]) -> Tensor:
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{where}: {name}: expected a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in types:
        # Integers and 8-bit floats belong with a scale that this format does not hold.
        got = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{where}: {name}: expected {', '.join(types.values())}, got {got}")
    strided = tensor.layout == torch.strided and not tensor.is_nested and tensor.device.type != "meta"
    # An expanded one holds few numbers and stands for any size.
    if not strided or tensor.untyped_storage().nbytes() < tensor.numel() * tensor.element_size():
        what = "expanded" if strided else f"{tensor.layout} on {tensor.device}"
        raise ValueError(f"{where}: {name}: expected a dense tensor with all its numbers in the file, got {what}")
    return tensor.detach().cpu()
