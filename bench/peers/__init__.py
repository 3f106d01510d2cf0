"""Other implementations of the same work, one a module: `missing()` returns why it cannot run here, and functions named as the
operations (`encode`, `decode`, `nested_loss`, `correlation`, `optimizer`, `step`) give its variants of a case.

The libraries are imported if they are installed, and called as their own trainers call them.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType

from bench.cases import Case
from bench.interleaved_timing import Variant

NAMES = ("eager", "compiled", "saelens", "sparsify", "dictionary_learning", "original")
BUILT_IN = ("eager", "compiled", "original")
"""Peers that need only PyTorch."""
LIBRARIES = {"saelens": "sae-lens", "sparsify": "eai-sparsify", "dictionary_learning": "dictionary-learning"}


def module(name: str) -> ModuleType:
    return importlib.import_module(f"bench.peers.{name}")


def variants(operation: str, case: Case, names: Sequence[str] = NAMES) -> tuple[list[Variant], dict[str, str]]:
    """(variants of the available peers, {other peer: why it is not available})."""
    found: list[Variant] = []
    skipped: dict[str, str] = {}
    for name in names:
        peer = module(name)
        why = peer.missing()
        if why is not None:
            skipped[name] = why
        elif hasattr(peer, operation):
            found += getattr(peer, operation)(case)
    return found, skipped
