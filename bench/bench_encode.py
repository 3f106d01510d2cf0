from __future__ import annotations

import pytest


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def bench_encode(activation, size, compare):  # type: ignore[no-untyped-def]
    """The encoder's product with its selection, forward and gradients for weights and bias (the order by latent included)."""
    compare("encode", size, activation)
