"""Backend `triton` of FeatureCorrelation against its float64 definition and against backend `torch`."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from transcoder.kernels import FeatureCorrelation, SparseCodes, use_backend
from transcoder.kernels.correlation import config
from transcoder.kernels.correlation import sketch as sketch_module
from transcoder.kernels.correlation.counter_rng import signs
from transcoder.kernels.correlation.reference import correlation_reference

CLOSE = 2e-6
"""Products are rounded to 2^-27 of U_i U_j (config.UNIT_BITS), each at most 4 times the value's own square here; a sum of n of
them is off by sqrt(n) / sqrt(12) of that, and a correlation divides by n times a variance of about 1/20 of the largest
square: 2^-27 * 4 * 20 = 6e-7 at n = 1, less with more."""


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


def tokens(count: int, d_sae: int, density: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(count, d_sae, generator=g, dtype=torch.float64) * 3
    return (z * (torch.rand(count, d_sae, generator=g, dtype=torch.float64) < density)).to(dtype)


def codes_on(device: torch.device, z: Tensor, keep_zeros: bool = False) -> SparseCodes:
    if not keep_zeros:
        return SparseCodes.from_dense(z.to(device))
    every = torch.arange(z.numel(), device=device)
    ptr = torch.arange(0, z.numel() + 1, z.shape[1], device=device)
    return SparseCodes(z.to(device).reshape(-1), every % z.shape[1], ptr, (z.shape[0], z.shape[1]))


def streamed(
    device: torch.device, z: Tensor, batch: int = 16, weights: Tensor | None = None, backend: str = "triton", **options
) -> FeatureCorrelation:  # type: ignore[no-untyped-def]
    found = FeatureCorrelation(z.shape[1], device=device, **options)
    with use_backend(backend):
        for a in range(0, z.shape[0], batch):
            w = None if weights is None else weights[a : a + batch].to(device)
            found.update(codes_on(device, z[a : a + batch]), w)
    return found


def all_pairs(d_sae: int, device: torch.device) -> tuple[Tensor, Tensor]:
    j, i = torch.tril_indices(d_sae, d_sae, -1, device=device)
    return i, j


def assert_matches(found: FeatureCorrelation, z: Tensor, weights: Tensor | None = None) -> None:
    truth = correlation_reference(z, weights)
    i, j = all_pairs(found.d_sae, found.device)
    got = found.statistics(i, j)
    i, j = i.cpu(), j.cpu()
    torch.testing.assert_close(got.correlation.cpu(), truth.correlation[i, j].clamp(-1, 1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(got.cosine.cpu(), truth.cosine[i, j].clamp(max=1), rtol=0, atol=CLOSE)
    assert torch.equal(got.support.cpu(), truth.union[i, j])
    torch.testing.assert_close(got.jaccard.cpu(), truth.jaccard[i, j])
    assert torch.equal(found.counts().cpu(), truth.fired)


@pytest.mark.interpreted
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_pair_matches_float64(density: float, dtype: torch.dtype, triton_device: torch.device) -> None:
    z = tokens(24, 19, density, 0, dtype)
    assert_matches(streamed(triton_device, z), z)


@pytest.mark.interpreted
@pytest.mark.parametrize("masking", ["bool", "weights", "nothing"])
def test_masks_and_weights(masking: str, triton_device: torch.device) -> None:
    z = tokens(30, 9, 0.5, 1)
    g = torch.Generator().manual_seed(1)
    drawn = torch.rand(30, generator=g)
    weights = {"bool": drawn < 0.6, "weights": (drawn * 2 - 0.5).clamp(min=0), "nothing": torch.ones(30)}[masking]
    assert_matches(streamed(triton_device, z, weights=weights), z, weights)


@pytest.mark.interpreted
def test_stored_zeros_rows_of_every_length_and_empty_batches(triton_device: torch.device) -> None:
    z = tokens(12, 40, 0.2, 2)
    z[3] = 1
    z[5:7] = 0
    found = FeatureCorrelation(40, device=triton_device)
    with use_backend("triton"):
        found.update(codes_on(triton_device, z, keep_zeros=True))
        found.update(codes_on(triton_device, z[:0]))
        found.update(codes_on(triton_device, torch.zeros(2, 40)))
    assert_matches(found, torch.cat([z, torch.zeros(2, 40)]))
    one = FeatureCorrelation(1, device=triton_device)
    with use_backend("triton"):
        one.update(codes_on(triton_device, torch.tensor([[2.0], [0.0]])))
    assert float(one.correlation(0, 0)) == pytest.approx(1.0)


@pytest.mark.interpreted
def test_order_does_not_change_a_bit(triton_device: torch.device) -> None:
    """Rows in another order, and the same rows in one batch or in many, give the same bits: the additions are exact.

    The first batch settles the units, so it stays first."""
    z = tokens(40, 12, 0.4, 3) * torch.logspace(-3, 3, 12)
    head, rest = z[:10], z[10:]
    states = []
    for order, batch in ((torch.arange(30), 30), (torch.arange(29, -1, -1), 30), (torch.arange(30), 7)):
        found = streamed(triton_device, head)
        with use_backend("triton"):
            for part in rest[order].split(batch):
                found.update(codes_on(triton_device, part))
        states.append(found.state_dict()["pairs"])
    for other in states[1:]:
        for name, part in states[0].items():
            assert torch.equal(part, other[name]), name


@pytest.mark.interpreted
def test_weak_and_strong_latents_are_equally_exact(triton_device: torch.device) -> None:
    scales = torch.tensor([1e-30, 1e-6, 1.0, 1e6, 1e15])
    z = tokens(40, 5, 0.7, 4, torch.float64) * scales.double()
    z[:, 1] = z[:, 3] * 1e-12
    found = streamed(triton_device, z)
    assert_matches(found, z)
    assert float(found.correlation(1, 3)) == pytest.approx(1.0, abs=CLOSE)


@pytest.mark.interpreted
def test_latents_that_are_nearly_always_on(triton_device: torch.device) -> None:
    # Mean 35, sd 0.15: the products are 5e4 times the covariance, and so is the rounding. U = 64: 2^-27 * 4096 / sqrt(12)
    # / sqrt(200) / 0.0225 = 3e-5 is one standard deviation of the correlation after 200 tokens.
    g = torch.Generator().manual_seed(5)
    common, own = torch.randn(200, 1, generator=g), torch.randn(200, 3, generator=g)
    z = (35 + 0.15 * (0.9 * common + 0.44 * own)).double()
    found, truth = streamed(triton_device, z, batch=50), correlation_reference(z).correlation
    i, j = all_pairs(3, triton_device)
    torch.testing.assert_close(found.correlation(i, j).cpu(), truth[i.cpu(), j.cpu()], rtol=0, atol=1.5e-4)


@pytest.mark.interpreted
def test_a_latent_that_outgrows_its_unit_stays_right(triton_device: torch.device) -> None:
    z = tokens(30, 4, 0.8, 6)
    z[16:] *= 1000
    assert_matches(streamed(triton_device, z), z)


@pytest.mark.interpreted
def test_the_larger_count_type(triton_device: torch.device) -> None:
    z = torch.ones(4, 3)
    found = streamed(triton_device, z)
    found.tokens_offered = 2**31 - 2
    with use_backend("triton"):
        found.update(codes_on(triton_device, z))
    assert found._exact is not None
    assert found._exact.joint.dtype == torch.int64
    assert int(found._exact.joint[0]) == 8


@pytest.mark.interpreted
def test_state_merge_and_backends_go_together(triton_device: torch.device) -> None:
    z = tokens(48, 14, 0.3, 7)
    whole = streamed(triton_device, z)
    half = streamed(triton_device, z[:32])
    resumed = FeatureCorrelation(14, device=triton_device)
    resumed.load_state_dict(half.state_dict())
    with use_backend("triton"):
        resumed.update(codes_on(triton_device, z[32:]))
    for name, part in whole.state_dict()["pairs"].items():
        assert torch.equal(part, resumed.state_dict()["pairs"][name]), name
    half.merge(streamed(triton_device, z[32:], backend="torch"))
    assert_matches(half, z)


@pytest.mark.interpreted
def test_many_latents_are_owned_by_entries(triton_device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    z = tokens(20, 12, 0.4, 8)
    by_latent = streamed(triton_device, z)
    monkeypatch.setattr(config, "ENTRY_OWNERS_ABOVE", 0)
    by_entry = streamed(triton_device, z)
    for name, part in by_latent._moments.tensors().items():
        assert torch.equal(part, by_entry._moments.tensors()[name]), name
    assert_matches(by_entry, z)


@pytest.mark.interpreted
def test_a_half_life_is_kept(triton_device: torch.device) -> None:
    z = tokens(60, 6, 0.5, 9)
    found = streamed(triton_device, z, halflife=10.0)
    same = streamed(triton_device, z, halflife=10.0, backend="torch")
    i, j = all_pairs(6, triton_device)
    assert torch.equal(found.correlation(i, j), same.correlation(i, j))


@pytest.mark.interpreted
@pytest.mark.parametrize("dim", [8, 33, 130])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_sketch_has_the_signs_of_the_counter(dim: int, weighted: bool, triton_device: torch.device) -> None:
    z = tokens(18, 7, 0.5, 10)
    weights = torch.linspace(0, 2, 18, dtype=torch.float64) if weighted else None
    found = streamed(triton_device, z, batch=9, weights=weights, sketch_dim=dim, seed=3, rank=2)
    r = torch.cat([signs(9, dim, torch.device("cpu"), 3, 2, n) for n in range(2)]).double()
    w = torch.ones(18, dtype=torch.float64) if weights is None else weights
    assert found._sketch is not None
    torch.testing.assert_close(found._sketch.rows.cpu().double(), (z.double() * w[:, None]).T @ r, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found._sketch.ones.cpu().double(), w @ r, rtol=1e-5, atol=1e-5)
    again = streamed(triton_device, z, batch=9, weights=weights, sketch_dim=dim, seed=3, rank=2)
    assert again._sketch is not None
    assert torch.equal(found._sketch.rows, again._sketch.rows)
    assert len(found._sketch.ring) == 2


@pytest.mark.interpreted
def test_mining_finds_what_the_tiles_of_backend_torch_find(
    triton_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = tokens(64, 150, 0.1, 11)
    for copy, original in ((7, 3), (149, 148), (130, 2), (60, 20)):
        z[:, copy] = z[:, original] * 2
    z[:, 77] = 0
    found = streamed(triton_device, z, batch=64, sketch_dim=40)
    with use_backend("torch"):
        want = found.pairs(0.8, 1)
    assert len(want) >= 4
    with use_backend("triton"):
        got = found.pairs(0.8, 1)
        assert torch.equal(got.i, want.i)
        assert torch.equal(got.j, want.j)
        monkeypatch.setattr(config, "CAPACITY", 2)
        overflowing = found.pairs(0.8, 1)
        monkeypatch.setattr(config, "CAPACITY", 1 << 20)
        monkeypatch.setattr(sketch_module, "MAX_CANDIDATES", 1)
        best = found.pairs(0.8, 1)
    assert torch.equal(overflowing.i, want.i)
    assert len(best) == 1


@pytest.mark.interpreted
def test_candidates_are_a_superset_in_order(triton_device: torch.device) -> None:
    from transcoder.kernels.correlation import triton_backend

    z = tokens(40, 140, 0.15, 12)
    found = streamed(triton_device, z, batch=40, sketch_dim=16)
    assert found._sketch is not None
    for above in (0.5, 0.2):
        i, j = triton_backend.similar([found._sketch], found._moments, above)
        exact_i, exact_j = sketch_module.candidates([found._sketch], found._moments, above)
        got, want = i * 140 + j, exact_i * 140 + exact_j
        assert bool((got.diff() > 0).all())
        assert set(want.tolist()) <= set(got.tolist())
        assert len(got) <= len(want) + 20
        assert bool((i < j).all())


@pytest.mark.interpreted
def test_nothing_alive_nothing_found(triton_device: torch.device) -> None:
    found = streamed(triton_device, torch.zeros(4, 6), sketch_dim=8)
    with use_backend("triton"):
        assert len(found.pairs(0.5, 1)) == 0


@pytest.mark.interpreted
def test_nan_does_not_fire(triton_device: torch.device) -> None:
    z = tokens(10, 5, 0.9, 13)
    clean = z.clone()
    clean[4, 2] = 0
    codes = codes_on(triton_device, z, keep_zeros=True)
    values = codes.values.clone()
    values[4 * 5 + 2] = torch.nan
    found = FeatureCorrelation(5, device=triton_device)
    with use_backend("triton"):
        found.update(codes.with_values(values))
    assert_matches(found, clean)
