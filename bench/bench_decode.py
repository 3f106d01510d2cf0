from __future__ import annotations


def bench_decode(size, compare):  # type: ignore[no-untyped-def]
    """TopK codes to reconstruction, and gradients for codes, decoder and bias (the order by latent included)."""
    compare("decode", size, "topk")


def bench_nested_loss(size, compare):  # type: ignore[no-untyped-def]
    """Losses of four prefixes, and gradients for codes, decoder and bias (the order by latent included)."""
    compare("nested_loss", size, "batch_topk", nested=True)
