"""The ledger: proof that each enabled anti-duplication part was called, had an effect and wrote its files.

The project that this one repairs configured all of these parts and called none of them; nothing noticed.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

REQUIRED_EFFECTS: Mapping[str, tuple[str, ...]] = {
    "diversity_regularizer": ("penalty", "gradient_norm"),
    "position_sampler": ("positions_resampled",),
    "correlation_monitor": ("pairs_seen",),
    "activation_samples": ("samples_kept",),
}
"""The parts, and the effects whose totals must be finite and not 0 by the verified step."""


class LedgerError(RuntimeError):
    """An enabled part was not called, had no effect or wrote no file. The message names the part and what is
    missing."""


class UsageLedger:
    """Counts calls, sums effects and lists files of the anti-duplication parts.

    Args:
        enabled: one entry for each name of `REQUIRED_EFFECTS`.
        path: the run's `usage.json`; files are recorded relative to its folder.

    Effects given as 0-dim tensors are summed on their device and read only by `write`, `verify` and
    `state_dict`. Recording is safe from several threads (the position sampler may run ahead of training).
    """

    def __init__(self, enabled: Mapping[str, bool], path: Path) -> None:
        unknown = sorted(set(enabled) - set(REQUIRED_EFFECTS))
        missing = sorted(set(REQUIRED_EFFECTS) - set(enabled))
        if unknown or missing:
            raise ValueError(
                f"UsageLedger: enabled: expected exactly {', '.join(REQUIRED_EFFECTS)}; "
                f"unknown: {', '.join(unknown) or 'none'}, missing: {', '.join(missing) or 'none'}"
            )
        self.path = Path(path)
        self._enabled = {name: bool(enabled[name]) for name in REQUIRED_EFFECTS}
        self._calls = dict.fromkeys(REQUIRED_EFFECTS, 0)
        self._effects: dict[str, dict[str, float | Tensor]] = {name: {} for name in REQUIRED_EFFECTS}
        self._files: dict[str, list[str]] = {name: [] for name in REQUIRED_EFFECTS}
        self._lock = threading.Lock()

    def record_call(self, name: str) -> None:
        with self._lock:
            self._calls[self._known(name)] += 1

    def record_effect(self, name: str, **numbers: float | Tensor) -> None:
        """Add numbers or 0-dim tensors to the part's totals. Never waits for a device."""
        with self._lock:
            totals = self._effects[self._known(name)]
            for key, value in numbers.items():
                if isinstance(value, Tensor):
                    # float64 on the device: a count of tokens outgrows what fp32 can count.
                    value = value.detach().to(torch.float64, copy=True)
                totals[key] = totals[key] + value if key in totals else value

    def record_file(self, name: str, path: Path) -> None:
        """List a file that the part wrote, once, relative to the run's folder."""
        path = Path(path)
        folder = self.path.parent.resolve()
        shown = path.resolve()
        text = shown.relative_to(folder).as_posix() if shown.is_relative_to(folder) else path.as_posix()
        with self._lock:
            if text not in self._files[self._known(name)]:
                self._files[name].append(text)

    def record(self) -> dict[str, Any]:
        """The content of usage.json; reads the totals from the device."""
        with self._lock:
            return {
                "components": {
                    name: {
                        "enabled": self._enabled[name],
                        "calls": self._calls[name],
                        "effect": {key: float(value) for key, value in self._effects[name].items()},
                        "files": list(self._files[name]),
                    }
                    for name in REQUIRED_EFFECTS
                }
            }

    def write(self) -> Path:
        """Write usage.json (to a temporary file that then takes its place)."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        record = self.record()
        for part in record["components"].values():
            # JSON has no NaN; a total that is not a number is worth a word.
            part["effect"] = {k: v if math.isfinite(v) else str(v) for k, v in part["effect"].items()}
        temporary = self.path.with_name(self.path.name + ".tmp")
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.path)
        return self.path

    def verify(self, step: int) -> None:
        """Raise LedgerError unless every enabled part has calls, each required effect and files that exist
        and hold bytes."""
        lacking = []
        for name, part in self.record()["components"].items():
            if part["enabled"]:
                missing = self._missing(name, part)
                if missing:
                    lacking.append(f"{name}: {', '.join(missing)}")
        if lacking:
            raise LedgerError(
                f"anti-duplication parts that are enabled but were not really used by step {step}: {'; '.join(lacking)}. "
                "Wire the part into the run, give it something to act on, or set its `enabled` to false"
            )

    def _missing(self, name: str, part: dict[str, Any]) -> list[str]:
        missing = [] if part["calls"] > 0 else ["no calls"]
        for key in REQUIRED_EFFECTS[name]:
            value = part["effect"].get(key)
            if value is None:
                missing.append(f"no effect ({key} was never recorded)")
            elif not math.isfinite(value) or value == 0:
                missing.append(f"no effect ({key} is {value:g})")
        if not part["files"]:
            missing.append("no files")
        for file in part["files"]:
            path = self.path.parent / file
            if not path.is_file() or path.stat().st_size == 0:
                missing.append(f"file {file} is {'empty' if path.is_file() else 'not there'}")
        return missing

    def state_dict(self) -> dict[str, Any]:
        return {
            name: {"calls": part["calls"], "effect": part["effect"], "files": part["files"]}
            for name, part in self.record()["components"].items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        with self._lock:
            for name in REQUIRED_EFFECTS:
                part = state[name]
                self._calls[name] = int(part["calls"])
                self._effects[name] = {key: float(value) for key, value in part["effect"].items()}
                self._files[name] = list(part["files"])

    def _known(self, name: str) -> str:
        if name not in REQUIRED_EFFECTS:
            raise ValueError(f"UsageLedger: part: expected one of {', '.join(REQUIRED_EFFECTS)}, got {name!r}")
        return name
