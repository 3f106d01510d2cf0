from __future__ import annotations

import pytest
import torch

from transcoder.config import TrainingSection
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.optimizer import make_optimizer, optimizer_step


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def bench_step(activation, size, device, timed):  # type: ignore[no-untyped-def]
    """A whole training step: encode, nested loss over four prefixes, backward, projection, clipping, Adam."""
    config = TranscoderConfig(size.d, size.d, size.d_sae, size.k, activation=activation, widths=size.widths)
    model = Transcoder(config, device=device).train()
    optimizer = make_optimizer(model, TrainingSection(), 1e-3)
    g = torch.Generator().manual_seed(0)
    x, y = (torch.randn(size.rows, size.d, generator=g).to(device) for _ in range(2))
    first = float(model.training_step(x, y).loss.detach())

    def call() -> None:
        model.training_step(x, y).loss.backward()
        optimizer_step(model, optimizer, 1e-3, 1.0)

    parameters = sum(p.numel() for p in model.parameters())
    # Adam reads parameter, gradient and two moments and writes three of them; the matrices are read once forward.
    timed(call, 4 * 9 * parameters)
    assert float(model.training_step(x, y).loss.detach()) < first
