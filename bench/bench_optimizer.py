from __future__ import annotations

import torch

from transcoder.config import TrainingSection
from transcoder.kernels import use_backend
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.optimizer import make_optimizer, optimizer_step


def bench_optimizer(size, compare):  # type: ignore[no-untyped-def]
    """Projection, gradient norm, clipping, Adam and renormalisation, from gradients that are there."""
    config = TranscoderConfig(size.d, size.d, 256, min(size.k, 16))
    models = [Transcoder(config) for _ in range(2)]
    g = torch.Generator().manual_seed(0)
    grads = [torch.randn(p.shape, generator=g) for p in models[0].parameters()]
    for model, backend in zip(models, ("auto", "torch"), strict=True):
        for p, grad in zip(model.parameters(), grads, strict=True):
            p.grad = grad.clone()
        with use_backend(backend):
            optimizer_step(model, make_optimizer(model, TrainingSection(), 1e-3), 1e-3, 1.0)
    for mine, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)
    compare("optimizer", size)
