"""Checks of FeatureCorrelation's inputs and of a saved state. All parts of a state are checked before any is loaded, so a state
that does not fit changes nothing."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from transcoder.kernels.checks import check_codes
from transcoder.kernels.sparse_codes import SparseCodes

NAME = "FeatureCorrelation"
EXACT_LIMIT = 32768
"""Widest dictionary that is counted exactly: 4 GiB of products and 2 GiB of counts."""


def check_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{NAME}: {name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{NAME}: {name}: expected at least {least}, got {value}")


def check_settings(
    d_sae: int, sketch_dim: int | None, halflife: float | None, seed: int, rank: int, ring_tokens: int, margin: float
) -> None:
    check_int("d_sae", d_sae, 1)
    check_int("ring_tokens", ring_tokens, 1)
    check_int("seed", seed, -(1 << 63))
    check_int("rank", rank, 0)
    if sketch_dim is not None:
        check_int("sketch_dim", sketch_dim, 8)
    elif d_sae > EXACT_LIMIT:
        raise ValueError(
            f"{NAME}: d_sae: expected at most {EXACT_LIMIT} without a sketch, got {d_sae} (its pairs "
            f"would take {d_sae * (d_sae - 1) // 2 * 12 / 2**30:.0f} GiB); pass sketch_dim=128"
        )
    if halflife is not None and not (halflife > 0 and math.isfinite(halflife)):
        raise ValueError(f"{NAME}: halflife: expected a positive number of tokens or None, got {halflife!r}")
    if not 0 <= margin < 1:
        raise ValueError(f"{NAME}: sketch_margin: expected in [0, 1), got {margin!r}")


def check_update(codes: SparseCodes, mask: Tensor | None, d_sae: int, device: torch.device, full: bool) -> None:
    op = f"{NAME}.update"
    check_codes(op, codes)
    if codes.shape[1] != d_sae:
        raise ValueError(f"{op}: codes: expected d_sae = {d_sae} latents, got shape {codes.shape}")
    if codes.device != device:
        raise ValueError(
            f"{op}: codes: expected device {device}, got {codes.device}; build {NAME} with device='{codes.device}'"
        )
    if mask is not None:
        if not isinstance(mask, Tensor) or not (mask.dtype == torch.bool or mask.dtype.is_floating_point):
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"{op}: mask: expected a bool or floating tensor, got {got}")
        if mask.shape != (codes.shape[0],):
            raise ValueError(f"{op}: mask: expected shape [{codes.shape[0]}], got {list(mask.shape)}")
        if mask.device != device:
            raise ValueError(f"{op}: mask: expected device {device}, got {mask.device}")
    if full:
        _check_contents(op, codes, mask)


def latent_ids(name: str, value: int | Tensor, d_sae: int, device: torch.device) -> Tensor:
    """`value` as int64 on `device`. Raises: TypeError or ValueError naming `name`."""
    try:
        latents = torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"{NAME}: {name}: expected an int or a tensor of latent ids, got {value!r}") from None
    if latents.dtype == torch.bool or latents.is_floating_point() or latents.is_complex():
        raise TypeError(f"{NAME}: {name}: expected integer latent ids, got {latents.dtype}")
    latents = latents.long()
    if latents.numel():
        low, high = int(latents.min()), int(latents.max())
        if low < 0 or high >= d_sae:
            raise ValueError(f"{NAME}: {name}: expected latents in [0, {d_sae}), got {low} .. {high}")
    return latents


def _check_contents(op: str, codes: SparseCodes, mask: Tensor | None) -> None:
    codes.validate(f"{op}: codes")
    bad = ~(torch.isfinite(codes.values) & (codes.values >= 0))
    if bool(bad.any()):
        first = int(bad.nonzero()[0])
        raise ValueError(
            f"{op}: codes.values: expected finite values >= 0, got {float(codes.values[first])} for latent "
            f"{int(codes.indices[first])} in row {int(codes.rows()[first])}"
        )
    if mask is not None and not bool((torch.isfinite(mask.double()) & (mask.double() >= 0)).all()):
        raise ValueError(f"{op}: mask: expected finite weights >= 0")


def refuse(name: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{NAME}.load_state_dict: {name}: expected {expected}, got {got}")


def check_fields(name: str, state: object, needed: Collection[str], optional: Collection[str] = ()) -> None:
    """`state` is a dict with all the `needed` fields and no others than these and the `optional` ones."""
    if not isinstance(state, Mapping):
        raise refuse(name, "a dict", type(state).__name__)
    for field in needed:
        if field not in state:
            raise ValueError(f"{NAME}.load_state_dict: {name}: expected a field {field!r}, which is missing")
    for field in state:
        if field not in needed and field not in optional:
            known = ", ".join(sorted({*needed, *optional}))
            raise ValueError(f"{NAME}.load_state_dict: {name}: unknown field {field!r} (known: {known})")


def check_tensor(name: str, value: object, shape: tuple[int | None, ...], *dtypes: torch.dtype) -> None:
    """`value` is a tensor of one of `dtypes` and of `shape`, None leaving a size free."""
    if not isinstance(value, Tensor):
        raise refuse(name, "a tensor", type(value).__name__)
    fits = value.dim() == len(shape) and all(n is None or n == m for n, m in zip(shape, value.shape, strict=True))
    if not fits:
        raise refuse(name, f"shape [{', '.join('*' if n is None else str(n) for n in shape)}]", list(value.shape))
    if value.dtype not in dtypes:
        raise refuse(name, " or ".join(str(d) for d in dtypes), value.dtype)


def check_state_fields(state: object, built: Mapping[str, object]) -> None:
    """The fields of `FeatureCorrelation.state_dict`; those of `built` have these values."""
    for name, value in built.items():
        if isinstance(state, dict) and name in state and state[name] != value:
            raise refuse(name, f"{value!r} as built", repr(state[name]))
    check_fields("state", state, (*built, "updates", "tokens_offered", "origin", "moments", "pairs"))
    assert isinstance(state, Mapping)
    for name in ("updates", "tokens_offered"):
        if not isinstance(state[name], int) or isinstance(state[name], bool) or state[name] < 0:
            raise refuse(name, "a whole number >= 0", repr(state[name]))
    if not isinstance(state["origin"], (int, float)) or not math.isfinite(state["origin"]):
        raise refuse("origin", "a finite number", repr(state["origin"]))
