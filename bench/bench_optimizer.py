from __future__ import annotations

import pytest
import torch

from transcoder.config import TrainingSection
from transcoder.kernels import use_backend
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.optimizer import make_optimizer, optimizer_step


@pytest.mark.parametrize("clip", [None, 1.0], ids=["norm", "clipped"])
def bench_optimizer(clip, size, device, timed):  # type: ignore[no-untyped-def]
    """Projection, gradient norm, clipping, Adam and renormalisation, from gradients that are there."""
    config = TranscoderConfig(size.d, size.d, size.d_sae, size.k, widths=size.widths)
    g = torch.Generator().manual_seed(0)
    models = [Transcoder(config, device=device) for _ in range(2)]
    grads = [torch.randn(p.shape, generator=g).to(device) for p in models[0].parameters()]
    optimizers = [make_optimizer(model, TrainingSection(), 1e-3) for model in models]

    def step(which: int) -> None:
        for p, grad in zip(models[which].parameters(), grads, strict=True):
            p.grad = grad.clone() if which else grad
        optimizer_step(models[which], optimizers[which], 1e-3, clip)

    step(0)
    with use_backend("torch"):
        step(1)
    for ours, theirs in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    parameters = sum(p.numel() for p in models[0].parameters())
    # Gradients twice and W_dec once for the norm; then parameter, gradient and two moments read and three of them written.
    timed(lambda: step(0), 4 * (8 * parameters + size.d_sae * size.d))


def bench_state_read_and_written(size, device, timed):  # type: ignore[no-untyped-def]
    """What the optimizer step is held against: parameters and moments read and written once."""
    state = [torch.zeros(2 * size.d_sae * size.d, device=device) for _ in range(3)]
    timed(lambda: [t.mul_(1.0) for t in state], 4 * 2 * 3 * state[0].numel())
