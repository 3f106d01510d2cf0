"""The sketch on backend `cpp` (csrc/sketch.cpp) against backend `torch`: sums to the bit, the search for pairs exactly."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import FeatureCorrelation, SparseCodes, extension, use_backend
from transcoder.kernels.correlation import cpp_backend, sketch
from transcoder.kernels.correlation.sketch import _similar_rows

pytestmark = pytest.mark.skipif(not extension.usable(), reason="no compiler")


def sparse(seed: int, tokens: int, d_sae: int, density: float, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.randn(tokens, d_sae, generator=g, dtype=torch.float64).exp()
    return (z * (torch.rand(tokens, d_sae, generator=g) < density)).to(dtype)


def streamed(z: Tensor, batch: int, weights: Tensor | None, **options: object) -> FeatureCorrelation:
    found = FeatureCorrelation(z.shape[1], **options)  # type: ignore[arg-type]
    for a in range(0, z.shape[0], batch):
        found.update(SparseCodes.from_dense(z[a : a + batch]), None if weights is None else weights[a : a + batch])
    return found


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 70),
    d_sae=st.sampled_from([1, 3, 17, 70]),
    dim=st.sampled_from([8, 16, 24, 31, 48, 128, 161]),
    batch=st.sampled_from([1, 7, 64]),
    density=st.sampled_from([0.0, 0.05, 0.5, 1.0]),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    masking=st.sampled_from(["none", "bool", "fp64", "nothing"]),
    halflife=st.sampled_from([None, None, 3.0]),
    rank=st.integers(0, 3),
    seed=st.integers(0, 10**6),
)
def test_sums_are_those_of_torch(
    tokens: int, d_sae: int, dim: int, batch: int, density: float, dtype: torch.dtype, masking: str,
    halflife: float | None, rank: int, seed: int,
) -> None:  # fmt: skip
    z = sparse(seed, tokens, d_sae, density, dtype)
    draw = (torch.rand(tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 0.5).clamp_min(
        0
    )
    weights = {"none": None, "bool": draw > 0, "fp64": draw, "nothing": draw > 9}[masking]
    both = []
    for name in ("cpp", "torch"):
        with use_backend(name):
            both.append(streamed(z, batch, weights, sketch_dim=dim, halflife=halflife, rank=rank, seed=seed))
    mine, theirs = (found.state_dict()["pairs"] for found in both)
    assert torch.equal(mine["rows"].view(torch.int32), theirs["rows"].view(torch.int32))
    if halflife is None and masking != "fp64":
        assert torch.equal(mine["ones"], theirs["ones"])
    else:
        # Another order of up to 70 fp32 terms.
        total = 1.0 if halflife is None else 2.0 ** (tokens / halflife)
        slack = 70 * torch.finfo(torch.float32).eps * 1.5 * tokens * total
        torch.testing.assert_close(mine["ones"], theirs["ones"], rtol=0, atol=slack)


@given(
    rows=st.sampled_from([1, 5, 130, 513, 1100]),
    columns=st.sampled_from([1, 63, 512, 700]),
    d=st.sampled_from([1, 8, 40]),
    above=st.sampled_from([-50.0, -1.0, 0.0, 3.0, 1e9]),
    apart=st.sampled_from([-10_000, -600, -5, 0, 40]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_similar_rows_are_the_products_above(
    rows: int, columns: int, d: int, above: float, apart: int, seed: int
) -> None:
    """On whole numbers, whose sums are exact in any order. Products on the threshold itself stay out."""
    g = torch.Generator().manual_seed(seed)
    left, right = (torch.randint(-2, 3, (n, d), generator=g).float() for n in (rows, columns))
    left[0, 0] = torch.nan
    mine, theirs = (
        {(a, b): c for a, b, c in zip(*(part.tolist() for part in find(left, right, above, apart)), strict=True)}
        for find in (cpp_backend.similar_rows, _similar_rows)
    )
    assert mine == theirs


def twins(tokens: int, d_sae: int) -> Tensor:
    z = sparse(3, tokens, d_sae, 0.1)
    z[:, 1::7] = z[:, 0:1]
    return z


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_number_of_threads_never_shows(threads: None) -> None:
    z = twins(300, 1300)
    weights = torch.rand(300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        with use_backend("cpp"):
            one = streamed(z, 100, weights, sketch_dim=40)
            survey = one.survey(0.5, 3)
        assert survey.candidates is not None
        pairs = one.state_dict()["pairs"]
        found.append([pairs["rows"], pairs["ones"], *survey.candidates, *vars(survey.pairs).values()])
    assert all(torch.equal(a, b) for other in found[1:] for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("most", [1_000_000, 50, 7])
def test_the_same_pairs_are_proposed(most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where more are found than may be kept, in many tiles: what cannot enter any more is not looked at."""
    monkeypatch.setattr(sketch, "MAX_CANDIDATES", most)
    monkeypatch.setattr(sketch, "TILE_ROWS", 60)
    monkeypatch.setattr(sketch, "TILE_COLUMNS", 90)
    z = twins(400, 260)
    found = streamed(z, 100, None, sketch_dim=64)
    part = found._sketch
    assert part is not None
    unit = sketch.directions([part], found._moments, torch.arange(260)).double()
    exact = (unit @ unit.T).triu(1)
    proposed = []
    for name in ("cpp", "torch"):
        with use_backend(name):
            i, j = sketch.candidates([part], found._moments, 0.3)
        estimate = exact[i, j]
        assert len(set(zip(i.tolist(), j.tolist(), strict=True))) == i.numel() == min(most, int((exact > 0.3).sum()))
        # Those kept are the best: within the rounding of fp32 products of 64 terms.
        assert float(estimate.min()) >= float(exact.flatten().topk(i.numel()).values.min()) - 64 * 1.2e-7
        proposed.append(set(zip(i.tolist(), j.tolist(), strict=True)))
    if most == 1_000_000:
        assert proposed[0] == proposed[1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latent": torch.tensor([0, 9])}, "indices: expected in"),
        ({"token": torch.tensor([0, 4])}, "indices: expected in"),
        ({"weighted": torch.ones(3, dtype=torch.float64)}, "weighted: expected shape"),
        ({"ones": torch.zeros(9)}, "ones: expected shape"),
        ({"token_weights": torch.ones(3, dtype=torch.float64)}, "token_weights: expected shape"),
        ({"tokens": -1}, "tokens: expected"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict, message: str) -> None:
    arguments = {
        "latent": torch.tensor([0, 8]), "token": torch.tensor([0, 3]), "weighted": torch.ones(2, dtype=torch.float64),
        "token_weights": None, "tokens": 4, "key": 0, "rows": torch.zeros(9, 8), "ones": torch.zeros(8),
    }  # fmt: skip
    with pytest.raises((ValueError, RuntimeError), match=message):
        torch.ops.transcoder_cpp.sketch_add(**{**arguments, **change})
