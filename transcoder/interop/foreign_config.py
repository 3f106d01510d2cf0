"""Typed models of foreign configs: the fields of a dataclass are the keys that are read, each held to its type.

    @dataclass(frozen=True)
    class _Config(ForeignConfig):
        k: Whole = None
        transcode: Flag = False

A key that is missing or null has the field's default. Other keys are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any, NamedTuple, TypeVar

from transcoder.settings import field_types

C = TypeVar("C", bound="ForeignConfig")


class _Rule(NamedTuple):
    words: str
    fits: Callable[[Any], bool]


def _is_rising(values: Any) -> bool:
    whole = isinstance(values, list) and all(isinstance(value, int) for value in values)
    return whole and all(before < value for before, value in pairwise((0, *values)))


def _is_number(value: Any) -> bool:
    # A NaN is not above 0 either.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < 2**63


Flag = Annotated[bool | None, _Rule("true or false", lambda value: isinstance(value, bool))]
Whole = Annotated[int | None, _Rule("a whole number of at least 1", lambda value: type(value) is int and value >= 1)]
Size = Annotated[int | None, _Rule("a whole number of at least 0", lambda value: type(value) is int and value >= 0)]
Mean = Annotated[float | None, _Rule("a number of at least 1", _is_number)]
"""A mean of whole numbers, such as k of BatchTopK: 4.5, say."""
Text = Annotated[str | None, _Rule("a text", lambda value: isinstance(value, str))]
Object = Annotated[Mapping[Any, Any] | None, _Rule("an object", lambda value: isinstance(value, dict))]
Rising = Annotated[list[int] | None, _Rule("rising whole numbers", _is_rising)]
"""Cumulative widths."""


@dataclass(frozen=True)
class ForeignConfig:
    """Base of the models. `where` begins the errors: the conversion and the file, "sparsify import: some/cfg.json"."""

    where: str

    @classmethod
    def of(cls: type[C], where: str, values: Mapping[Any, Any] | None) -> C:
        """From the file's values.

        Raises:
            ValueError: a value of another type; it names the file and the key.
        """
        model: Any = cls
        found: dict[str, Any] = {}
        for name, kind in field_types(model).items():
            value = (values or {}).get(name)
            if name == "where" or value is None:
                continue
            for rule in getattr(kind, "__metadata__", ()):
                if not rule.fits(value):
                    raise ValueError(f"{where}: {name}: expected {rule.words}, got {value!r}")
            found[name] = value
        return cls(where, **found)

    def refusal(self, name: str, expected: str) -> ValueError:
        value = getattr(self, name)
        return ValueError(
            f"{self.where}: {name}: expected {expected}, {'found nothing' if value is None else f'got {value!r}'}"
        )

    def require(self, name: str, fits: bool, expected: str) -> None:
        """ValueError about the field `name` unless it `fits`."""
        if not fits:
            raise self.refusal(name, expected)

    def check_sizes(self, **sizes: int) -> None:
        """ValueError unless the config names these sizes, or none."""
        for name, size in sizes.items():
            if (value := getattr(self, name)) not in (None, size):
                raise ValueError(f"{self.where}: says {name} = {value}, the weights have {size}")


def nearest_whole(mean: float | None) -> int | None:
    """At least 1; None stays None."""
    return None if mean is None else max(1, round(mean))
