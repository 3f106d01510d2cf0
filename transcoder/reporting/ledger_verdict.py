"""The ledger's verdicts on a run's anti-duplication parts, in words for a page or a notebook."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from transcoder.reporting.format import number
from transcoder.reporting.tables import ShownAsTable
from transcoder.usage import REQUIRED_EFFECTS, judge

if TYPE_CHECKING:
    from transcoder.reporting.run import Run


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


def read_ledger(run: Run) -> Ledger:
    """Whether each anti-duplication part of a run was really used."""
    return Ledger(_verdict(run, name) for name in REQUIRED_EFFECTS)
