from __future__ import annotations

import torch

from transcoder.kernels import FeatureCorrelation, batch_topk_encode


def bench_correlation_update(size, device, timed):  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(0)
    x = torch.randn(size.rows, size.d, generator=g).to(device)
    W = torch.randn(size.d_sae, size.d, generator=g).to(device)
    codes = batch_topk_encode(x, W, torch.zeros(size.d_sae, device=device), size.k)
    check = FeatureCorrelation(size.d_sae, device=device)
    check.update(codes)
    z = codes.to_dense().double()
    busiest = (z > 0).sum(0).topk(2).indices
    want = torch.corrcoef(z[:, busiest].T)[0, 1]
    got = torch.as_tensor(check.correlation(busiest[:1], busiest[1:])).flatten()[0]
    torch.testing.assert_close(got.double().cpu(), want.cpu(), rtol=1e-4, atol=1e-5)

    monitor = FeatureCorrelation(size.d_sae, device=device)
    # Two touches (read and write) of one fp32 cell for each pair of a row's entries.
    timed(lambda: monitor.update(codes), 8 * size.rows * size.k * (size.k + 1) // 2)
