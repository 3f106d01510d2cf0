"""The rows of the benchmark by name, for use without pytest."""

from __future__ import annotations

from bench.cases import Activation

OPERATIONS: tuple[tuple[str, Activation, bool], ...] = (
    ("encode", "topk", False),
    ("encode", "batch_topk", False),
    ("decode", "topk", False),
    ("nested_loss", "batch_topk", True),
    ("correlation", "batch_topk", False),
    ("optimizer", "topk", False),
    ("step", "topk", False),
    ("step", "batch_topk", False),
    ("step", "batch_topk", True),
)
"""(operation, activation, whether it has four prefixes)."""
