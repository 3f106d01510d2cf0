"""Sketch mode: given pairs are answered as they were asked, signs serve one token, dtypes do not drift."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.kernels import FeatureCorrelation, SparseCodes
from transcoder.kernels.correlation.counter_rng import signs
from transcoder.kernels.correlation.reference import correlation_reference


def sparse_tokens(tokens: int, d_sae: int, density: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(tokens, d_sae, generator=g, dtype=torch.float64) * 3
    return (z * (torch.rand(tokens, d_sae, generator=g, dtype=torch.float64) < density)).float()


def streamed(z: Tensor, batch: int = 16, weights: Tensor | None = None, **options: object) -> FeatureCorrelation:
    found = FeatureCorrelation(z.shape[1], **options)  # type: ignore[arg-type]
    for a in range(0, z.shape[0], batch):
        found.update(SparseCodes.from_dense(z[a : a + batch]), None if weights is None else weights[a : a + batch])
    return found


@settings(max_examples=60, deadline=None)
@given(
    d_sae=st.integers(1, 9),
    tokens=st.integers(1, 40),
    pairs=st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=30),
    sketched=st.booleans(),
    weighted=st.booleans(),
    seed=st.integers(0, 10**6),
)
def test_pairs_are_answered_in_the_order_asked(
    d_sae: int, tokens: int, pairs: list[tuple[int, int]], sketched: bool, weighted: bool, seed: int
) -> None:
    """Any pairs: repeated, i > j, i == j, none at all; both modes alike."""
    z = sparse_tokens(tokens, d_sae, 0.4, seed)
    if d_sae > 2:
        z[:, 2] = 0
    weights = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)).double() if weighted else None
    found = streamed(z, 16, weights, sketch_dim=8 if sketched else None)
    i, j = (torch.tensor([p[side] % d_sae for p in pairs], dtype=torch.int64) for side in (0, 1))
    got, truth = found.statistics(i, j), correlation_reference(z, weights)
    assert torch.equal(got.i, i)
    assert torch.equal(got.j, j)
    torch.testing.assert_close(got.correlation, truth.correlation[i, j].clamp(-1, 1), rtol=0, atol=1e-9)
    torch.testing.assert_close(got.cosine, truth.cosine[i, j].clamp(max=1), rtol=0, atol=1e-9)
    torch.testing.assert_close(got.support, truth.union[i, j])
    torch.testing.assert_close(got.jaccard, truth.jaccard[i, j])
    turned = found.statistics(j, i)
    for name in ("correlation", "cosine", "jaccard", "support"):
        assert torch.equal(getattr(turned, name), getattr(got, name)), name


def test_the_diagonal_is_one_where_a_latent_varies() -> None:
    z = sparse_tokens(100, 5, 0.5, 0)
    z[:, 1], z[:, 3] = 2.0, 0.0
    every = torch.arange(5)
    for dim in (None, 16):
        got = streamed(z, sketch_dim=dim).statistics(every, every)
        torch.testing.assert_close(got.correlation, torch.tensor([1.0, 0, 1, 0, 1], dtype=torch.float64))
        torch.testing.assert_close(got.cosine, torch.tensor([1.0, 1, 1, 0, 1], dtype=torch.float64))
        assert torch.equal(got.support, (z > 0).sum(0))


def sketched(z: Tensor, updates: int = 0, **options: object) -> FeatureCorrelation:
    found = FeatureCorrelation(z.shape[1], 64, **options)  # type: ignore[arg-type]
    found.updates = updates
    for a in range(0, z.shape[0], 32):
        found.update(SparseCodes.from_dense(z[a : a + 32]))
    return found


def test_signs_that_serve_two_tokens_are_refused() -> None:
    z = sparse_tokens(128, 20, 0.3, 1)
    left, right = sketched(z[:64]), sketched(z[64:])
    before = left.state_dict()["pairs"]["rows"].clone()
    with pytest.raises(ValueError, match=r"merge: .*seed 0, rank 0.*updates 0 \.\. 1.*its own rank"):
        left.merge(right)
    with pytest.raises(ValueError, match=r"beside: .*its own rank"):
        left.pairs(0.5, beside=[right])
    with pytest.raises(ValueError, match=r"beside: .*its own rank"):
        left.pairs(0.5, beside=[sketched(z, rank=1), sketched(z, rank=1)])
    with pytest.raises(ValueError, match="got these statistics themselves"):
        left.merge(left)
    assert torch.equal(left.state_dict()["pairs"]["rows"], before)


def test_ranks_and_blocks_of_one_stream_add_up() -> None:
    z = sparse_tokens(256, 20, 0.3, 2)
    whole = sketched(z)
    block, later = sketched(z[:128]), sketched(z[128:], updates=4)
    assert len(block.pairs(0.0, 1, beside=[later])) == len(whole.pairs(0.0, 1))
    block.merge(later)
    torch.testing.assert_close(block.state_dict()["pairs"]["rows"], whole.state_dict()["pairs"]["rows"])
    torch.testing.assert_close(block.state_dict()["pairs"]["ones"], whole.state_dict()["pairs"]["ones"])
    other = sketched(z, rank=1)
    block.merge(other)
    with pytest.raises(ValueError, match=r"rank 1.*updates 0"):
        block.merge(other)
    with pytest.raises(ValueError, match=r"rank 0.*updates 6 \.\. 7"):
        block.merge(sketched(z[:64], updates=6))


@pytest.mark.parametrize("first", ["earlier", "later"])
def test_signs_go_on_behind_all_that_were_merged(first: str) -> None:
    z = sparse_tokens(192, 20, 0.3, 3)
    whole = sketched(z)
    parts = [sketched(z[:64]), sketched(z[64:128], updates=2)]
    found, other = parts if first == "earlier" else parts[::-1]
    found.merge(other)
    for a in (128, 160):
        found.update(SparseCodes.from_dense(z[a : a + 32]))
    torch.testing.assert_close(found.state_dict()["pairs"]["rows"], whole.state_dict()["pairs"]["rows"])
    assert found.updates == whole.updates


def test_a_state_remembers_whose_signs_it_holds() -> None:
    z = sparse_tokens(64, 20, 0.3, 4)
    left, right = sketched(z, seed=3, rank=2), FeatureCorrelation(20, 64, seed=3, rank=2)
    right.load_state_dict(left.state_dict())
    with pytest.raises(ValueError, match="seed 3, rank 2"):
        left.merge(right)
    for option, value in (("seed", 4), ("rank", 1)):
        with pytest.raises(ValueError, match=f"{option}: expected {value} as built, got"):
            FeatureCorrelation(20, 64, **{"seed": 3, "rank": 2, option: value}).load_state_dict(left.state_dict())


def test_a_reset_gives_the_signs_free_only_for_other_tokens() -> None:
    z = sparse_tokens(64, 20, 0.3, 5)
    found, other = sketched(z), sketched(z)
    found.reset()
    # Nothing of updates 0 .. 1 is in the sums any more, and the next update is number 2.
    found.merge(other)
    assert found.updates == 2


def test_seed_and_rank_mean_nothing_where_counts_are_exact() -> None:
    z = sparse_tokens(64, 20, 0.3, 6)
    whole, left, right = streamed(z), streamed(z[:32], seed=1), streamed(z[32:], seed=2, rank=3)
    assert len(left.pairs(0.1, beside=[right])) == len(whole.pairs(0.1))
    left.merge(right)
    assert torch.equal(left.counts(), whole.counts())
    loaded = FeatureCorrelation(20, seed=5, rank=6)
    loaded.load_state_dict(left.state_dict())
    assert torch.equal(loaded.counts(), whole.counts())


@pytest.mark.parametrize(("name", "value"), [("seed", 1), ("sketch_dim", 32)])
def test_sketches_of_another_kind_do_not_add_up(name: str, value: int) -> None:
    z = sparse_tokens(32, 20, 0.3, 7)
    one = streamed(z, sketch_dim=64, seed=0)
    other = streamed(z, **{"sketch_dim": 64, "seed": 0, "rank": 1, name: value})
    with pytest.raises(ValueError, match=f"expected equal {name}"):
        one.merge(other)
    with pytest.raises(ValueError, match=name):
        one.pairs(0.5, beside=[other])


@pytest.mark.parametrize("name", ["seed", "rank"])
@pytest.mark.parametrize("value", [0.5, True, None, "0"])
def test_seed_and_rank_are_whole_numbers(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name}: expected an int"):
        FeatureCorrelation(4, 8, **{name: value})  # type: ignore[arg-type]


@pytest.fixture
def default_dtype() -> Iterator[None]:
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


def tensors(node: object, name: str = "") -> Iterator[tuple[str, Tensor]]:
    if isinstance(node, Tensor):
        yield name, node
    elif isinstance(node, dict):
        for key, part in node.items():
            yield from tensors(part, f"{name}.{key}")


@pytest.mark.parametrize("options", [{}, {"sketch_dim": 40}, {"halflife": 30.0}, {"sketch_dim": 40, "halflife": 30.0}])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_default_dtype_changes_nothing(options: dict, dtype: torch.dtype, default_dtype: None) -> None:
    z = sparse_tokens(96, 12, 0.4, 8)
    weights = torch.rand(96, generator=torch.Generator().manual_seed(0), dtype=torch.float32)
    i, j = torch.arange(12)[:, None], torch.arange(12)[None, :]

    def run() -> dict[str, Tensor]:
        found = streamed(z, 16, weights, **options)
        loaded = FeatureCorrelation(12, **options)
        loaded.load_state_dict(found.state_dict())
        beside = {} if "halflife" in options else {"beside": [FeatureCorrelation(12, **options)]}
        pairs = loaded.survey(0.1, 1, torch.linspace(-1, 1, 9, dtype=torch.float64), **beside).pairs
        state = dict(tensors(loaded.state_dict()))
        assert {t.dtype for t in state.values()} <= {torch.float32, torch.float64, torch.int32, torch.int64}
        return {**state, "correlation": loaded.correlation(i, j), **vars(pairs), "signs": signs(3, 40, z.device, 1)}

    before = run()
    torch.set_default_dtype(dtype)
    for name, part in run().items():
        assert part.dtype == before[name].dtype, name
        assert torch.equal(part, before[name]), name


def test_the_ring_keeps_no_buffer_of_the_caller() -> None:
    z = sparse_tokens(40, 6, 0.5, 9)
    codes, mask = SparseCodes.from_dense(z), torch.ones(40, dtype=torch.float64)
    found = FeatureCorrelation(6, 16)
    found.update(codes, mask)
    before = found.statistics(torch.tensor([0]), torch.tensor([1]))
    for buffer in (mask, codes.values, codes.indices, codes.row_ptr):
        buffer.zero_()
    after = found.statistics(torch.tensor([0]), torch.tensor([1]))
    assert torch.equal(before.correlation, after.correlation)
    assert torch.equal(before.support, after.support)


@pytest.mark.parametrize("options", [{}, {"sketch_dim": 40}, {"halflife": 30.0}])
def test_a_default_device_is_not_the_codes_device(options: dict) -> None:
    z = sparse_tokens(64, 12, 0.4, 10)
    codes, weights = SparseCodes.from_dense(z), torch.rand(64)
    i = torch.arange(12)

    def run() -> list[Tensor]:
        found = FeatureCorrelation(12, device="cpu", **options)
        found.update(SparseCodes(codes.values, codes.indices, codes.row_ptr, codes.shape), weights)
        loaded = FeatureCorrelation(12, device="cpu", **options)
        loaded.load_state_dict(found.state_dict())
        merged = FeatureCorrelation(12, device="cpu", **options)
        merged.merge(loaded)
        return [merged.correlation(i, 3), *vars(merged.pairs(0.0, 1)).values(), *vars(merged.statistics(i, i)).values()]

    want = run()
    with torch.device("meta"):
        got = run()
    for left, right in zip(got, want, strict=True):
        assert torch.equal(left, right)
