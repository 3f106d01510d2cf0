"""Two result files: what became slower or needs more memory, beyond their spread.

Times are compared as multiples of the floor that the same rounds measured, so that a slower hour of the machine is no
regression. What counts is that the quartiles no longer touch and that the medians are further apart than SLACK.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from bench.results import label

SLACK = 1.05
MEMORY_SLACK = 1.10
MEMORY_NOISE = 4 << 20
"""Bytes that an allocator may add or leave away."""


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


def compare(before: dict[str, Any], after: dict[str, Any]) -> list[Change]:
    """Our own rows of two result files. A row that is no longer there is a change for the worse."""
    old, new = _measured(before), _measured(after)
    found = []
    for what in [*old, *(name for name in new if name not in old)]:
        if what not in new:
            found.append(Change(what, old[what][0]["median"], float("nan"), old[what][1], "missing"))
        elif what not in old:
            found.append(Change(what, float("nan"), new[what][0]["median"], new[what][1], "new"))
        else:
            found.append(_change(what, old[what], new[what]))
    return found


Measured = tuple[dict[str, float], str]


def _change(what: str, old: Measured, new: Measured) -> Change:
    (a, unit), (b, _) = old, new
    if unit == "bytes":
        grown = b["median"] > MEMORY_SLACK * a["median"] and b["median"] > a["median"] + MEMORY_NOISE
        shrunk = a["median"] > MEMORY_SLACK * b["median"] and a["median"] > b["median"] + MEMORY_NOISE
        verdict = "more memory" if grown else "less memory" if shrunk else "same"
    else:
        slower = b["low"] > a["high"] and b["median"] > SLACK * a["median"]
        faster = b["high"] < a["low"] and SLACK * b["median"] < a["median"]
        verdict = "slower" if slower else "faster" if faster else "same"
    return Change(what, a["median"], b["median"], unit, verdict)


def _measured(found: dict[str, Any]) -> dict[str, Measured]:
    return dict(_each(found))


def _each(found: dict[str, Any]) -> Iterator[tuple[str, Measured]]:
    for row in found.get("rows", {}).get("rows", []):
        if row["operation"] == "training":
            size = row["size"]
            for kind, one in row["kinds"].items():
                if one["ratio"]["low"] != one["ratio"]["high"]:
                    yield f"trainer, {kind}, N{size['d_sae']}", (one["ratio"], "x off")
            continue
        for name, one in row["variants"].items():
            if not one["ours"]:
                continue
            for direction, seconds in one["seconds"].items():
                floor = row["floor"][direction]["seconds"]
                times = {key: value / floor for key, value in seconds.items()}
                yield f"{label(row)}, {name}, {direction}", (times, "x floor")
            if one["peak_bytes"] is not None:
                yield f"{label(row)}, {name}, memory", ({"median": float(one["peak_bytes"])}, "bytes")
    for kind, one in found.get("whole_run", {}).get("kinds", {}).items():
        if one["ratio"]["low"] != one["ratio"]["high"]:
            yield f"whole run, {kind}", (one["ratio"], "x off")


def said(changes: list[Change]) -> str:
    """What changed, worst first; a count of what did not."""
    moved = sorted((c for c in changes if c.verdict != "same"), key=lambda c: (not c.worse, c.verdict, c.what))
    lines = [f"{c.verdict:<12}{c.what:<72}{_number(c.before, c.unit):>12} -> {_number(c.after, c.unit)}" for c in moved]
    same = len(changes) - len(moved)
    return "\n".join([*lines, f"{same} of {len(changes)} figures within their spread"])


def _number(value: float, unit: str) -> str:
    if value != value:
        return "none"
    return f"{value / 1e6:.1f} MB" if unit == "bytes" else f"{value:.2f} {unit}"
