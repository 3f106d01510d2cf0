"""The ledger: proof that each enabled anti-duplication part was called, had an effect and wrote its files.

Without it, a run whose parts are configured but never called looks like any other.
"""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.files import local_path, replace_atomically
from transcoder.usage import (
    MONITOR,
    POSITIONS,
    REGULARIZER,
    REQUIRED_EFFECTS,
    judge,
    nothing_possible,
    zero_penalty_finding,
)


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
        self.path = local_path(path)
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

    def record_no_pairs_possible(self) -> None:
        """No token can have two latents (TopK with k = 1, or one latent): that the monitor saw no pair is no defect."""
        self.record_effect(MONITOR, pairs_possible=0)

    def record_survey(self) -> None:
        """Count one search of the monitor for pairs to penalise."""
        self.record_effect(MONITOR, surveys=1)

    @property
    def surveys(self) -> int:
        """Searches for pairs so far. Never waits for a device."""
        with self._lock:
            return int(self._effects[MONITOR].get("surveys", 0))

    def record_file(self, name: str, path: Path) -> None:
        """List a file that the part wrote, once, relative to the run's folder."""
        path = local_path(path)
        folder = self.path.parent.resolve()
        shown = path.resolve()
        text = shown.relative_to(folder).as_posix() if shown.is_relative_to(folder) else path.as_posix()
        with self._lock:
            if text not in self._files[self._known(name)]:
                self._files[name].append(text)

    def record(self) -> dict[str, Any]:
        """The content of usage.json; reads the totals from the device.

        To the regularizer's effect are added how often the monitor searched for pairs (`surveys`, where it has a
        correlation term) and, if its penalties are 0 though they were evaluated, a sentence (`finding`).
        """
        components: dict[str, dict[str, Any]] = {
            name: {"enabled": self._enabled[name], **part} for name, part in self.state_dict().items()
        }
        effect = components[REGULARIZER]["effect"]
        if "correlation_evaluations" in effect:
            effect["surveys"] = components[MONITOR]["effect"].get("surveys", 0.0)
        finding = zero_penalty_finding(effect)
        if finding is not None:
            effect["finding"] = finding
        for name in (MONITOR, POSITIONS):
            effect = components[name]["effect"]
            if (finding := nothing_possible(effect)) is not None:
                effect["finding"] = finding
        return {"components": components}

    def write(self) -> Path:
        """Write usage.json (to a temporary file that then takes its place).

        Raises:
            OSError: it could not be written; the previous file is unchanged, and no partial file is left.
        """
        record = self.record()
        for part in record["components"].values():
            # JSON has no NaN: NaN is written as text.
            part["effect"] = {
                k: v if isinstance(v, str) or math.isfinite(v) else str(v) for k, v in part["effect"].items()
            }
        replace_atomically(self.path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        return self.path

    def verify(self, step: int) -> None:
        """Raise LedgerError unless every enabled part was really used, by the rules of `transcoder.usage.judge`."""
        lacking = {
            name: judge(name, part, self.path.parent).lacking
            for name, part in self.record()["components"].items()
            if part["enabled"]
        }
        unused = [f"{name}: {', '.join(missing)}" for name, missing in lacking.items() if missing]
        if unused:
            raise LedgerError(
                f"anti-duplication parts that are enabled but were not really used by step {step}: {'; '.join(unused)}. "
                "Wire the part into the run, give it something to act on, or set its `enabled` to false"
            )

    def state_dict(self) -> dict[str, Any]:
        with self._lock:
            return {
                name: {
                    "calls": self._calls[name],
                    "effect": {key: float(value) for key, value in self._effects[name].items()},
                    "files": list(self._files[name]),
                }
                for name in REQUIRED_EFFECTS
            }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        missing = [name for name in REQUIRED_EFFECTS if not {"calls", "effect", "files"} <= set(state.get(name, ()))]
        if missing:
            raise ValueError(f"UsageLedger.load_state_dict: expected calls, effect and files of {', '.join(missing)}")
        parts = {name: state[name] for name in REQUIRED_EFFECTS}
        calls = {name: int(part["calls"]) for name, part in parts.items()}
        effects: dict[str, dict[str, float | Tensor]] = {
            name: {key: float(value) for key, value in part["effect"].items()} for name, part in parts.items()
        }
        with self._lock:
            self._calls, self._effects = calls, effects
            self._files = {name: list(part["files"]) for name, part in parts.items()}

    def _known(self, name: str) -> str:
        if name not in REQUIRED_EFFECTS:
            raise ValueError(f"UsageLedger: part: expected one of {', '.join(REQUIRED_EFFECTS)}, got {name!r}")
        return name
