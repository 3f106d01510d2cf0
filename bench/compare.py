"""Compares two result files: times and memory that grew by more than their spread.

- Rows are compared as multiples of the floor that the same rounds measured, the trainer as a multiple of itself with its parts
  off: a slower hour of the machine is no regression.
- Such ratios do not show a slowdown of all our variants together. For files of the same machine, seconds are therefore compared
  too, corrected by the rates of a copy and of a product that each file records. Files of two machines are compared by ratios
  only, and the output says so.
- Small changes of the same sign may each stay within their spread: a separate verdict covers all times together.

A single measurement has changed when its ranges do not overlap and its medians differ by more than SLACK.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from bench.results import label
from bench.statistics import mean

SLACK = 1.05
MEMORY_SLACK = 1.10
MEMORY_NOISE = 4 << 20
"""Difference in bytes that an allocator may cause."""
TOGETHER_SLACK = 1.02
TOGETHER = "all times together"
MACHINE = ("name", "cores", "threads", "instructions", "capability")
RATES = ("copy_bytes_per_second", "product_operations_per_second")


@dataclass(frozen=True)
class Change:
    what: str
    before: float
    after: float
    unit: str
    verdict: str
    """`slower`, `faster`, `more memory`, `less memory`, `missing`, `new` or `same`."""

    @property
    def worse(self) -> bool:
        return self.verdict in ("slower", "more memory", "missing")


@dataclass(frozen=True)
class Measurement:
    middle: float
    low: float
    high: float
    unit: str
    speed: tuple[float, float] = (1.0, 1.0)
    """For seconds: the machine's rates at that time, in copied bytes and in operations of a product a second."""


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Changes of our own measurements between two result files. A missing one counts as worse."""
    seconds = same_machine(before, after)
    old, new = (dict(_measurements(found, seconds)) for found in (before, after))
    found = []
    for what in [*old, *(name for name in new if name not in old)]:
        if what not in new:
            found.append(Change(what, old[what].middle, math.nan, old[what].unit, "missing"))
        elif what not in old:
            found.append(Change(what, math.nan, new[what].middle, new[what].unit, "new"))
        else:
            found.append(_change(what, old[what], new[what]))
    return [*found, *_together(old, new)]


def same_machine(before: dict[str, Any], after: dict[str, Any]) -> bool:
    return all(before["device"].get(name) == after["device"].get(name) for name in MACHINE)


def machines(before: dict[str, Any], after: dict[str, Any]) -> Iterator[str]:
    """Lines about the machines, to read before the changes."""
    if not same_machine(before, after):
        for device in (before["device"], after["device"]):
            yield f"machine: {', '.join(f'{name} {device[name]}' for name in MACHINE if device.get(name))}"
        yield "Two machines: only ratios to the floor, to the parts switched off, and memory are compared, no seconds."
        return
    yield f"one machine: {before['device']['name']}"
    for name, section in _sections(before):
        other = dict(_sections(after)).get(name)
        if other is not None:
            speed = [other["machine_rates"][rate] / section["machine_rates"][rate] for rate in RATES]
            yield f"  when {name} was measured: a copy at {speed[0]:.2f}x of the speed before, a product at {speed[1]:.2f}x"


def _sections(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in ("rows", "scaling", "whole_run"):
        if "machine_rates" in found.get(name, {}):
            yield name, found[name]


def _change(what: str, old: Measurement, new: Measurement) -> Change:
    if old.unit == "bytes":
        grown = new.middle > MEMORY_SLACK * old.middle and new.middle > old.middle + MEMORY_NOISE
        shrunk = old.middle > MEMORY_SLACK * new.middle and old.middle > new.middle + MEMORY_NOISE
        verdict = "more memory" if grown else "less memory" if shrunk else "same"
    else:
        least, most = _speeds(old, new)
        slower = least * new.low > old.high and least * new.middle > SLACK * old.middle
        faster = most * new.high < old.low and SLACK * most * new.middle < old.middle
        verdict = "slower" if slower else "faster" if faster else "same"
    return Change(what, old.middle, new.middle, old.unit, verdict)


def _speeds(old: Measurement, new: Measurement) -> tuple[float, float]:
    """(least, most) factor by which the machine's speed may have changed; the shares of copying and computing are not known."""
    speeds = [b / a for a, b in zip(old.speed, new.speed, strict=True)]
    return min(speeds), max(speeds)


def _together(old: Mapping[str, Measurement], new: Mapping[str, Measurement]) -> Iterator[Change]:
    """The geometric mean of all times, with an interval that treats them as independent measurements of one slowdown."""
    slower, faster = [], []
    for what, a in old.items():
        if what in new and a.unit in ("x floor", "s"):
            least, most = _speeds(a, new[what])
            slower.append(math.log(least * new[what].middle / a.middle))
            faster.append(math.log(most * new[what].middle / a.middle))
    if len(slower) < 2:
        return
    worst, best = mean(slower), mean(faster)
    verdict, middle = "same", math.exp((worst["total"] + best["total"]) / 2)
    if worst["low"] > 0 and worst["total"] > math.log(TOGETHER_SLACK):
        verdict, middle = "slower", math.exp(worst["total"])
    elif best["high"] < 0 and best["total"] < -math.log(TOGETHER_SLACK):
        verdict, middle = "faster", math.exp(best["total"])
    yield Change(TOGETHER, 1.0, middle, "x before", verdict)


def _measurements(found: dict[str, Any], seconds: bool) -> Iterator[tuple[str, Measurement]]:
    for row in found.get("rows", {}).get("rows", []):
        yield from _kinds(row, found["rows"], seconds) if "kinds" in row else _row(row)
    run = found.get("whole_run", {})
    for kind, one in run.get("kinds", {}).items():
        yield from _kind(f"whole run, {kind}", one, run, seconds)
    for point in found.get("scaling", {}).get("points", []) if seconds else ():
        name, one = next(iter(point["variants"].items()))
        what = f"{point['operation']} at {point['axis']} {point['value']}, {name}"
        yield what, _of(one["seconds"], "s", "median", speed=_speed(found["scaling"]))


def _row(row: dict[str, Any]) -> Iterator[tuple[str, Measurement]]:
    for name, one in row["variants"].items():
        if not one["ours"] or one.get("environment"):
            continue
        for direction, times in one["seconds"].items():
            floor = row["floor"][direction]["seconds"]
            yield f"{label(row)}, {name}, {direction}", _of(times, "x floor", "median", 1 / floor)
        for kind in ("peak", "held"):
            size = one[f"{kind}_bytes"]
            if size is not None:
                yield f"{label(row)}, {name}, {kind} memory", Measurement(size, size, size, "bytes")


def _kinds(row: dict[str, Any], section: dict[str, Any], seconds: bool) -> Iterator[tuple[str, Measurement]]:
    for kind, one in row["kinds"].items():
        what = (
            f"trainer, {kind}, N{row['size']['d_sae']}" if row["operation"] == "training" else f"{label(row)}, {kind}"
        )
        yield from _kind(what, one, section, seconds)


def _kind(what: str, one: dict[str, Any], section: dict[str, Any], seconds: bool) -> Iterator[tuple[str, Measurement]]:
    if one["ratio"]["low"] != one["ratio"]["high"]:
        yield what, _of(one["ratio"], "x off", "total")
    if seconds:
        yield f"{what}, a step", _of(one["seconds_per_step"], "s", "total", speed=_speed(section))


def _of(
    values: dict[str, float], unit: str, middle: str, scale: float = 1.0, speed: tuple[float, float] = (1.0, 1.0)
) -> Measurement:
    return Measurement(scale * values[middle], scale * values["low"], scale * values["high"], unit, speed)


def _speed(section: dict[str, Any]) -> tuple[float, float]:
    rates = section["machine_rates"]
    return rates[RATES[0]], rates[RATES[1]]


def said(changes: list[Change]) -> str:
    """The changes as text, worst first, and the number of unchanged measurements."""
    moved = sorted((c for c in changes if c.verdict != "same"), key=lambda c: (not c.worse, c.verdict, c.what))
    lines = [f"{c.verdict:<12}{c.what:<72}{_number(c.before, c.unit):>12} -> {_number(c.after, c.unit)}" for c in moved]
    same = len(changes) - len(moved)
    return "\n".join([*lines, f"{same} of {len(changes)} measurements within their spread"])


def _number(value: float, unit: str) -> str:
    if value != value:
        return "none"
    if unit == "s":
        return f"{1e3 * value:.3g} ms"
    return f"{value / 1e6:.1f} MB" if unit == "bytes" else f"{value:.3f} {unit}"
