"""What FeatureCorrelation asks of its inputs."""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.kernels.checks import check_codes
from transcoder.kernels.sparse_codes import SparseCodes

NAME = "FeatureCorrelation"


def check_int(name: str, value: int, least: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{NAME}: {name}: expected an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{NAME}: {name}: expected at least {least}, got {value}")


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
    """`value` as int64 on `device`, or an error that says what is wrong with it."""
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
