"""usage.json: which anti-duplication parts a run has, and the rules by which each counts as really used. The ledger,
`transcoder validate` and reports share these rules. Needs the standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

FILE_NAME = "usage.json"
REGULARIZER, POSITIONS = "diversity_regularizer", "position_sampler"
MONITOR, SAMPLES = "correlation_monitor", "activation_samples"
SECTIONS: Mapping[str, str] = {
    REGULARIZER: "regularizer",
    POSITIONS: "positions",
    MONITOR: "monitor",
    SAMPLES: "samples",
}
"""The parts by their name in usage.json, and each one's section of `antidup` in the config."""
REQUIRED_EFFECTS: Mapping[str, tuple[str, ...]] = {
    REGULARIZER: ("penalty", "gradient_norm"),
    POSITIONS: ("positions_resampled",),
    MONITOR: ("pairs_seen",),
    SAMPLES: ("samples_kept",),
}
"""The parts, and the effects that must have been recorded, with finite totals, by the verified step."""
MAY_BE_ZERO = frozenset({"penalty", "gradient_norm"})
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
MOST_NAMED = 3
"""Most missing files that are named; if there are more, only their number is given."""


@dataclass(frozen=True)
class Usage:
    """The record of one part in usage.json, and what it lacks."""

    calls: float | None
    """None: not recorded."""
    effect: dict[str, float]
    """Its numbers; a number that is not finite is left out (usage.json spells it as text)."""
    finding: str
    """A sentence that explains an effect of 0 which is no fault; empty otherwise."""
    files: list[str]
    """Relative to the run's folder."""
    lacking: list[str]
    """Reasons why the part does not count as used; empty if it was used."""


def judge(name: str, record: Mapping[str, Any], folder: Path) -> Usage:
    """Whether the part `name` was really used: called, with every required effect, and its files in `folder` hold bytes.

    Args:
        name: a key of `REQUIRED_EFFECTS`.
        record: {"calls", "effect", "files"} as usage.json holds them. What is absent, or of another type, counts as
            not recorded.
        folder: the run folder.
    """
    calls, effect, files = record.get("calls"), record.get("effect"), record.get("files")
    effect = effect if isinstance(effect, Mapping) else {}
    files = [file for file in files if isinstance(file, str)] if isinstance(files, list) else []
    lacking = [] if _number(calls) > 0 else ["no calls"]
    lacking += missing_effects(name, effect)
    lacking += [] if files else ["no files"]
    gone = [file for file in files if not ((folder / file).is_file() and (folder / file).stat().st_size)]
    if len(gone) > MOST_NAMED:
        lacking.append(f"{len(gone)} of its {len(files)} files are not there or empty")
    else:
        lacking += [f"file {file} is {'empty' if (folder / file).is_file() else 'not there'}" for file in gone]
    found = effect.get("finding")
    return Usage(
        None if math.isnan(_number(calls)) else _number(calls),
        {key: _number(value) for key, value in effect.items() if math.isfinite(_number(value))},
        found if isinstance(found, str) else "",
        files,
        lacking,
    )


def missing_effects(name: str, effect: Mapping[str, Any]) -> list[str]:
    """Effects that a part lacks; empty if none.

    The regularizer's penalty and gradient may be 0, but every term of weight above 0 must have been evaluated on something; the
    correlation term on 0 pairs only if the monitor searched for pairs.
    """
    missing = []
    for key in REQUIRED_EFFECTS[name]:
        value = effect.get(key)
        if value is None:
            missing.append(f"no effect ({key} was never recorded)")
        elif not math.isfinite(_number(value)):
            missing.append(f"no effect ({key} is {value})")
        elif value == 0 and key not in MAY_BE_ZERO and not nothing_possible(effect):
            missing.append(f"no effect ({key} is 0)")
    return missing + (_missing_terms(effect) if name == REGULARIZER else [])


NOTHING_POSSIBLE: Mapping[str, str] = {
    "pairs_possible": "no token can have two latents (k = 1, or one latent): there are no pairs to see",
    "positions_beyond_minimum": "no bin of a batch has more tokens than are drawn in any case: there is none to leave out",
}
"""Effects whose total of 0 says that a part had nothing to act on, and the sentence for usage.json."""


def nothing_possible(effect: Mapping[str, Any]) -> str | None:
    """Why a part had nothing to act on; None if it had."""
    return next((why for key, why in NOTHING_POSSIBLE.items() if effect.get(key) == 0), None)


def _missing_terms(effect: Mapping[str, Any]) -> list[str]:
    terms = [term for term in TERM_UNITS if f"{term}_evaluations" in effect]
    missing = [] if terms else ["no effect (no penalty term of weight above 0 was recorded)"]
    for term in terms:
        unit = TERM_UNITS[term]
        if not _number(effect[f"{term}_evaluations"]) > 0:
            why = ": it was given no pairs, which come from the correlation monitor" if term == "correlation" else ""
            missing.append(f"the {term} term was never evaluated{why}")
        elif not _number(effect.get(f"{term}_{unit}")) > 0:
            if term != "correlation":
                missing.append(f"the {term} term was evaluated on 0 {unit}")
            elif not _number(effect.get("surveys")) > 0:
                # After a survey, no pairs are a finding: there was nothing to penalise.
                missing.append("the correlation term was evaluated on 0 pairs and the monitor never surveyed for any")
    return missing


def zero_penalty_finding(effect: Mapping[str, Any]) -> str | None:
    """A sentence that explains a penalty of 0 whose terms were all evaluated; None for any other penalty."""
    if effect.get("penalty") != 0 or missing_effects(REGULARIZER, effect):
        return None
    said = [
        f"{term} was evaluated {effect[f'{term}_evaluations']:.0f} times over {effect[f'{term}_{unit}']:.0f} {unit}"
        for term, unit in TERM_UNITS.items()
        if f"{term}_evaluations" in effect
    ]
    if "correlation_evaluations" in effect:
        said.append(f"{effect.get('surveys', 0):.0f} surveys looked for pairs")
    return f"nothing to penalise: {'; '.join(said)}"


def _number(value: object) -> float:
    """`value` as a float; NaN if it is no number."""
    try:
        return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond float
        return math.inf
