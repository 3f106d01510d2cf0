"""Base class of the configuration's sections: typed and bounded fields, errors with the nearest known name.

The type of a field contains its bound as an interval: `share: Annotated[float, "(0, 1]"] = 0.5`. `Section` checks the type and
the bound of each field, whether the section comes from YAML, from flags or from code.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import sys
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

Positive = Annotated[int, "[1, inf)"]
Count = Annotated[int, "[0, inf)"]
PositiveNumber = Annotated[float, "(0, inf)"]
Weight = Annotated[float, "[0, inf)"]
Share = Annotated[float, "[0, 1]"]
PositiveShare = Annotated[float, "(0, 1]"]
Fraction = Annotated[float, "[0, 1)"]
"""A share below 1."""
InnerFraction = Annotated[float, "(0, 1)"]
"""A share that is neither 0 nor 1."""


class ConfigError(ValueError):
    """A configuration that cannot be run. The message names the field, the expected and the given value."""


class WrongTypeError(ConfigError, TypeError):
    """A setting of another type, as Python's own functions refuse it too."""


class Section:
    """Base of the frozen dataclasses of a configuration: `class TrainingSection(Section, where="training.")`.

    Each field is converted to its type and held to its bound when the dataclass is made. A rule between two fields is a
    `_require` in the subclass's own `__post_init__`, which calls this one first.
    """

    where: ClassVar[str] = ""
    """Prefix of field names in errors: the dotted path of the section, with a final dot."""

    def __init_subclass__(cls, where: str | None = None, **others: Any) -> None:
        super().__init_subclass__(**others)
        if where is not None:
            cls.where = where

    def __post_init__(self) -> None:
        cls: Any = type(self)
        for name, kind in field_types(cls).items():
            object.__setattr__(self, name, convert(kind, getattr(self, name), self.where + name))

    def _require(self, name: str, fits: bool, expected: str) -> None:
        """Refuse the value of field `name` unless it `fits`."""
        if not fits:
            value = getattr(self, name)
            raise refusal(self.where + name, expected, list(value) if isinstance(value, tuple) else value)


@functools.cache
def field_types(cls: Any, bounds: bool = True) -> dict[str, Any]:
    """{field: type} of a dataclass, in order; without `bounds`, `Annotated[int, ...]` is `int`."""
    hints = typing.get_type_hints(cls, include_extras=bounds)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


def refusal(name: str, expected: str, got: object, error: type[ConfigError] = ConfigError) -> ConfigError:
    return error(f"{name}: expected {expected}, got {short(got)}")


def short(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 200 else f"{shown[:200]}..."


def brief(error: BaseException, most: int = 300) -> str:
    """An error of another library in one line, cut to `most` characters: some run over pages."""
    words = " ".join(str(error).split()) or type(error).__name__
    return words if len(words) <= most else f"{words[:most]}..."


def nearest(name: str, known: Iterable[str]) -> str:
    """The end of an error about an unknown name: the known name that is nearest, or else all of them."""
    known = list(known)
    # The first of equal last parts: a field of a section whose user remembers the field only.
    by_last = {k.rsplit(".", 1)[-1]: k for k in reversed(known)}
    last = name.rsplit(".", 1)[-1]
    close = [by_last[last]] if name == last and last in by_last else difflib.get_close_matches(name, known, 1, 0.5)
    if not close:
        close = [by_last[match] for match in difflib.get_close_matches(last, list(by_last), 1, 0.6)]
    return f"; did you mean {close[0]!r}?" if close else f"; known: {', '.join(known)}"


def flags(section: Any, prefix: str = "") -> list[tuple[str, Any]]:
    """Every field that is no section itself as (dotted name, type without bounds), in order."""
    found: list[tuple[str, Any]] = []
    for name, kind in field_types(section, bounds=False).items():
        found += flags(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [(prefix + name, kind)]
    return found


def set_dotted(values: dict[str, Any], dotted: str, value: Any) -> None:
    """Set a dotted name such as `training.steps` in nested dicts."""
    *sections, last = dotted.split(".")
    for section in sections:
        values = values.setdefault(section, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {section!r} is not a section")
    values[last] = value


def convert(kind: Any, value: Any, name: str, or_null: str = "") -> Any:
    """`value` as the type `kind` of field `name`.

    Takes what YAML makes of numbers ('3e-4' is text to YAML 1.1) and a mapping for a section.

    Raises:
        ConfigError: the value has another type or is out of bounds.
    """
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        words = [word for a in args if typing.get_origin(a) is Literal for word in typing.get_args(a)]
        if value in (None, *words):
            return value
        (inner,) = (a for a in args if a is not type(None) and typing.get_origin(a) is not Literal)
        return convert(inner, value, name, "".join([*(f", {word!r}" for word in words), " or null"]))
    if origin is Annotated:
        value = convert(args[0], value, name)
        if not _inside(value, args[1]):
            raise refusal(name, _in_words(args[1]) + or_null, value)
        return value
    if origin is Literal:
        # YAML 1.1 reads a bare `off` as false.
        value = "off" if value is False and "off" in args else value
        if value not in args:
            raise refusal(name, f"one of {', '.join(map(repr, args))}", value)
        return value
    if origin in (tuple, Sequence):
        if not isinstance(value, Sequence) or isinstance(value, str):
            raise refusal(name, "a list", value, WrongTypeError)
        if origin is tuple and Ellipsis not in args and len(value) != len(args):
            raise refusal(name, f"{len(args)} values", list(value))
        return tuple(convert(args[0], inner, f"{name}[{i}]") for i, inner in enumerate(value))
    if dataclasses.is_dataclass(kind):
        return (
            value if isinstance(value, typing.cast(type, kind)) else build(kind, {} if value is None else value, name)
        )
    if kind in (int, float):
        return _number(kind, value, name)
    if kind is bool and not isinstance(value, bool):
        raise refusal(name, "true or false", value, WrongTypeError)
    if kind is str and not isinstance(value, str):
        raise WrongTypeError(f"{name}: expected text, got {short(value)}; put it in quotes")
    return value


def build(cls: Any, values: Any, name: str = "") -> Any:
    """The dataclass `cls` from a mapping with YAML values. `name` is its dotted path, empty for the whole configuration."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"{name or 'config'}: expected a mapping, got {short(values)}")
    prefix, kinds = f"{name}." if name else "", field_types(cls)
    for key in values:
        if key not in kinds:
            if not name and isinstance(key, str) and key in {leaf for leaf, _ in flags(cls)}:
                section, _, field = key.rpartition(".")
                raise ConfigError(f"unknown key {key!r}: in a configuration it is the key {field!r} below {section!r}")
            known = [prefix + field for field in kinds] if name else [leaf for leaf, _ in flags(cls)]
            raise ConfigError(f"unknown key {prefix + str(key)!r}{nearest(prefix + str(key), [*known, *kinds])}")
    return cls(**{key: convert(kinds[key], value, prefix + key) for key, value in values.items()})


def _number(kind: type, value: Any, name: str) -> int | float:
    given = value
    if isinstance(value, str):
        # '1e4' is text to YAML 1.1.
        with contextlib.suppress(ValueError):
            value = float(value)
    if kind is int:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool):
            raise refusal(name, "a whole number", given, WrongTypeError)
        return value
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise refusal(name, "a number", given, WrongTypeError)
    if not abs(value) <= sys.float_info.max:
        raise refusal(name, "a finite number", value)
    return float(value)


def _limits(bound: str) -> tuple[float, float]:
    """The ends of an interval such as '[0, 2^63)'."""
    low, high = (part.partition("^") for part in bound[1:-1].split(","))
    return float(low[0]) ** float(low[2] or 1), float(high[0]) ** float(high[2] or 1)


def _inside(value: float, bound: str) -> bool:
    low, high = _limits(bound)
    return (low <= value if bound[0] == "[" else low < value) and (value <= high if bound[-1] == "]" else value < high)


def _in_words(bound: str) -> str:
    low, high = (part.strip() for part in bound[1:-1].split(","))
    if high != "inf":
        return f"in {bound}"
    if bound[0] == "[":
        return f"at least {low}"
    return "positive" if low == "0" else f"above {low}"
