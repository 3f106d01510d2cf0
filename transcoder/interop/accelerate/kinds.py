"""Which class of a library is accelerated by what."""

from __future__ import annotations

from typing import Any, NamedTuple


class Kind(NamedTuple):
    theirs: type
    """The library's class."""
    ours: type
    """Holds the methods that go into a subclass of it (a class of its own beside it would not fit every object's layout)."""
    replaces: tuple[str, ...]
    """Names of those methods: a subclass that has its own cannot be accelerated."""


def original(module: object) -> Any:
    """The library's class of an accelerated module: where its own methods are."""
    return type(module)._transcoder_original  # type: ignore[attr-defined]
