"""Values of a foreign config: of the kind that they have to be, or a ValueError that names the file and the key.

`where` is the conversion and the file, such as "sparsify import: some/cfg.json". A key that is missing or null is not set.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any


def flag(where: str, config: Mapping[str, Any], name: str, default: bool | None) -> bool:
    """True or false, `default` where it is not set; with `default` None it has to be set."""
    value = config.get(name)
    if value is None and default is not None:
        return default
    if not isinstance(value, bool):
        found = f"got {value!r}" if name in config else "found nothing"
        raise ValueError(f"{where}: {name}: expected true or false, {found}")
    return value


def whole(where: str, config: Mapping[str, Any], name: str, least: int = 1) -> int | None:
    """A whole number of at least `least`, None where it is not set."""
    value = config.get(name)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{where}: {name}: expected a whole number of at least {least}, got {value!r}")
    return value


def mean_number(where: str, name: str, value: object) -> int | None:
    """The whole number of at least 1 that is nearest to a mean (a k of BatchTopK may be 4.5), None where it is not set."""
    if value is None:
        return None
    # A NaN is not at least 1 either.
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 2**63:
        raise ValueError(f"{where}: {name}: expected a number of at least 1, got {value!r}")
    return max(1, round(value))


def text(where: str, config: Mapping[str, Any], name: str) -> str | None:
    """A text, None where it is not set."""
    value = config.get(name)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {name}: expected a text, got {value!r}")
    return value


def section(where: str, config: Mapping[str, Any], name: str) -> dict[Any, Any]:
    """An object inside the config, empty where it is not set."""
    value = config.get(name)
    if value is not None and not isinstance(value, dict):
        raise ValueError(f"{where}: {name}: expected an object, got {value!r}")
    return value or {}


def rising(where: str, name: str, values: object) -> list[int]:
    """Cumulative widths: whole numbers above 0, each more than the one before; empty where they are not set."""
    widths = [] if values is None else values
    if not isinstance(widths, list) or not all(isinstance(width, int) for width in widths):
        raise ValueError(f"{where}: {name}: expected rising whole numbers, got {values!r}")
    if not all(before < width for before, width in pairwise((0, *widths))):
        raise ValueError(f"{where}: {name}: expected rising whole numbers, got {values!r}")
    return widths


def check_size(where: str, config: Mapping[str, Any], name: str, size: int) -> None:
    """ValueError unless the config names this size, or none."""
    if (value := whole(where, config, name, least=0)) not in (None, size):
        raise ValueError(f"{where}: says {name} = {value}, the weights have {size}")
