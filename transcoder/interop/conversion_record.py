"""The record of a conversion: what was changed on the way, and whether the function is still the same."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Literal

RECORD_FILE = "conversion.json"

Effect = Literal["layout", "rounding", "note", "changed"]
"""layout: the same numbers, arranged otherwise. rounding: folded in fp64, rounded once to the file's type; the function is the
same in exact arithmetic. note: something other than the function (training settings, names) was lost or assumed. changed:
another function, because the caller asked for it."""


class ChangedFunctionError(ValueError):
    """The conversion would give another function. The message names why, what would keep it, and how to do it all the same."""


@dataclass
class Conversion:
    """What a conversion did.

    Fields:
        direction: "export" or "import".   format: the foreign format.   path: folder or file that was read or written.
        steps: (what, effect) in the order done.   files: name -> sha256 of what was written (export).
        peer: the versions of the library that this format was tested against.
    """

    direction: Literal["export", "import"]
    format: str
    path: str
    allow_changed_function: bool = False
    peer: str = ""
    steps: list[tuple[str, Effect]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def function(self) -> Literal["same", "same up to rounding", "changed"]:
        effects = {effect for _, effect in self.steps}
        if "changed" in effects:
            return "changed"
        return "same up to rounding" if "rounding" in effects else "same"

    def add(self, what: str, effect: Effect) -> None:
        self.steps.append((what, effect))

    def change(self, what: str, instead: str = "") -> None:
        """Record a step that gives another function, or refuse it.

        Raises:
            ChangedFunctionError: the caller did not ask for `allow_changed_function`.
        """
        if not self.allow_changed_function:
            way = f" {instead}" if instead else ""
            raise ChangedFunctionError(
                f"{self.format} {self.direction}: this would change the function: {what}.{way} To do it all the same: "
                "allow_changed_function=True (--allow-changed-function)"
            )
        self.add(what, "changed")

    def to_json(self) -> str:
        head = {"kind": "transcoder-conversion", "version": 1, "function": self.function}
        steps = [{"what": what, "effect": effect} for what, effect in self.steps]
        return json.dumps({**head, **asdict(self), "steps": steps}, indent=1, ensure_ascii=False)

    def format_lines(self) -> str:
        """For people: one line a step."""
        lines = [f"{self.direction} {self.format}: function {self.function}"]
        return "\n".join([*lines, *(f"  [{effect}] {what}" for what, effect in self.steps)])
