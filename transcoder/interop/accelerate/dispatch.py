"""Which class of a library is accelerated by what, and when the library's own dense code runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor, nn

from transcoder.interop.accelerate.lazy import announce

OWN_CODE_BELOW = 2**18
"""Rows of a batch times latents. Dense code costs by that product, ours a fixed sum of small operations (about half a
millisecond a step more on a CPU) and what is selected. Full steps with `always`, batches of 32 to 1024, 128 to 8192 latents,
d 64 and 512, against the library's own: 0.6 to 1 of its speed at 2**12 to 2**14, 0.84 to 1.2 at 2**17; from 2**18 on 1.06 and
more. A rule, not a measurement at run time: the same batch always takes the same path, so runs repeat."""

FEWEST_ROWS = 256
"""sparsify and dictionary_learning: fewer rows than this run on their own code too, however many latents. What reads and
writes whole weights (Adam, the gradients) is the step then, and theirs does so no more often than ours: full steps with
`always` at 8192 latents, 0.7 to 0.98 of the library's speed with 32 rows, 0.9 to 1.2 with 64, 0.90 to 1.21 with 128; from
512 rows on 1.3 and more."""


def runs_library_code(
    module: nn.Module,
    x: Tensor,
    latents: int,
    library: str,
    why_dense: Callable[[], str | None],
    fewest_rows: int = 0,
) -> bool:
    """Whether the library's own code encodes x [..., d_in]: it is faster, or has to (`why_dense`, which is announced)."""
    if is_small(module, x, latents, fewest_rows):
        return True
    why = why_dense()
    if why is not None:
        announce(module, f"{why}: encoded by {library}'s own dense code")
    return why is not None


def is_small(module: nn.Module, x: Tensor, latents: int, fewest_rows: int = 0) -> bool:
    """Whether the library's own code is the faster one for x [..., d_in], and may run."""
    rows = x.numel() // max(x.shape[-1], 1)
    if rows > 0 and module.__dict__.get("_transcoder_always", False):
        return False
    return rows < fewest_rows or rows * latents < OWN_CODE_BELOW


class Accelerated(NamedTuple):
    """How a class of a library is accelerated."""

    library_class: type
    methods: type
    """Holds the methods that go into a subclass of it (a separate base class would not fit every object's layout)."""
    replaces: tuple[str, ...]
    """Names of those methods: a subclass that has its own cannot be accelerated."""


def hooked(module: nn.Module) -> bool:
    """Whether calling it also runs hooks."""
    names = ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    return any(getattr(module, f"_{name}", None) or getattr(nn.modules.module, f"_global_{name}") for name in names)


def original(module: object) -> Any:
    """The library's class of an accelerated module: where its own methods are."""
    return type(module)._transcoder_original  # type: ignore[attr-defined]
