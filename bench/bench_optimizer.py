from __future__ import annotations


def bench_optimizer(size, compare):  # type: ignore[no-untyped-def]
    """Projection, gradient norm, clipping, Adam and renormalisation, from gradients that are there."""
    compare("optimizer", size)
