"""Parts of a run folder that may be missing, and what is raised where one was asked for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn


class RunPartMissingError(LookupError):
    """A part of a run is not there. The message names the part, the folder and the reason."""


@dataclass(frozen=True)
class Missing:
    """Something a whole run has and this one lacks."""

    what: str
    why: str


class Part(dict[str, Any]):
    """What one file of a run holds: empty where the file is missing or damaged, and then a lookup raises with the reason.

    Args:
        error: the text of the RunPartMissingError that `part[key]` raises where the whole part is missing; "" where it
            was read, so that an unknown key is a plain KeyError.
    """

    def __init__(self, values: dict[str, Any], error: str = "") -> None:
        super().__init__(values)
        self.error = error

    def __missing__(self, key: str) -> NoReturn:
        if self.error:
            raise RunPartMissingError(self.error)
        raise KeyError(key)
