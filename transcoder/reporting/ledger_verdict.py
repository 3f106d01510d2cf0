"""Whether an anti-duplication part was really used, as far as the run folder shows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload

from transcoder.reporting.format import number
from transcoder.reporting.tables import ShownAsTable

if TYPE_CHECKING:
    from transcoder.reporting.run import Run

TITLES = {
    "diversity_regularizer": "Diversity regularizer",
    "position_sampler": "Position sampler",
    "correlation_monitor": "Correlation monitor",
    "activation_samples": "Activation samples",
}


@dataclass(frozen=True)
class Verdict:
    """`state` is "used", "off", "not proven" or "unknown"; `why` is what is lacking."""

    title: str
    state: str
    calls: float | None
    effect: str
    files: int | None
    why: str


def verdicts(run: Run) -> list[Verdict]:
    return [_verdict(run, name) for name in TITLES]


def _verdict(run: Run, component: str) -> Verdict:
    title, enabled = TITLES[component], run.part_enabled(component)
    record = run.usage.get(component)
    if not isinstance(record, dict):
        state = "off" if enabled is False else "unknown"
        return Verdict(title, state, None, "", None, "" if state == "off" else "usage.json has no record of it")
    calls = record.get("calls")
    calls = float(calls) if isinstance(calls, (int, float)) else None
    effect = dict(_numbers(record.get("effect")))
    listed = record.get("files")
    files = [f for f in listed if isinstance(f, str)] if isinstance(listed, list) else []
    spoken = ", ".join(f"{name.replace('_', ' ')} {number(value)}" for name, value in effect.items())
    finding = _finding(record.get("effect"))
    spoken = f"{spoken}; {finding}" if finding else spoken
    if not enabled:
        return Verdict(title, "off", calls, spoken, len(files), "")
    lacking = [] if calls else ["it was never called"]
    never = [name.removesuffix("_evaluations") for name, value in effect.items() if _is_unused_term(name, value)]
    if not any(effect.values()):
        lacking.append("it had no measured effect")
    elif never:
        lacking.append(f"never evaluated: {', '.join(never)}")
    if not files:
        lacking.append("it wrote no file")
    gone = [f for f in files if not (run.path / f).exists()]
    if gone:
        lacking.append(f"{gone[0]} is not there" if len(gone) == 1 else f"{len(gone)} of its files are not there")
    return Verdict(title, "not proven" if lacking else "used", calls, spoken, len(files), "; ".join(lacking))


def _is_unused_term(name: str, value: float) -> bool:
    """Whether an effect says that a penalty term of weight above 0 was never evaluated."""
    return name.endswith("_evaluations") and value == 0


def _finding(effect: Any) -> str:
    """The sentence in which a part says that it looked and found nothing to act on."""
    finding = effect.get("finding") if isinstance(effect, Mapping) else None
    return finding if isinstance(finding, str) else ""


def _numbers(effect: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    """The numbers of an effect; one level of nesting is read, more is not shown."""
    if not isinstance(effect, Mapping):
        return
    for name, value in effect.items():
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            yield f"{prefix}{name}", float(value)
        elif isinstance(value, Mapping) and not prefix:
            yield from _numbers(value, f"{name} ")


class Ledger(ShownAsTable, Sequence[Verdict]):
    """The verdict on each anti-duplication part, with its calls, effect, files and what is lacking."""

    HEAD = ("part", "verdict", "calls", "effect", "files", "lacking")

    def __init__(self, run: Run) -> None:
        self._verdicts = verdicts(run)

    @overload
    def __getitem__(self, index: int) -> Verdict: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Verdict]: ...
    def __getitem__(self, index: int | slice) -> Verdict | Sequence[Verdict]:
        return self._verdicts[index]

    def __len__(self) -> int:
        return len(self._verdicts)

    def _cells(self) -> list[tuple[str, ...]]:
        return [(v.title, v.state, number(v.calls), v.effect, number(v.files), v.why) for v in self]
