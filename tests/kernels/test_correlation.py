"""FeatureCorrelation against its two-pass float64 definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import FeatureCorrelation, SparseCodes, use_backend
from transcoder.kernels.correlation import sketch as sketch_module
from transcoder.kernels.correlation import torch_backend
from transcoder.kernels.correlation.counter_rng import hash_bits, signs, uniform
from transcoder.kernels.correlation.exact import PackedTriangle, pair_key, pair_of_key
from transcoder.kernels.correlation.reference import correlation_reference
from transcoder.kernels.correlation.statistics import Moments
from transcoder.kernels.correlation.torch_backend import entries_of, pair_pages

CLOSE = 1e-9
"""float64 sums of a few thousand products: rounding near 1e-13, amplified by the cancellation in a
variance."""


def sparse_tokens(tokens: int, d_sae: int, density: float, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(tokens, d_sae, generator=g, dtype=torch.float64) * 3
    keep = torch.rand(tokens, d_sae, generator=g, dtype=torch.float64) < density
    return (z * keep).to(dtype)


def topk_codes(z: Tensor, k: int) -> SparseCodes:
    """Exactly k stored entries a row, zeros among them where a row has fewer positive values."""
    values, indices = z.topk(k, dim=1)
    indices, order = indices.sort(dim=1)
    values = values.gather(1, order)
    row_ptr = torch.arange(0, z.shape[0] * k + 1, k)
    return SparseCodes(values.reshape(-1), indices.reshape(-1), row_ptr, (z.shape[0], z.shape[1]))


def streamed(z: Tensor, batch: int = 16, weights: Tensor | None = None, **options: object) -> FeatureCorrelation:
    found = FeatureCorrelation(z.shape[1], **options)  # type: ignore[arg-type]
    for a in range(0, z.shape[0], batch):
        found.update(SparseCodes.from_dense(z[a : a + batch]), None if weights is None else weights[a : a + batch])
    return found


def all_pairs(d_sae: int) -> tuple[Tensor, Tensor]:
    j, i = torch.tril_indices(d_sae, d_sae, -1)
    return i, j


def assert_matches(found: FeatureCorrelation, z: Tensor, weights: Tensor | None = None) -> None:
    truth = correlation_reference(z, weights)
    i, j = all_pairs(found.d_sae)
    got = found.statistics(i, j)
    torch.testing.assert_close(got.correlation, truth.correlation[i, j].clamp(-1, 1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(got.cosine, truth.cosine[i, j].clamp(max=1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(got.support, truth.union[i, j])
    torch.testing.assert_close(got.jaccard, truth.jaccard[i, j])
    assert torch.equal(found.counts(), truth.fired)


def test_reference_is_numpy_corrcoef_of_columns() -> None:
    z = sparse_tokens(200, 12, 0.4, 0)
    truth = correlation_reference(z).correlation
    np.testing.assert_allclose(truth.numpy(), np.corrcoef(z.double().numpy().T), atol=1e-12)


def test_correlating_tokens_instead_of_latents_is_another_matrix() -> None:
    # The lost project applied torch.corrcoef to [B, N], which correlates tokens: it misses a copied latent.
    z = sparse_tokens(40, 40, 0.2, 1)
    z[:, 7] = z[:, 3]
    found = streamed(z)
    assert float(found.correlation(3, 7)) == pytest.approx(1.0, abs=1e-12)
    tokens_correlated = torch.corrcoef(z.double())
    assert abs(float(tokens_correlated[3, 7])) < 0.9


@pytest.mark.parametrize("density", [0.02, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_pair_matches_float64(density: float, dtype: torch.dtype) -> None:
    z = sparse_tokens(300, 23, density, 2, dtype)
    assert_matches(streamed(z), z)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 40),
    d_sae=st.integers(1, 12),
    density=st.sampled_from([0.0, 0.1, 0.5, 1.0]),
    batch=st.integers(1, 17),
    masking=st.sampled_from(["none", "bool", "weights"]),
    seed=st.integers(0, 10_000),
)
def test_any_stream_any_batching_any_mask(
    tokens: int, d_sae: int, density: float, batch: int, masking: str, seed: int
) -> None:
    z = sparse_tokens(tokens, d_sae, density, seed)
    g = torch.Generator().manual_seed(seed)
    weights: Tensor | None = None
    if masking == "bool":
        weights = torch.rand(tokens, generator=g) < 0.7
    elif masking == "weights":
        weights = (torch.rand(tokens, generator=g) * 2 - 0.4).clamp(min=0)
    if weights is not None and not bool((weights > 0).any()):
        weights[0] = 1
    assert_matches(streamed(z, batch, weights), z, weights)


def test_stored_zeros_do_not_count_as_firing() -> None:
    z = sparse_tokens(64, 20, 0.1, 3)
    found = FeatureCorrelation(20)
    found.update(topk_codes(z, 9))
    assert_matches(found, z)


def test_empty_batches_and_single_latent() -> None:
    found = FeatureCorrelation(1)
    found.update(SparseCodes.from_dense(torch.zeros(0, 1)))
    found.update(SparseCodes.from_dense(torch.tensor([[1.0], [0.0]])))
    assert float(found.correlation(0, 0)) == pytest.approx(1.0)
    assert len(found.pairs(-1.0, 0)) == 0


def test_latents_that_are_nearly_always_on_keep_their_correlation() -> None:
    # Mean 35, sd 0.15: fp32 one-pass sums give a negative variance here.
    g = torch.Generator().manual_seed(4)
    common = torch.randn(6000, 1, generator=g, dtype=torch.float64)
    own = torch.randn(6000, 6, generator=g, dtype=torch.float64)
    share = torch.tensor([0.99, 0.9, 0.7, 0.3, 0.0, 1.0], dtype=torch.float64)
    z = (35 + 0.15 * (share.sqrt() * common + (1 - share).sqrt() * own)).float()
    z[::50, 2] = 0
    fp32 = z.float()
    fp32_variance = (fp32.square().cumsum(0)[-1] / 6000) - (fp32.cumsum(0)[-1] / 6000).square()
    assert float((fp32_variance[0] - z[:, 0].double().var(unbiased=False)).abs()) > 1e-4
    found = streamed(z, 512)
    truth = torch.from_numpy(np.corrcoef(z.double().numpy().T))
    i, j = all_pairs(6)
    torch.testing.assert_close(found.correlation(i, j), truth[i, j], rtol=0, atol=1e-7)


def test_constant_latents_correlate_with_nothing() -> None:
    z = sparse_tokens(100, 4, 0.5, 5)
    z[:, 1] = 3.7
    z[:, 2] = 0
    found = streamed(z)
    assert torch.equal(
        found.correlation(torch.tensor([0, 1, 1, 2]), torch.tensor([1, 2, 3, 3])), torch.zeros(4).double()
    )


def test_correlation_takes_ints_and_broadcasts() -> None:
    z = sparse_tokens(80, 7, 0.5, 6)
    found = streamed(z)
    truth = correlation_reference(z).correlation
    assert found.correlation(2, 5).shape == ()
    table = found.correlation(torch.arange(7)[:, None], torch.arange(7)[None, :])
    torch.testing.assert_close(table, truth, rtol=0, atol=CLOSE)


@pytest.mark.parametrize("threshold", [-1.0, -0.05, 0.0, 0.2, 0.6])
@pytest.mark.parametrize("support", [0, 30])
def test_pairs_are_all_of_them_sorted(threshold: float, support: int) -> None:
    z = sparse_tokens(200, 15, 0.3, 7)
    z[:, 9] = z[:, 2] * 2
    z[:, 12] = z[:, 2] + 0.5 * z[:, 4]
    found = streamed(z)
    truth = correlation_reference(z)
    i, j = all_pairs(15)
    r, union = found.correlation(i, j), truth.union[i, j]
    keep = (r >= threshold) & (union >= support)
    expected = sorted((-float(c), int(a), int(b)) for c, a, b in zip(r[keep], i[keep], j[keep], strict=True))
    got = found.pairs(threshold, support)
    assert [(-float(c), int(a), int(b)) for c, a, b in zip(got.correlation, got.i, got.j, strict=True)] == expected
    assert bool((got.i < got.j).all())
    assert torch.equal(got.support, truth.union[got.i, got.j])


def test_ties_are_sorted_by_latent_and_tiles_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    z = sparse_tokens(60, 1, 0.5, 8).expand(60, 9).contiguous()
    found = streamed(z)
    whole = found.pairs(0.5, 1)
    assert list(zip(whole.i.tolist(), whole.j.tolist(), strict=True)) == [
        (a, b) for a in range(9) for b in range(a + 1, 9)
    ]
    monkeypatch.setattr("transcoder.kernels.correlation.exact.TILE_PAIRS", 5)
    tiled = found.pairs(0.5, 1)
    assert torch.equal(whole.i, tiled.i)
    assert torch.equal(whole.correlation, tiled.correlation)


def test_survey_counts_every_pair_once() -> None:
    z = sparse_tokens(150, 18, 0.15, 9)
    found = streamed(z)
    truth = correlation_reference(z)
    i, j = all_pairs(18)
    edges = torch.linspace(-1, 1, 21, dtype=torch.float64)
    survey = found.survey(0.5, 1, edges)
    r = found.correlation(i, j)
    assert survey.squared_sum == pytest.approx(float(r.square().sum()), abs=1e-9)
    together = truth.joint[i, j] > 0
    expected = torch.histogram(r[together], edges).hist.long()
    assert survey.histogram is not None
    assert torch.equal(survey.histogram, expected)
    assert int(survey.histogram.sum()) == int(together.sum())


def test_pages_of_both_enumerations_are_the_same_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    g = torch.Generator().manual_seed(10)
    lengths = torch.randint(0, 9, (30,), generator=g)
    local = torch.cat([torch.arange(int(n)) for n in lengths])
    rows = torch.repeat_interleave(torch.arange(30), lengths)
    expected = [(p, q) for q in range(len(local)) for p in range(len(local)) if p < q and rows[p] == rows[q]]
    for page in (3, 7, 1 << 17):
        monkeypatch.setattr(torch_backend, "PAGE_PAIRS", page)
        for total in (None, int(local.sum())):
            pages = list(pair_pages(local, total))
            got = [(int(p), int(q)) for early, late in pages for p, q in zip(early, late, strict=True)]
            assert got == expected


def test_the_path_that_reads_nothing_counts_the_same() -> None:
    # What a GPU runs: entries that do not fire stay, and the number of pairs comes from elsewhere.
    z = sparse_tokens(50, 16, 0.2, 11)
    weights = (torch.rand(50, generator=torch.Generator().manual_seed(1)) - 0.3).clamp(min=0).double()
    codes = topk_codes(z, 6)
    sums = []
    for compact in (True, False):
        entries = entries_of(codes, weights, None, torch.int64, compact)
        triangle = PackedTriangle(16, torch.device("cpu"), decayed=False)
        triangle.add(entries, None if compact else int(torch_backend.pair_total(codes)))
        moments = Moments.zeros(16, torch.device("cpu"), decayed=False)
        moments.add(entries, 50, weights)
        sums.append((triangle.product, triangle.joint, moments.total, moments.square, moments.count))
    for left, right in zip(*sums, strict=True):
        torch.testing.assert_close(left, right, rtol=1e-14, atol=0)


def test_keys_and_pairs_are_inverse_up_to_the_widest_dictionary() -> None:
    key = torch.arange(5000)
    i, j = pair_of_key(key)
    assert torch.equal(pair_key(i, j), key)
    assert torch.equal(pair_key(j, i), key)
    corner = torch.tensor([32766, 32767])
    far = pair_key(torch.tensor([0, 32766]), torch.tensor([32767, 32767]))
    assert torch.equal(pair_of_key(far)[1], torch.tensor([32767, 32767]))
    assert torch.equal(pair_of_key(far)[0], torch.tensor([0, corner[0]]))


@pytest.mark.parametrize("options", [{}, {"sketch_dim": 64}, {"halflife": 40.0}])
def test_state_in_the_middle_changes_nothing(options: dict) -> None:
    z = sparse_tokens(160, 30, 0.2, 12)
    z[:, 5] = z[:, 6]
    whole = streamed(z, 20, **options)
    half = streamed(z[:80], 20, **options)
    resumed = FeatureCorrelation(30, **options)
    resumed.load_state_dict(half.state_dict())
    for a in range(80, 160, 20):
        resumed.update(SparseCodes.from_dense(z[a : a + 20]))
    i, j = all_pairs(30)
    assert torch.equal(whole.correlation(i, j), resumed.correlation(i, j))
    assert torch.equal(whole.pairs(0.5, 1).support, resumed.pairs(0.5, 1).support)
    before, after = whole.pairs(0.3, 1), resumed.pairs(0.3, 1)
    assert torch.equal(before.i, after.i)
    assert torch.equal(before.correlation, after.correlation)


def test_state_is_compact_while_few_pairs_met() -> None:
    z = sparse_tokens(10, 200, 0.01, 13)
    assert "key" in streamed(z).state_dict()["pairs"]
    dense = streamed(sparse_tokens(200, 12, 0.9, 13)).state_dict()["pairs"]
    assert "key" not in dense


def test_states_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="d_sae: expected 5 as built, got 4"):
        FeatureCorrelation(5).load_state_dict(FeatureCorrelation(4).state_dict())


def test_merged_parts_equal_the_whole() -> None:
    z = sparse_tokens(400, 25, 0.2, 14)
    whole = streamed(z, 50)
    parts = [streamed(z[a::8], 10) for a in range(8)]
    beside = parts[0].pairs(0.1, 5, beside=parts[1:])
    for part in parts[1:]:
        parts[0].merge(part)
    assert_matches(parts[0], z)
    assert parts[0].tokens_offered == whole.tokens_offered
    merged = parts[0].pairs(0.1, 5)
    assert torch.equal(merged.i, beside.i)
    torch.testing.assert_close(merged.correlation, beside.correlation, rtol=0, atol=CLOSE)


def test_halflife_is_the_weighted_correlation() -> None:
    z = sparse_tokens(300, 10, 0.4, 15)
    z[150:, 3] = z[150:, 4]
    halflife = 37.0
    age = torch.arange(299, -1, -1, dtype=torch.float64)
    weights = torch.exp2(-age / halflife)
    # 300 tokens are 8 half-lives; the shorter one passes 20 and renormalises.
    for h, w in ((halflife, weights), (5.0, torch.exp2(-age / 5.0))):
        found = streamed(z, 30, halflife=h)
        truth = correlation_reference(z, w)
        i, j = all_pairs(10)
        torch.testing.assert_close(found.correlation(i, j), truth.correlation[i, j], rtol=0, atol=1e-8)
    found = streamed(z, 30, halflife=halflife)
    fires = (z > 0).double()
    union = (((fires[:, 3] + fires[:, 4]) > 0).double() * torch.exp2(-(age + 1) / halflife)).sum()
    assert int(found.statistics(torch.tensor([3]), torch.tensor([4])).support) == int(union)


def test_halflife_streams_merge_at_their_ends() -> None:
    z = sparse_tokens(240, 8, 0.5, 16)
    left, right = streamed(z[:120], 30, halflife=4.0), streamed(z[120:], 24, halflife=4.0)
    age = torch.arange(119, -1, -1, dtype=torch.float64).repeat(2)
    truth = correlation_reference(z, torch.exp2(-age / 4.0))
    left.merge(right)
    i, j = all_pairs(8)
    torch.testing.assert_close(left.correlation(i, j), truth.correlation[i, j], rtol=0, atol=1e-8)


def test_counts_widen_before_they_overflow() -> None:
    z = torch.ones(4, 3)
    found = streamed(z)
    assert found._exact is not None
    assert found._exact.joint.dtype == torch.int32
    found.tokens_offered = 2**31 - 2
    found.update(SparseCodes.from_dense(z))
    assert found._exact.joint.dtype == torch.int64
    assert int(found._exact.joint[0]) == 8


def test_bitwise_the_same_with_any_number_of_threads() -> None:
    z = sparse_tokens(512, 300, 0.05, 17)
    threads = torch.get_num_threads()
    states = []
    try:
        for n in (1, 2, 4):
            torch.set_num_threads(n)
            states.append(streamed(z, 256).state_dict())
    finally:
        torch.set_num_threads(threads)
    for other in states[1:]:
        assert torch.equal(states[0]["pairs"]["product"], other["pairs"]["product"])
        assert torch.equal(states[0]["moments"]["square"], other["moments"]["square"])


def test_reset_forgets_statistics_but_not_the_signs() -> None:
    found = streamed(sparse_tokens(30, 6, 0.5, 18), sketch_dim=16)
    made = found.updates
    found.reset()
    assert float(found.effective_tokens()) == 0
    assert found.updates == made > 0


def test_the_sketch_is_unbiased_and_finds_duplicates() -> None:
    d_sae, planted = 400, 40
    z = sparse_tokens(4096, d_sae, 0.03, 19)
    noise = sparse_tokens(4096, planted, 1.0, 20)
    z[:, planted : 2 * planted] = z[:, :planted] * (1 + 0.15 * (noise - 1.5))
    found = streamed(z, 512, sketch_dim=128)
    truth = correlation_reference(z).correlation
    i, j = all_pairs(d_sae)
    error = found.correlation(i, j) - truth[i, j]
    assert float(error.mean().abs()) < 2e-3
    assert float(error.std()) == pytest.approx(1 / 128**0.5, rel=0.1)
    got = found.pairs(0.85, 50)
    exact = streamed(z, 512).pairs(0.85, 50)
    assert len(exact) >= planted
    assert torch.equal(got.i, exact.i)
    assert torch.equal(got.j, exact.j)
    torch.testing.assert_close(got.correlation, exact.correlation, rtol=0, atol=CLOSE)
    assert torch.equal(got.support, exact.support)


def test_sketches_of_ranks_merge_into_one() -> None:
    z = sparse_tokens(1024, 60, 0.1, 21)
    z[:, 31] = z[:, 30]
    ranks = [streamed(z[r::4], 64, sketch_dim=64, rank=r) for r in range(4)]
    for other in ranks[1:]:
        ranks[0].merge(other)
    pairs = ranks[0].pairs(0.8, 20)
    assert (pairs.i.tolist(), pairs.j.tolist()) == ([30], [31])
    assert int(pairs.support) == int((z[:, 30] > 0).sum())


def test_the_ring_is_bounded_and_recent() -> None:
    z = sparse_tokens(400, 20, 0.3, 22)
    z[200:, 7] = z[200:, 8]
    found = streamed(z, 50, sketch_dim=64, ring_tokens=100)
    assert found._sketch is not None
    assert sum(part.tokens for part in found._sketch.ring) == 100
    only = found.statistics(torch.tensor([7]), torch.tensor([8]))
    truth = correlation_reference(z[300:])
    assert float(only.correlation) == pytest.approx(1.0, abs=1e-12)
    assert int(only.support) == int(truth.union[7, 8])


def test_the_sketch_keeps_the_best_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    z = sparse_tokens(512, 40, 0.2, 23)
    z[:, 11] = z[:, 10]
    monkeypatch.setattr(sketch_module, "MAX_CANDIDATES", 3)
    monkeypatch.setattr(sketch_module, "TILE_ROWS", 7)
    monkeypatch.setattr(sketch_module, "TILE_COLUMNS", 5)
    pairs = streamed(z, 128, sketch_dim=64).pairs(0.0, 1)
    assert (int(pairs.i[0]), int(pairs.j[0])) == (10, 11)
    assert len(pairs) <= 3


def test_counter_bits_are_fair_and_keyed() -> None:
    r = signs(4000, 50, torch.device("cpu"), 1, 2, 3)
    assert set(r.unique().tolist()) == {-1.0, 1.0}
    assert float(r.mean().abs()) < 4 / (4000 * 50) ** 0.5
    gram = r.T @ r / 4000 - torch.eye(50)
    assert float(gram.abs().max()) < 6 / 4000**0.5
    other = signs(4000, 50, torch.device("cpu"), 1, 2, 4)
    assert abs(float((r * other).mean())) < 4 / (4000 * 50) ** 0.5
    # A prefix of tokens has the prefix of signs, whatever the batch size.
    assert torch.equal(signs(10, 50, torch.device("cpu"), 1, 2, 3), r[:10])
    u = uniform(torch.arange(20000), 5)
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert float(u.mean()) == pytest.approx(0.5, abs=0.01)
    assert not torch.equal(hash_bits(torch.arange(4), 1, 2), hash_bits(torch.arange(4), 2, 1))


def test_update_does_not_touch_the_graph_or_the_codes() -> None:
    z = sparse_tokens(20, 6, 0.5, 24).requires_grad_()
    codes = SparseCodes.from_dense(z)
    before = codes.values.detach().clone()
    found = FeatureCorrelation(6)
    found.update(codes)
    assert torch.equal(codes.values.detach(), before)
    assert not found.correlation(0, 1).requires_grad


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"d_sae": 0}, ValueError, "d_sae: expected at least 1, got 0"),
        ({"d_sae": 2.5}, TypeError, "d_sae: expected an int"),
        ({"d_sae": 40000}, ValueError, "pass sketch_dim=128"),
        ({"d_sae": 8, "sketch_dim": 4}, ValueError, "sketch_dim: expected at least 8"),
        ({"d_sae": 8, "halflife": 0}, ValueError, "halflife: expected a positive"),
        ({"d_sae": 8, "sketch_margin": 1.0}, ValueError, "sketch_margin"),
        ({"d_sae": 8, "ring_tokens": 0}, ValueError, "ring_tokens"),
        ({"d_sae": 8, "checks": "some"}, ValueError, "checks: expected 'fast' or 'full'"),
    ],
)
def test_bad_arguments(arguments: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FeatureCorrelation(**arguments)


def test_bad_inputs_say_what_was_expected() -> None:
    found = FeatureCorrelation(6, checks="full")
    good = SparseCodes.from_dense(sparse_tokens(5, 6, 0.8, 25))
    with pytest.raises(TypeError, match="expected SparseCodes"):
        found.update(torch.zeros(5, 6))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="expected d_sae = 6 latents, got shape"):
        found.update(SparseCodes.from_dense(torch.ones(2, 7)))
    with pytest.raises(ValueError, match=r"mask: expected shape \[5\], got \[4\]"):
        found.update(good, torch.ones(4))
    with pytest.raises(TypeError, match="mask: expected a bool or floating"):
        found.update(good, torch.ones(5, dtype=torch.int64))
    with pytest.raises(ValueError, match="mask: expected finite weights"):
        found.update(good, torch.tensor([1.0, 1, -1, 1, 1]))
    meta = SparseCodes(good.values.to("meta"), good.indices.to("meta"), good.row_ptr.to("meta"), good.shape)
    with pytest.raises(ValueError, match="expected device cpu, got meta"):
        found.update(meta)
    with pytest.raises(ValueError, match="got nan for latent"):
        found.update(good.with_values(torch.full_like(good.values, float("nan"))))
    with pytest.raises(ValueError, match="ascending, unique"):
        found.update(SparseCodes(torch.ones(2), torch.tensor([3, 1]), torch.tensor([0, 2]), (1, 6)))
    with pytest.raises(ValueError, match=r"expected latents in \[0, 6\), got 6"):
        found.correlation(6, 0)
    with pytest.raises(TypeError, match="integer latent ids"):
        found.correlation(torch.tensor([0.5]), 0)
    with pytest.raises(ValueError, match=r"min_correlation: expected in \[-1, 1\]"):
        found.pairs(1.5)
    with pytest.raises(ValueError, match="min_support"):
        found.pairs(0.5, -1)
    with pytest.raises(ValueError, match="expected equal d_sae"):
        found.merge(FeatureCorrelation(5))
    with pytest.raises(TypeError, match="expected a FeatureCorrelation"):
        found.merge(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="without a half-life"):
        FeatureCorrelation(6, halflife=9).pairs(0.5, beside=[found])
    with pytest.raises(ValueError, match="more than 500 half-lives"):
        FeatureCorrelation(6, halflife=0.001).update(good)
    with use_backend("triton"), pytest.raises(RuntimeError, match="requested by name"):
        found.update(good)


@pytest.mark.parametrize("options", [{}, {"halflife": 40.0}, {"sketch_dim": 16}])
def test_forgetting_latents_is_a_stream_on_which_they_never_fired(options: dict[str, object]) -> None:
    z = sparse_tokens(120, 14, 0.4, 5)
    found = streamed(z, **options)
    found.forget(torch.tensor([3, 0, 13]))
    silent = z.clone()
    silent[:, [0, 3, 13]] = 0
    never = streamed(silent, **options)
    i, j = all_pairs(14)
    for mine, theirs in zip(vars(found.statistics(i, j)).values(), vars(never.statistics(i, j)).values(), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(found.counts(), never.counts())
    torch.testing.assert_close(found.correlation(i, j), never.correlation(i, j), rtol=0, atol=1e-5)
    # The stream goes on, and the latents with it.
    found.update(SparseCodes.from_dense(z[:30]))
    never.update(SparseCodes.from_dense(z[:30]))
    assert torch.equal(found.counts(), never.counts())
    assert float(found.counts()[3]) > 0
    with pytest.raises(ValueError, match="latents"):
        found.forget(torch.tensor([14]))
