"""Which class of a library is accelerated by what."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn


class Kind(NamedTuple):
    theirs: type
    """The library's class."""
    ours: type
    """Holds the methods that go into a subclass of it (a separate base class would not fit every object's layout)."""
    replaces: tuple[str, ...]
    """Names of those methods: a subclass that has its own cannot be accelerated."""


def hooked(module: nn.Module) -> bool:
    """Whether calling it also runs hooks."""
    names = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    everywhere = (
        "_global_forward_hooks",
        "_global_forward_pre_hooks",
        "_global_backward_hooks",
        "_global_backward_pre_hooks",
    )
    return any(bool(getattr(module, name, None)) for name in names) or any(
        bool(getattr(nn.modules.module, name, None)) for name in everywhere
    )


def original(module: object) -> Any:
    """The library's class of an accelerated module: where its own methods are."""
    return type(module)._transcoder_original  # type: ignore[attr-defined]
