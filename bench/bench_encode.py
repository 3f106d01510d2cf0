from __future__ import annotations

import pytest
import torch

from transcoder.kernels import batch_topk_encode, topk_encode
from transcoder.kernels.encode.reference import batch_topk_encode_reference, topk_encode_reference

OPS = {"topk": (topk_encode, topk_encode_reference), "batch_topk": (batch_topk_encode, batch_topk_encode_reference)}


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("name", OPS)
def bench_encode(name, backward, size, device, timed):  # type: ignore[no-untyped-def]
    op, reference = OPS[name]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size.rows, size.d, generator=g).to(device)
    W = torch.randn(size.d_sae, size.d, generator=g).to(device).requires_grad_(backward)
    b = torch.zeros(size.d_sae, device=device).requires_grad_(backward)
    torch.testing.assert_close(
        op(x[:64], W, b, size.k).to_dense(), reference(x[:64], W, b, size.k), rtol=1e-4, atol=1e-3
    )

    def call() -> None:
        values = op(x, W, b, size.k).values
        if backward:
            values.sum().backward()
            W.grad = b.grad = None

    nnz = size.rows * size.k
    moved = 4 * (x.numel() + W.numel() + 3 * nnz) + backward * 4 * (W.numel() + nnz * size.d)
    timed(call, moved)


def bench_screened_topk(size, device, timed, monkeypatch):  # type: ignore[no-untyped-def]
    """topk_encode forward with the screen in bf16 asked for; the plain op where the CPU has no units for it."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size.rows, size.d, generator=g).to(device)
    W = torch.randn(size.d_sae, size.d, generator=g).to(device)
    b = torch.zeros(size.d_sae, device=device)
    plain = topk_encode(x, W, b, size.k).to_dense()
    monkeypatch.setenv("TRANSCODER_SCREEN", "bf16")
    torch.testing.assert_close(topk_encode(x, W, b, size.k).to_dense(), plain, rtol=1e-4, atol=1e-3)
    timed(lambda: topk_encode(x, W, b, size.k), 6 * (x.numel() + W.numel()) + 12 * size.rows * size.k)
