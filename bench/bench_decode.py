from __future__ import annotations

import torch

from transcoder.kernels import batch_topk_encode, nested_loss
from transcoder.kernels.decode.reference import nested_loss_reference


def bench_nested_loss(size, device, timed):  # type: ignore[no-untyped-def]
    """Four prefixes, forward and backward."""
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size.rows, size.d, generator=g).to(device) for _ in range(2))
    W_enc, W_dec = (torch.randn(size.d_sae, size.d, generator=g).to(device) for _ in range(2))
    b_dec = torch.zeros(size.d, device=device, requires_grad=True)
    codes = batch_topk_encode(x, W_enc, torch.zeros(size.d_sae, device=device), size.k)
    head = batch_topk_encode(x[:32], W_enc, torch.zeros(size.d_sae, device=device), size.k)
    got = nested_loss(head, W_dec, b_dec, y[:32], size.widths).per_prefix
    want, _ = nested_loss_reference(head.to_dense(), W_dec, b_dec, y[:32], size.widths)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-3)
    values = codes.values.requires_grad_()
    W_dec.requires_grad_()

    def call() -> None:
        nested_loss(codes.with_values(values), W_dec, b_dec, y, size.widths).value.backward()
        values.grad = W_dec.grad = b_dec.grad = None

    # Gathered rows of W_dec forward, again for the values' gradients, rows of the residual for W_dec's; W_dec's gradient.
    timed(call, 4 * (3 * codes.nnz * size.d + W_dec.numel() + 2 * y.numel()))
