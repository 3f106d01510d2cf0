"""The scale that SAELens' trainer keeps next to a checkpoint, folded into the weights as SAELens does when training ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from transcoder.interop.conversion_record import Conversion
from transcoder.interop.files import read_json
from transcoder.interop.foreign_config import flag

SCALER_FILE, WHITENING_FILE = "activation_scaler.json", "activation_whitening.safetensors"
_MODES = ("none", "expected_average_only_in", "covariance_whitening", "layer_norm", "constant_norm_rescale")


def fold_scale(
    where: str,
    config_file: Path,
    config: Mapping[str, Any],
    found: Mapping[str, Tensor],
    record: Conversion,
    *,
    trained: bool,
    rescaled: bool,
) -> dict[str, Tensor]:
    """The weights for activations in their own units.

    Args:
        trained: these are a training SAE's weights, so a scale that is not folded yet is the trainer's.
        rescaled: the threshold is in units of the decoder's norm, which the fold divides.

    Equivalent to: `SAE.fold_activation_norm_scaling_factor`, in fp64.

    Raises:
        ChangedFunctionError (a ValueError): each token is normalised by itself; or the scale of a training SAE is missing.
        ValueError: an unknown mode; a scale that is no number, does not go with the config, or is a whitening.
    """
    mode = config.get("normalize_activations")
    # Layouts before version 6.
    mode = {None: "none", False: "none", True: "expected_average_only_in"}.get(mode, mode) if _plain(mode) else mode
    if mode not in _MODES:
        raise ValueError(f"{where}: {config_file}: normalize_activations: expected {', '.join(_MODES)}, got {mode!r}")
    if mode in ("layer_norm", "constant_norm_rescale"):
        record.change(f"normalize_activations {mode!r} rescales each token by itself, which a Transcoder does not do")
    file = config_file.with_name(SCALER_FILE)
    factor = _factor(where, file)
    if factor is None:
        if mode in ("expected_average_only_in", "covariance_whitening"):
            _without_scale(mode, trained, record)
        return dict(found)
    if mode != "expected_average_only_in":
        raise ValueError(
            f"{where}: {file}: scaling_factor is {factor:g}, and {config_file.name} says normalize_activations {mode!r}, as "
            "after a fold: which one is it? Take the file away if the weights are folded"
        )
    record.add(f"scaling_factor {factor:g} of {SCALER_FILE} was folded into W_enc, W_dec and b_dec", "rounding")
    by = {"W_enc": factor, "W_dec": 1 / factor, "b_dec": 1 / factor}
    if rescaled:
        by["topk_threshold"] = 1 / factor
    return {name: (t.double() * by[name]).float() if name in by else t for name, t in found.items()}


def _plain(mode: object) -> bool:
    return mode is None or isinstance(mode, bool)


def _without_scale(mode: str, trained: bool, record: Conversion) -> None:
    if trained:
        record.change(
            f"it was trained with normalize_activations {mode!r}, and the scale is not in {SCALER_FILE} next to the weights: "
            "raw activations would be taken for scaled ones",
            "Put the checkpoint's file there, or import what SAELens saved when training ended.",
        )
    else:
        record.add(
            f"normalize_activations {mode!r}: no scale in the files; nothing is scaled, as in SAELens' load_from_disk",
            "note",
        )


def _factor(where: str, file: Path) -> float | None:
    if not file.is_file():
        return None
    values, settings = read_json(where, file), f"{where}: {file}"
    if flag(settings, values, "has_whitening", file.with_name(WHITENING_FILE).is_file()):
        raise ValueError(
            f"{settings}: a whitening is not read. Fold it in SAELens (sae.fold_activation_whitening) and save that, or import "
            "what it saved when training ended"
        )
    factor = values.get("scaling_factor")
    if factor is None and "scaling_factor" in values:
        return None
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 < factor < math.inf:
        found = f", got {factor!r}" if "scaling_factor" in values else " or null, found nothing"
        raise ValueError(f"{settings}: scaling_factor: expected a number above 0{found}")
    return float(factor)
