from __future__ import annotations

import pytest

KINDS = {"topk": ("topk", False), "batch_topk": ("batch_topk", False), "matryoshka": ("batch_topk", True)}


@pytest.mark.parametrize("kind", KINDS)
def bench_step(kind, size, compare):  # type: ignore[no-untyped-def]
    """A whole training step: encode, loss, backward, projection, clipping, Adam, unit rows. Target = source: the peers that
    cannot train a transcoder do the same work so."""
    activation, nested = KINDS[kind]
    compare("step", size, activation, nested)
