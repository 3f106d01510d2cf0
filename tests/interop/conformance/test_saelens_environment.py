"""SAELens and this package in one environment, as pip resolves them: both usable, reading a language model included."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("sae_lens", reason="SAELens is not installed here: python tests/interop/run.py saelens")


def test_a_language_model_is_read_with_the_transformer_lens_that_saelens_takes() -> None:
    from transcoder.activations.language_model import HookedModel

    hooks = ("blocks.0.mlp.hook_in", "blocks.0.mlp.hook_out")
    model = HookedModel("demo", *hooks, torch.float32, torch.device("cpu"), progress=False)
    source, target = model.forward(torch.arange(10).view(1, 10))
    assert source.shape == (1, 10, model.d_in)
    assert target.shape == (1, 10, model.d_out)
    assert source.isfinite().all()
    assert not torch.equal(source, target)
