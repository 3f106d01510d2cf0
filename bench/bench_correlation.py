from __future__ import annotations

import torch

from transcoder.kernels import FeatureCorrelation, batch_topk_encode


def bench_correlation(size, compare):  # type: ignore[no-untyped-def]
    """One batch of codes added to the correlation of all pairs of latents."""
    g = torch.Generator().manual_seed(0)
    x, W = (torch.randn(n, size.d, generator=g) for n in (size.rows, size.d_sae))
    codes = batch_topk_encode(x, W, torch.zeros(size.d_sae), size.k)
    check = FeatureCorrelation(size.d_sae)
    check.update(codes)
    z = codes.to_dense().double()
    busiest = (z > 0).sum(0).topk(2).indices
    want = torch.corrcoef(z[:, busiest].T)[0, 1]
    got = torch.as_tensor(check.correlation(busiest[:1], busiest[1:])).flatten()[0]
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    compare("correlation", size, "batch_topk")
