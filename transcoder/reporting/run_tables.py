"""Small tables of a run, properties of `Run`: prefixes and positions as pandas data frames, and the ledger's verdicts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from transcoder.reporting.format import number, real, whole
from transcoder.reporting.tables import ShownAsTable
from transcoder.usage import REQUIRED_EFFECTS, judge

if TYPE_CHECKING:
    import pandas as pd

    from transcoder.reporting.run import Run

BINS = 10


def prefixes(run: Run) -> pd.DataFrame:
    """What each Matryoshka width explains, by width, the narrowest first.

    Columns: `added`, latents more than the prefix before; `fvu`; `explained`, 1 - fvu; `gain`, the FVU less than the prefix
    before, NaN for the first. `attrs["heldout"]` is False where only training batches were measured.

    Raises:
        RunPartMissingError: no FVU by prefix was logged.
    """
    import pandas as pd

    heldout = run.prefix_metrics("evaluation/fvu_prefix")
    found = heldout or run.prefix_metrics("metrics/fvu_prefix")
    if not found:
        raise run.missing_error("metrics by prefix", "metrics.jsonl")
    fvu = pd.Series(found, name="fvu").rename_axis("width")
    added = fvu.index.to_series().diff().fillna(fvu.index[0]).astype(int)
    table = pd.DataFrame({"added": added, "fvu": fvu, "explained": 1 - fvu, "gain": -fvu.diff()})
    table.attrs["heldout"] = bool(heldout)
    return table


def positions(run: Run) -> pd.DataFrame:
    """How many of the kept samples stand in each of ten equal parts of the sequence.

    Index: `first` and `last` position of the part. Columns: `strongest` samples, only these show a preference; `stratified`,
    the samples drawn evenly over positions. `attrs["edges"]`: [11] where the parts begin and end; `attrs["sink_share"]`: share
    of the evenly drawn samples at special tokens, None where it was not recorded.

    Raises:
        RunPartMissingError: there are no samples.
    """
    import pandas as pd

    samples = run.samples
    if samples is None:
        raise run.missing_error("positions", "activation samples")
    length = max(whole(run.setting("activations.sequence_length")) or 0, int(samples.position.max()) + 1)
    edges = np.linspace(0, length, BINS + 1)
    first = np.ceil(edges).astype(int)
    table = pd.DataFrame(
        {
            "strongest": np.histogram(samples.position[samples.top], edges)[0],
            "stratified": np.histogram(samples.position[~samples.top], edges)[0],
        },
        index=pd.MultiIndex.from_arrays([first[:-1], first[1:] - 1], names=["first", "last"]),
    )
    table.attrs = {"edges": edges, "sink_share": real(run.sample_summary.get("sink_fraction"))}
    return table


@dataclass(frozen=True)
class Verdict:
    """`state` is "used", "off", "not proven" or "unknown"; `why` is what is lacking."""

    title: str
    state: str
    calls: float | None
    effect: str
    files: int | None
    why: str


def _verdict(run: Run, name: str) -> Verdict:
    title, enabled, record = name.replace("_", " ").capitalize(), run.part_enabled(name), run.usage.get(name)
    if not isinstance(record, dict):
        state, why = ("off", "") if enabled is False else ("unknown", "usage.json has no record of it")
        return Verdict(title, state, None, "", None, why)
    usage = judge(name, record, run.path)
    effect = ", ".join(f"{key.replace('_', ' ')} {number(value)}" for key, value in usage.effect.items())
    if usage.finding:
        effect = f"{effect}; {usage.finding}"
    why = "; ".join(usage.lacking) if enabled else ""
    state = "off" if not enabled else "not proven" if why else "used"
    return Verdict(title, state, usage.calls, effect, len(usage.files), why)


class Ledger(ShownAsTable, tuple[Verdict, ...]):
    """The verdict on each anti-duplication part, with its calls, effect, files and what is lacking."""

    HEAD = ("part", "verdict", "calls", "effect", "files", "lacking")

    def _cells(self) -> list[tuple[str, ...]]:
        return [(v.title, v.state, number(v.calls), v.effect, number(v.files), v.why) for v in self]


def ledger(run: Run) -> Ledger:
    """Whether each anti-duplication part of a run was really used."""
    return Ledger(_verdict(run, name) for name in REQUIRED_EFFECTS)
