"""Our files in SAELens and its files in ours: the same function both ways."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder.interop.formats import ChangedFunctionError, export_transcoder, read_transcoder

from .makers import HOOKS, check_same, inputs, transcoder

sae_lens = pytest.importorskip("sae_lens", reason="SAELens is not installed here: python tests/interop/run.py saelens")

SAE_SETTINGS: dict[str, Any] = {"d_in": 16, "d_sae": 96}


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("d_out", [16, 11])
@torch.no_grad()
def test_ours_is_a_jumprelu_transcoder_of_theirs(tmp_path: Path, skip: bool, d_out: int) -> None:
    model = transcoder("batch_topk", d_out=d_out, skip=skip, widths=[24, 96])
    record = export_transcoder(model, "saelens", tmp_path / "out", **HOOKS)
    assert record.function == "same up to rounding"
    theirs = sae_lens.SAE.load_from_disk(tmp_path / "out")
    assert type(theirs).__name__ == ("JumpReLUSkipTranscoder" if skip else "JumpReLUTranscoder")
    assert (theirs.cfg.metadata.hook_name, theirs.cfg.metadata.hook_name_out) == tuple(HOOKS.values())
    x = inputs(200, 16)
    check_same(model.encode(x).to_dense(), theirs.encode(x), x)
    check_same(model(x), theirs(x), x)
    # What theirs saves again is what ours wrote.
    theirs.save_model(tmp_path / "again")
    again = read_transcoder("saelens", tmp_path / "again").transcoder
    first = read_transcoder("saelens", tmp_path / "out").transcoder
    assert again.config == first.config
    assert all(torch.equal(first.state_dict()[name], tensor) for name, tensor in again.state_dict().items())
    check_same(model(x), first(x), x)


@torch.no_grad()
def test_our_topk_is_an_sae_of_theirs_on_request(tmp_path: Path) -> None:
    model = transcoder("topk")
    with pytest.raises(ChangedFunctionError, match="--architecture topk"):
        export_transcoder(model, "saelens", tmp_path / "refused")
    export_transcoder(model, "saelens", tmp_path / "out", architecture="topk", **HOOKS)
    theirs, x = sae_lens.SAE.load_from_disk(tmp_path / "out"), inputs(200, 16)
    check_same(model.encode(x).to_dense(), theirs.encode(x), x)
    check_same(model(x), theirs(x), x)


def their_saes() -> dict[str, Any]:
    plain = {
        "standard": (sae_lens.StandardSAE, sae_lens.StandardSAEConfig, {}),
        "jumprelu": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {}),
        "jumprelu-without-b_dec": (sae_lens.JumpReLUSAE, sae_lens.JumpReLUSAEConfig, {"apply_b_dec_to_input": False}),
        "topk": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 5}),
        "topk-rescaled": (sae_lens.TopKSAE, sae_lens.TopKSAEConfig, {"k": 5, "rescale_acts_by_decoder_norm": True}),
    }
    off = {"apply_b_dec_to_input": False, "d_out": 11}
    for name in ("Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"):
        plain[name] = (getattr(sae_lens, name), getattr(sae_lens, name + "Config"), off)
    return plain


NAMES = ["standard", "jumprelu", "jumprelu-without-b_dec", "topk", "topk-rescaled"]
NAMES += ["Transcoder", "SkipTranscoder", "JumpReLUTranscoder", "JumpReLUSkipTranscoder"]


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_theirs_is_the_same_function_here(tmp_path: Path, name: str) -> None:
    made, config, settings = their_saes()[name]
    theirs = made(config(**SAE_SETTINGS, **settings))
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    if hasattr(theirs, "threshold"):
        theirs.threshold.copy_(torch.linspace(-0.2, 2.5, 96))
    theirs.save_model(tmp_path)
    found, x = read_transcoder("saelens", tmp_path), inputs(200, 16)
    check_same(theirs(x), found.transcoder(x), x)
    if "rescaled" not in name:
        check_same(theirs.encode(x), found.transcoder.encode(x).to_dense(), x)
    assert found.record.function == ("same up to rounding" if "rescaled" in name else "same")


@pytest.mark.parametrize("rescale", [False, True])
@torch.no_grad()
def test_a_matryoshka_checkpoint_of_theirs_keeps_widths_k_and_threshold(tmp_path: Path, rescale: bool) -> None:
    config = sae_lens.MatryoshkaBatchTopKTrainingSAEConfig(
        **SAE_SETTINGS, k=5, matryoshka_widths=[24, 96], rescale_acts_by_decoder_norm=rescale
    )
    theirs = sae_lens.MatryoshkaBatchTopKTrainingSAE(config)
    generator = torch.Generator().manual_seed(2)
    for parameter in theirs.parameters():
        parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    theirs.topk_threshold.fill_(1.25)
    theirs.save_model(tmp_path / "training")
    theirs.save_inference_model(tmp_path / "inference")
    inference, x = sae_lens.SAE.load_from_disk(tmp_path / "inference"), inputs(200, 16)
    for folder in ("training", "inference"):
        found = read_transcoder("saelens", tmp_path / folder).transcoder
        assert (found.widths, found.config.k) == ((24, 96), 5)
        check_same(inference(x), found(x), x)
