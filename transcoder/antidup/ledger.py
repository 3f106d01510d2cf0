"""The ledger: proof that each enabled anti-duplication part was called, had an effect and wrote its files.

The project that this one repairs configured all of these parts and called none of them; nothing noticed.
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

from transcoder.files import replace_atomically

REQUIRED_EFFECTS: Mapping[str, tuple[str, ...]] = {
    "diversity_regularizer": ("penalty", "gradient_norm"),
    "position_sampler": ("positions_resampled",),
    "correlation_monitor": ("pairs_seen",),
    "activation_samples": ("samples_kept",),
}
"""The parts, and the effects that must have been recorded, with finite totals, by the verified step."""
MAY_BE_NOTHING = frozenset({"penalty", "gradient_norm"})
"""Effects whose total may be 0: penalties that were evaluated and found nothing to penalise. With 384 or more
dimensions random decoder rows stay below a cosine of 0.3, and a healthy dictionary has no duplicate pairs."""
TERM_UNITS: Mapping[str, str] = {
    "correlation": "pairs",
    "orthogonality": "rows",
    "all_pairs": "entries",
    "position_entropy": "entries",
    "sink_mass": "entries",
}
"""The regularizer's terms and what each is evaluated on. The effects of a term of weight above 0 are
`{term}_evaluations` (times evaluated) and `{term}_{unit}` (how many in all), from 0 on."""
_REGULARIZER, _MONITOR = "diversity_regularizer", "correlation_monitor"


def missing_effects(name: str, effect: Mapping[str, Any]) -> list[str]:
    """What a part's effects, as `usage.json` has them, lack; empty if nothing."""
    missing = []
    for key in REQUIRED_EFFECTS[name]:
        value = effect.get(key)
        if value is None:
            missing.append(f"no effect ({key} was never recorded)")
        elif not isinstance(value, (int, float)) or not math.isfinite(value):
            missing.append(f"no effect ({key} is {value})")
        elif value == 0 and key not in MAY_BE_NOTHING and not _no_pairs_possible(key, effect):
            missing.append(f"no effect ({key} is 0)")
    return missing + (_missing_terms(effect) if name == _REGULARIZER else [])


def _no_pairs_possible(key: str, effect: Mapping[str, Any]) -> bool:
    return key == "pairs_seen" and effect.get("pairs_possible") == 0


def _missing_terms(effect: Mapping[str, Any]) -> list[str]:
    terms = [term for term in TERM_UNITS if f"{term}_evaluations" in effect]
    missing = [] if terms else ["no effect (no penalty term of weight above 0 was recorded)"]
    for term in terms:
        unit = TERM_UNITS[term]
        if not effect[f"{term}_evaluations"] > 0:
            why = ": it was given no pairs, which come from the correlation monitor" if term == "correlation" else ""
            missing.append(f"the {term} term was never evaluated{why}")
        elif not effect.get(f"{term}_{unit}", 0) > 0:
            if term != "correlation":
                missing.append(f"the {term} term was evaluated on 0 {unit}")
            elif not effect.get("surveys", 0) > 0:
                # After a survey, no pairs are a finding: there was nothing to penalise.
                missing.append("the correlation term was evaluated on 0 pairs and the monitor never surveyed for any")
    return missing


def _finding(effect: Mapping[str, float]) -> str | None:
    """The plain sentence about a penalty of 0, where its terms were evaluated all the same."""
    if effect.get("penalty") != 0 or missing_effects(_REGULARIZER, effect):
        return None
    said = [
        f"{term} was evaluated {effect[f'{term}_evaluations']:.0f} times over {effect[f'{term}_{unit}']:.0f} {unit}"
        for term, unit in TERM_UNITS.items()
        if f"{term}_evaluations" in effect
    ]
    if "correlation_evaluations" in effect:
        said.append(f"{effect.get('surveys', 0):.0f} surveys looked for pairs")
    return f"nothing to penalise: {'; '.join(said)}"


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

    def record_no_pairs_possible(self) -> None:
        """No token can have two latents (TopK with k = 1, or one latent): that the monitor saw no pair is no defect."""
        self.record_effect(_MONITOR, pairs_possible=0)

    def record_survey(self) -> None:
        """Count one search of the monitor for pairs to penalise."""
        self.record_effect(_MONITOR, surveys=1)

    @property
    def surveys(self) -> int:
        """Searches for pairs so far. Never waits for a device."""
        with self._lock:
            return int(self._effects[_MONITOR].get("surveys", 0))

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
        """The content of usage.json; reads the totals from the device.

        The regularizer's effect says beside its numbers how often the monitor searched for pairs (`surveys`,
        where it has a correlation term) and, if its penalties came to 0 though they were evaluated, a sentence
        (`finding`).
        """
        components: dict[str, dict[str, Any]] = {
            name: {"enabled": self._enabled[name], **part} for name, part in self.state_dict().items()
        }
        effect = components[_REGULARIZER]["effect"]
        if "correlation_evaluations" in effect:
            effect["surveys"] = components[_MONITOR]["effect"].get("surveys", 0.0)
        finding = _finding(effect)
        if finding is not None:
            effect["finding"] = finding
        seen = components[_MONITOR]["effect"]
        if seen.get("pairs_possible") == 0:
            seen["finding"] = "no token can have two latents (k = 1, or one latent): there are no pairs to see"
        return {"components": components}

    def write(self) -> Path:
        """Write usage.json (to a temporary file that then takes its place).

        Raises:
            OSError: it could not be written; the former file stands, and nothing else is left behind.
        """
        record = self.record()
        for part in record["components"].values():
            # JSON has no NaN; a total that is not a number is worth a word.
            part["effect"] = {
                k: v if isinstance(v, str) or math.isfinite(v) else str(v) for k, v in part["effect"].items()
            }
        replace_atomically(self.path, json.dumps(record, indent=1, allow_nan=False) + "\n")
        return self.path

    def verify(self, step: int) -> None:
        """Raise LedgerError unless every enabled part has calls, each required effect and files that exist
        and hold bytes.

        The regularizer's penalty and gradient may be 0, but every term of weight above 0 must have been
        evaluated on something; the correlation term on 0 pairs only if the monitor searched for pairs.
        """
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
        missing += missing_effects(name, part["effect"])
        if not part["files"]:
            missing.append("no files")
        for file in part["files"]:
            path = self.path.parent / file
            if not path.is_file() or path.stat().st_size == 0:
                missing.append(f"file {file} is {'empty' if path.is_file() else 'not there'}")
        return missing

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
