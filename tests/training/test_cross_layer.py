"""Cross-layer transcoders: the definition and its gradients in float64, a run whose zeros stay, what cannot be one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.training.test_layer_set import config, same_bits, weights
from transcoder.config import ConfigError
from transcoder.interop.formats import export_transcoder
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.tensor_file import read_tensors
from transcoder.training import train_transcoder
from transcoder.training.cross_layer import confine, places_allowed

LAYERS, WIDTH, LATENTS = 3, 5, 12


def small(seed: int = 0) -> Transcoder:
    shape = TranscoderConfig(LAYERS * WIDTH, LAYERS * WIDTH, d_sae=LATENTS, k=4, activation="batch_topk")
    transcoder = Transcoder(shape, seed=seed)
    confine(transcoder, LAYERS)
    return transcoder


def by_definition(transcoder: Transcoder, x: Tensor, chosen: Tensor) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Each layer's reconstruction in float64, from the layers' own matrices, and those matrices: `chosen` [B, N] says which
    latents are active."""
    W_enc, W_dec = (m.detach().double() for m in (transcoder.W_enc, transcoder.W_dec))
    own, out = {}, [transcoder.b_dec.detach().double()[m * WIDTH : (m + 1) * WIDTH] for m in range(LAYERS)]
    for layer in range(LAYERS):
        latents, here = slice(layer, None, LAYERS), slice(layer * WIDTH, (layer + 1) * WIDTH)
        encoder = own[f"enc{layer}"] = W_enc[latents, here].clone().requires_grad_()
        bias = transcoder.b_enc.detach().double()[latents]
        z = torch.relu(x.double()[:, here] @ encoder.T + bias) * chosen[:, latents]
        for later in range(layer, LAYERS):
            there = slice(later * WIDTH, (later + 1) * WIDTH)
            decoder = own[f"dec{layer}{later}"] = W_dec[latents, there].clone().requires_grad_()
            out[later] = out[later] + z @ decoder
    return out, own


def test_the_loss_and_its_gradients_are_those_of_the_definition() -> None:
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.randn(40, LAYERS * WIDTH, generator=generator) for _ in range(2))
    transcoder = small()
    step = transcoder.training_step(x, y)
    step.loss.backward()
    chosen = step.codes.detach().to_dense() > 0
    out, own = by_definition(transcoder, x, chosen)
    loss = (torch.cat(out, 1) - y.double()).square().mean()
    loss.backward()
    torch.testing.assert_close(step.loss.double(), loss, rtol=1e-6, atol=0)
    expected = torch.zeros(2, LATENTS, LAYERS * WIDTH, dtype=torch.float64)
    for name, matrix in own.items():
        side, place = (0, int(name[-1])) if name.startswith("enc") else (1, int(name[-1]))
        assert matrix.grad is not None
        expected[side, int(name[3]) :: LAYERS, place * WIDTH : (place + 1) * WIDTH] = matrix.grad
    for matrix, gradient in zip((transcoder.W_enc, transcoder.W_dec), expected, strict=True):
        assert matrix.grad is not None
        torch.testing.assert_close(matrix.grad.double(), gradient, rtol=1e-4, atol=1e-7)


def test_a_latent_writes_into_no_earlier_layer() -> None:
    transcoder, x = small().eval(), torch.randn(20, LAYERS * WIDTH, generator=torch.Generator().manual_seed(2))
    transcoder.threshold.fill_(0.1)
    changed = x.clone()
    changed[:, 2 * WIDTH :] = 0
    before, after = transcoder(x), transcoder(changed)
    assert torch.equal(before[:, : 2 * WIDTH], after[:, : 2 * WIDTH])
    assert not torch.equal(before, after)


@pytest.mark.slow
def test_a_run_keeps_its_zeros_resumes_and_is_exported(tmp_path: Path) -> None:
    settings = config(
        **{
            "activations.layers": "all",
            "activations.cross_layer": True,
            "transcoder.d_sae": 256,
            "transcoder.widths": [128, 256],
            "training.steps": 8,
            "antidup.verify_at_step": 8,
            "checkpoint.keep_last": 9,
            "logging.report_tokens": 0,
        }
    )
    result = train_transcoder(settings, tmp_path / "run")
    assert result.summary["evaluation/ce_transcoder"] > 0
    assert (result.transcoder.config.d_in, result.transcoder.config.d_sae) == (512, 256)
    found = weights(tmp_path / "run")
    read, written = places_allowed(256, 4, 512, 512)
    assert not found["W_enc"][~read].any()
    assert not found["W_dec"][~written].any()
    assert found["W_dec"][written].all()
    for newest in (tmp_path / "run" / "checkpoints").glob("step_*8"):
        for file in newest.iterdir():
            file.unlink()
        newest.rmdir()
    (tmp_path / "run" / "summary.json").unlink()
    assert train_transcoder(settings, tmp_path / "run", resume=True).finished
    assert same_bits(weights(tmp_path / "run"), found)

    export_transcoder(tmp_path / "run", "circuit-tracer", tmp_path / "export")
    decoder = dict(read_tensors(tmp_path / "export" / "W_dec_1.safetensors"))["W_dec_1"]
    assert decoder.shape == (64, 3, 128)
    with pytest.raises(ValueError, match="cross-layer"):
        export_transcoder(tmp_path / "run", "saelens", tmp_path / "other")


def test_what_cannot_be_one_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"activations\.layers: expected"):
        config(activations__cross_layer=True)
    with pytest.raises(ConfigError, match=r"transcoder\.activation: expected batch_topk"):
        config(activations__cross_layer=True, activations__layers="all", transcoder__activation="topk")
    with pytest.raises(ConfigError, match="per_layer"):
        config(activations__cross_layer=True, activations__layers="0-1", per_layer__k=[1, 2])
    with pytest.raises(ConfigError, match="multiple of the 3 layers"):
        places_allowed(128, 3, 12, 12)
