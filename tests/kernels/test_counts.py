"""What is counted of every batch on backend `cpp` (csrc/counts.cpp) is what backend `torch` counts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.activations import ActivationBatch
from transcoder.antidup import ActivationSampleCollector, UsageLedger
from transcoder.antidup.pair_errors import PairJackknife
from transcoder.antidup.window import SequenceCounts
from transcoder.config import SamplesSection
from transcoder.kernels import SparseCodes, extension, use_backend
from transcoder.kernels.correlation import cpp_backend
from transcoder.kernels.correlation.torch_backend import entries_of
from transcoder.usage import REQUIRED_EFFECTS

pytestmark = pytest.mark.skipif(not extension.usable(), reason="no compiler")
CPU = torch.device("cpu")


def codes_of(seed: int, tokens: int, d_sae: int, density: float, dtype: torch.dtype, zeros: bool) -> SparseCodes:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, d_sae, generator=g, dtype=torch.float64).exp()
    codes = SparseCodes.from_dense((z * (torch.rand(tokens, d_sae, generator=g) < density)).to(dtype))
    if zeros:
        return codes.with_values(codes.values * (torch.rand(codes.nnz, generator=g) < 0.7))
    return codes


def weights_of(seed: int, tokens: int, kind: str) -> Tensor | None:
    draw = (torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 0.5).clamp_min(
        0
    )
    return {"none": None, "some": draw, "nothing": draw * 0, "fp32": draw.float()}[kind]


WORLD = {
    "tokens": st.integers(1, 70),
    "d_sae": st.sampled_from([1, 2, 17, 70]),
    "density": st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    "dtype": st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    "zeros": st.booleans(),
    "seed": st.integers(0, 999),
}


@settings(max_examples=40, deadline=None)
@given(**WORLD, masking=st.sampled_from(["none", "some", "nothing"]), decayed=st.booleans())
def test_entries(
    tokens: int, d_sae: int, density: float, dtype: torch.dtype, zeros: bool, seed: int, masking: str, decayed: bool
) -> None:
    codes, weight = codes_of(seed, tokens, d_sae, density, dtype, zeros), weights_of(seed, tokens, masking)
    tally = torch.rand(tokens, dtype=torch.float64) if decayed else None
    kind = torch.float64 if decayed else torch.int64
    mine = cpp_backend.firing_entries(codes, weight, tally, kind)
    theirs = entries_of(codes, weight, tally, kind, compact=True)
    for name, part in mine._asdict().items():
        wanted = getattr(theirs, name)
        assert part is None if wanted is None else torch.equal(part, wanted) and part.dtype == wanted.dtype, name


@settings(max_examples=40, deadline=None)
@given(
    **WORLD, masking=st.sampled_from(["none", "some", "fp32"]), known=st.booleans(), pairs=st.sampled_from([1, 9, 200])
)
def test_sequences_and_followed_pairs(
    tokens: int,
    d_sae: int,
    density: float,
    dtype: torch.dtype,
    zeros: bool,
    seed: int,
    masking: str,
    known: bool,
    pairs: int,
) -> None:
    if d_sae < 2:
        return
    g = torch.Generator().manual_seed(seed)
    i, j = torch.randint(0, d_sae, (2, pairs), generator=g)
    i, j = torch.unique(torch.stack([torch.minimum(i, j), torch.maximum(i, j)])[:, i != j], dim=1)
    sequences = torch.randint(0, 40, (tokens,), generator=g) if known else None
    weights = weights_of(seed, tokens, masking)
    found = []
    for name in ("cpp", "torch"):
        with use_backend(name):
            counts, errors = SequenceCounts(d_sae, CPU), PairJackknife(d_sae, CPU)
            errors.most = 10_000
            errors.watch(i, j)
            for n in range(2):
                codes = codes_of(seed + n, tokens, d_sae, density, dtype, zeros)
                counts.update(codes, sequences, weights)
                errors.update(codes, sequences, weights)
            found.append((counts._map, errors._sums))
    assert torch.equal(found[0][0], found[1][0])
    # At most 140 float64 terms, in another order.
    scale = float(found[1][1].abs().max()) if found[1][1].numel() else 1.0
    torch.testing.assert_close(found[0][1], found[1][1], rtol=0, atol=200 * 2.3e-16 * scale)


@settings(max_examples=25, deadline=None)
@given(
    **{**WORLD, "d_sae": st.sampled_from([1, 5, 40])},
    per_latent=st.sampled_from([0, 1, 4]),
    width=st.sampled_from([1, 6]),
    known=st.booleans(),
    sinks=st.sampled_from([0.0, 0.5]),
)
def test_samples(
    tokens: int, d_sae: int, density: float, dtype: torch.dtype, zeros: bool, seed: int,
    per_latent: int, width: int, known: bool, sinks: float,
) -> None:  # fmt: skip
    """Stores to the bit, also where values tie, contexts overlap and places stay empty."""
    section = SamplesSection(
        collect_every=1, top_per_latent=3, stratified_per_latent=per_latent, min_per_bin=1, position_bins=3,
        max_latents=min(d_sae, 30), max_sink_fraction=sinks,
    )  # fmt: skip
    states, kept = [], []
    for name in ("cpp", "torch"):
        g = torch.Generator().manual_seed(seed)
        ledger = UsageLedger({**dict.fromkeys(REQUIRED_EFFECTS, False), "activation_samples": True}, Path("unused"))
        samples = ActivationSampleCollector(section, d_sae, CPU, 0, Path("unused"), [0], 30, ledger)
        with use_backend(name):
            for step in range(3):
                codes = codes_of(seed + step, tokens, d_sae, density, dtype, zeros)
                codes = codes.with_values((codes.values * 3).round() / 3)
                batch = ActivationBatch(
                    source=torch.zeros(tokens, 1), target=torch.zeros(tokens, 1),
                    tokens=torch.randint(0, 9, (tokens,), generator=g), positions=torch.randint(0, 30, (tokens,), generator=g),
                    sequences=torch.randint(0, 4, (tokens,), generator=g) if known else None,
                    contexts=torch.randint(0, 9, (tokens, width), generator=g).int(), context_anchor=0,
                )  # fmt: skip
                samples.collect(codes, batch, step)
        states.append(samples.state_dict())
        kept.append(ledger.state_dict()["activation_samples"])
    for store in ("top", "spread"):
        for field, part in states[0][store].items():
            assert torch.equal(part, states[1][store][field]), (store, field)
    assert kept[0] == kept[1]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_never_shows(threads: None) -> None:
    codes, group = codes_of(0, 200, 300, 0.2, torch.float32, False), torch.arange(200) % 16
    i = torch.arange(299)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        sums = torch.zeros(6, 299, 16, dtype=torch.float64)
        order = codes.by_latent()
        torch.ops.transcoder_cpp.add_by_group(
            codes.values, order.permutation, order.rows, order.latent_ptr, i, i + 1, group, None, sums
        )
        found.append(sums)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_patterns_that_would_lead_outside_are_refused() -> None:
    values, ids, ptr = torch.ones(2), torch.tensor([0, 5]), torch.tensor([0, 2])
    marks = torch.zeros(5 * 4, dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match="indices: expected in"):
        torch.ops.transcoder_cpp.mark_sequences(values, ids, ptr, torch.zeros(1, dtype=torch.int64), None, 4, marks)
    with pytest.raises((ValueError, RuntimeError), match="bits: expected a power of two"):
        torch.ops.transcoder_cpp.mark_sequences(values, ids % 5, ptr, torch.tensor([4]), None, 3, marks)
    with pytest.raises((ValueError, RuntimeError), match="row_ptr: expected"):
        torch.ops.transcoder_cpp.firing_entries(values, ids, torch.tensor([0, 3]), None)
    with pytest.raises((ValueError, RuntimeError), match="indices: expected in"):
        torch.ops.transcoder_cpp.add_moments(
            torch.tensor([3]),
            *(torch.ones(1, dtype=torch.float64),) * 3,
            *(torch.zeros(3, dtype=torch.float64) for _ in range(3)),
        )
    wrong = SparseCodes(values, torch.tensor([1, 1]), ptr, (1, 5))
    with use_backend("cpp"), pytest.raises(ValueError, match="ascending"):
        SequenceCounts(5, CPU).update(wrong, torch.tensor([0]))
