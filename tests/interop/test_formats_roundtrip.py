"""Every format over the space of transcoders: the same function by the peer's own formula in fp64, and bitwise round trips."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder import Transcoder, TranscoderConfig, export_transcoder
from transcoder.interop.formats import EXPORTED, read_transcoder

from . import peers

HOOKS = {"source_hook": "blocks.2.ln2.hook_normalized", "target_hook": "blocks.2.hook_mlp_out"}
FORMULAS: dict[str, Callable[[Path, Tensor], Tensor]] = {
    "saelens": peers.saelens,
    "sparsify": peers.sparsify,
    "dictionary-learning": peers.dictionary_learning,
    "circuit-tracer": lambda folder, x: peers.circuit_tracer(folder, x, 2),
    "gemma-scope": peers.gemma_scope,
    "original": peers.original,
}


KNOW_TOPK = ("dictionary-learning", "sparsify", "circuit-tracer")
KNOW_LATENTS = ("saelens", "dictionary-learning", "circuit-tracer", "gemma-scope")
"""Formats with a threshold a latent."""
KNOW_SKIP = ("saelens", "sparsify", "circuit-tracer")
SQUARE = ("dictionary-learning", "sparsify", "circuit-tracer")


@st.composite
def transcoders(draw: st.DrawFn, name: str, normalized: bool) -> Transcoder:
    """Any shape, nesting, normalisation and activation that the format can hold; weights off every special value."""
    d_in, d_out, d_sae = draw(st.integers(1, 7)), draw(st.integers(1, 7)), draw(st.integers(2, 20))
    inner = sorted(draw(st.sets(st.integers(1, d_sae - 1), max_size=3)))
    known = (
        ["topk"] * (name in KNOW_TOPK) + ["batch_topk"] * (name != "sparsify") + ["jumprelu"] * (name in KNOW_LATENTS)
    )
    activation = draw(st.sampled_from(known))
    config = TranscoderConfig(
        d_in,
        d_in if name in SQUARE else d_out,
        d_sae,
        draw(st.integers(1, d_sae)),
        activation=activation,  # type: ignore[arg-type]
        widths=[*inner, d_sae],
        skip=name in KNOW_SKIP and draw(st.booleans()),
        latent_thresholds=activation == "batch_topk" and name in KNOW_LATENTS and draw(st.booleans()),
    )
    model = Transcoder(config)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if normalized:
        x, y = torch.randn(64, d_in, generator=g), torch.randn(64, config.d_out, generator=g)
        model.set_normalization(4 * x + 3, 0.1 * y - 2, draw(st.sampled_from(["rms", "standardize"])))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=g))
        model.threshold.copy_(torch.rand(model.threshold.shape, generator=g) - 0.2)
    return model.eval()


def inputs(model: Transcoder) -> Tensor:
    return 3 * torch.randn(40, model.config.d_in, generator=torch.Generator().manual_seed(4)) + 2


def exact(model: Transcoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """([B, d_out] of the model in fp64, [B] whether the selection is clear of fp32's rounding)."""
    s = {name: t.double() for name, t in model.state_dict().items()}
    xn = (x.double() - s["source_mean"]) * s["source_scale"]
    pre = xn @ s["W_enc"].T + s["b_enc"]
    if model.config.activation == "topk":
        acts = peers.top_k(pre.relu(), model.config.k)
        ranked = pre.relu().sort(dim=-1, descending=True).values
        k = model.config.k
        gap = ranked[:, k - 1] - ranked[:, k] if k < pre.shape[1] else torch.ones(len(x))
        clear = (gap > 1e-3) | (ranked[:, min(k, pre.shape[1]) - 1] == 0)
    else:
        limit = s["threshold"].clamp_min(0)
        acts, clear = torch.where(pre > limit, pre, 0.0), ((pre - limit).abs() > 1e-3).all(1)
    skip = xn @ s["W_skip"].T if "W_skip" in s else 0
    return (acts @ s["W_dec"] + s["b_dec"] + skip) / s["target_scale"] + s["target_mean"], clear


MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
"""Hundreds of small folders are written through to the disk otherwise."""


@contextmanager
def exported(model: Transcoder, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        out = Path(folder) / "out"
        # A set of circuit-tracer's keeps TopK only where it is asked to.
        keep = {"activation": "topk"} if name == "circuit-tracer" else {}
        record = export_transcoder(model, name, out, **HOOKS, **keep)
        assert record.function != "changed"
        yield out


fast = settings(max_examples=15, deadline=None, derandomize=True)


@pytest.mark.parametrize("name", EXPORTED)
@fast
@given(data=st.data())
def test_what_is_written_is_the_same_function_by_the_peers_formula(name: str, data: st.DataObject) -> None:
    model = data.draw(transcoders(name, normalized=True))
    x = inputs(model)
    want, clear = exact(model, x)
    with exported(model, name) as out:
        got = FORMULAS[name](out, x)
        # fp32 weights of a few terms, inputs up to 12: errors near 1e-5; 1e-3 and more is another selection or a wrong formula.
        torch.testing.assert_close(got[clear], want[clear], rtol=1e-4, atol=1e-4 * max(1.0, float(want.abs().max())))
        found = read_transcoder(name, out)
        torch.testing.assert_close(found.transcoder(x)[clear].double(), got[clear], rtol=1e-4, atol=1e-3)
        assert found.record.function in ("same", "same up to rounding")


@pytest.mark.parametrize("name", EXPORTED)
@fast
@given(data=st.data())
def test_a_second_trip_is_bitwise_the_first(name: str, data: st.DataObject) -> None:
    """Whatever the first export folded, what it wrote is a fixed point: files and numbers."""
    model = data.draw(transcoders(name, normalized=data.draw(st.booleans())))
    with exported(model, name) as out:
        first = read_transcoder(name, out).transcoder
        with exported(first, name) as again:
            second = read_transcoder(name, again).transcoder
            assert first.config == second.config
            for key, tensor in first.state_dict().items():
                assert torch.equal(tensor, second.state_dict()[key]), key
            for file in sorted(out.rglob("*.safetensors")):
                assert file.read_bytes() == (again / file.relative_to(out)).read_bytes()


@pytest.mark.parametrize("name", ["saelens", "sparsify", "circuit-tracer", "original"])
@fast
@given(data=st.data())
def test_without_a_normalisation_every_number_comes_back(name: str, data: st.DataObject) -> None:
    model = data.draw(transcoders(name, normalized=False))
    with exported(model, name) as out:
        found = read_transcoder(name, out).transcoder
        for key in ("W_enc", "b_enc", "W_dec", "b_dec"):
            assert torch.equal(model.state_dict()[key], found.state_dict()[key]), key
        # A set of circuit-tracer's has skip connections of zeros where another layer has one: those are taken off again.
        if model.W_skip is not None and found.W_skip is not None:
            assert torch.equal(model.W_skip, found.W_skip)
        if model.selection.by_threshold:
            assert torch.equal(
                model.threshold.clamp_min(0).expand(model.config.d_sae), found.threshold.expand(model.config.d_sae)
            )
        assert found.config.k == model.config.k
        assert name == "sparsify" or found.widths == model.widths
