from __future__ import annotations


def bench_correlation(size, compare):  # type: ignore[no-untyped-def]
    """One batch of codes added to the correlation of all pairs of latents."""
    compare("correlation", size, "batch_topk")
