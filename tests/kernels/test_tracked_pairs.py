"""Watched pairs of a sketch: exact from the ring on, whatever happens to the statistics in between."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from transcoder.kernels import FeatureCorrelation, SparseCodes, use_backend
from transcoder.kernels.correlation import op as op_module
from transcoder.kernels.correlation import sketch as sketch_module
from transcoder.kernels.correlation import torch_backend
from transcoder.kernels.correlation.exact import PackedTriangle, pair_key
from transcoder.kernels.correlation.reference import correlation_reference
from transcoder.kernels.correlation.statistics import PairStatistics
from transcoder.kernels.correlation.torch_backend import entries_of
from transcoder.kernels.correlation.tracked_pairs import PairIndex

D, DIM, RING, BATCH = 24, 32, 100, 20
CLOSE = 1e-9


def tokens(count: int, seed: int, d_sae: int = D, density: float = 0.3) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(count, d_sae, generator=g) * 3 * (torch.rand(count, d_sae, generator=g) < density)
    z[:, 5] = z[:, 4] * 2
    z[:, 7] = 2.0  # always on: the partner of a hub
    return z


def weights_of(count: int, kind: str, seed: int = 0) -> Tensor | None:
    draw = torch.rand(count, generator=torch.Generator().manual_seed(seed))
    return {"none": None, "bool": draw < 0.7, "weights": (draw * 2 - 0.4).clamp(min=0)}[kind]


def feed(found: FeatureCorrelation, z: Tensor, weights: Tensor | None = None) -> FeatureCorrelation:
    for a in range(0, z.shape[0], BATCH):
        codes = SparseCodes.from_dense(z[a : a + BATCH])
        found.update(codes, None if weights is None else weights[a : a + BATCH])
    return found


def sketched(d_sae: int = D, **options: object) -> FeatureCorrelation:
    return FeatureCorrelation(d_sae, DIM, **{"ring_tokens": RING, **options})  # type: ignore[arg-type]


def all_pairs(d_sae: int = D) -> tuple[Tensor, Tensor]:
    j, i = torch.tril_indices(d_sae, d_sae, -1)
    return i, j


def some_pairs(seed: int, count: int = 90) -> tuple[Tensor, Tensor]:
    i, j = all_pairs()
    chosen = torch.randperm(i.numel(), generator=torch.Generator().manual_seed(seed))[:count]
    return i[chosen], j[chosen]


def assert_over(got: PairStatistics, z: Tensor, weights: Tensor | None = None) -> None:
    """Exact over all of these tokens."""
    truth = correlation_reference(z, weights)
    i, j = got.i, got.j
    torch.testing.assert_close(got.correlation, truth.correlation[i, j].clamp(-1, 1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(got.cosine, truth.cosine[i, j].clamp(max=1), rtol=0, atol=CLOSE)
    torch.testing.assert_close(got.jaccard, truth.jaccard[i, j])
    assert torch.equal(got.support, truth.union[i, j])
    whole = float(len(z) if weights is None else weights.double().sum())
    torch.testing.assert_close(got.weight, torch.full_like(got.weight, whole), rtol=0, atol=CLOSE)


def assert_same(left: object, right: object) -> None:
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()  # type: ignore[attr-defined]
        for name in left:
            assert_same(left[name], right[name])  # type: ignore[index]
    elif isinstance(left, Tensor):
        assert torch.equal(left, right), (left, right)  # type: ignore[arg-type]
    else:
        assert left == right


@pytest.mark.parametrize("kind", ["none", "bool", "weights"])
def test_a_watched_pair_is_exact_since_the_ring_began(kind: str) -> None:
    z, weights = tokens(600, 1), weights_of(600, kind)
    found = feed(sketched(), z[:300], None if weights is None else weights[:300])
    i, j = some_pairs(2)
    # In any order, several times, a latent with itself among them.
    found.watch(torch.cat([j, i[:9], i[:2]]), torch.cat([i, j[:9], i[:2]]))
    for end in (300, 600):
        first = max(0, end - RING)
        seen = None if weights is None else weights[200:end]
        assert_over(found.statistics(i, j), z[200:end], seen)
        assert_over(found.statistics(j, i), z[200:end], seen)
        known = set(zip(i.tolist(), j.tolist(), strict=True))
        rest = [p for p in zip(*(part.tolist() for part in all_pairs()), strict=True) if p not in known]
        others = torch.tensor(rest).T
        assert_over(found.statistics(*others), z[first:end], None if weights is None else weights[first:end])
        feed(found, z[end:], None if weights is None else weights[end:])


def test_mixed_questions_are_answered_in_their_order() -> None:
    z = tokens(400, 3)
    found = feed(sketched(), z[:200])
    found.watch(*some_pairs(4))
    feed(found, z[200:])
    i, j = torch.randint(0, D, (2, 300), generator=torch.Generator().manual_seed(5))
    got = found.statistics(i, j)
    assert torch.equal(got.i, i)
    assert torch.equal(got.j, j)
    watched = {tuple(sorted(p)) for p in zip(*(part.tolist() for part in some_pairs(4)), strict=True)}
    inside = torch.tensor([tuple(sorted(p)) in watched for p in zip(i.tolist(), j.tolist(), strict=True)])
    for chosen, first in ((inside, 100), (~inside, 300)):
        assert_over(PairStatistics(*(part[chosen] for part in vars(got).values())), z[first:])


def test_a_rare_pair_is_found_only_where_it_is_watched() -> None:
    z = tokens(1200, 6, density=0.1)
    z[:, 1:3] = 0
    rare = torch.arange(0, 1200, 25)  # 48 tokens of 1200, 4 of the 100 in the ring
    z[rare, 1] = 1 + torch.rand(48, generator=torch.Generator().manual_seed(7))
    z[rare, 2] = z[rare, 1]
    for watching in (False, True):
        found = sketched()
        for a in range(0, 1200, 100):
            feed(found, z[a : a + 100])
            survey = found.survey(0.8, 40)
            assert survey.candidates is not None
            assert (1, 2) in set(zip(*(part.tolist() for part in survey.candidates), strict=True))
            if watching:
                found.watch(*survey.candidates)
        pairs = found.pairs(0.8, 40)
        seen = dict(zip(zip(pairs.i.tolist(), pairs.j.tolist(), strict=True), range(len(pairs)), strict=True))
        assert ((1, 2) in seen) == watching
    assert int(pairs.support[seen[1, 2]]) == 48
    assert float(pairs.weight[seen[1, 2]]) == 1200
    assert float(pairs.correlation[seen[1, 2]]) == pytest.approx(1.0, abs=1e-12)


def test_a_new_list_keeps_the_counts_of_those_that_stay() -> None:
    z = tokens(700, 8)
    i, j = all_pairs()
    found = feed(sketched(), z[:200])
    found.watch(i[:100], j[:100])
    feed(found, z[200:400].clone())
    before = found.state_dict()["pairs"]["watched"]
    found.watch(i[50:150], j[50:150])
    after = found.state_dict()["pairs"]["watched"]
    # Not a bit of what they know has changed.
    key, old = after["i"] * D + after["j"], before["i"] * D + before["j"]
    stay, was = torch.isin(key, old), torch.isin(old, key)
    assert int(stay.sum()) == 50
    for name in before:
        assert torch.equal(after[name][..., stay], before[name][..., was]), name
    feed(found, z[400:])
    for part, first in ((slice(0, 50), 600), (slice(50, 100), 100), (slice(100, 150), 300), (slice(150, 200), 600)):
        assert_over(found.statistics(i[part], j[part]), z[first:])
    found.watch(i[:0], j[:0])
    assert_over(found.statistics(i, j), z[600:])
    assert "watched" not in found.state_dict()["pairs"]


def test_watching_a_pair_that_is_watched_does_not_matter() -> None:
    z, weights = tokens(400, 9), weights_of(400, "weights")
    assert weights is not None
    once, often = (feed(sketched(), z[:200], weights[:200]) for _ in range(2))
    once.watch(*some_pairs(10))
    for a in range(200, 400, BATCH):
        often.watch(*some_pairs(10))
        for part in (once, often):
            feed(part, z[a : a + BATCH], weights[a : a + BATCH])
    assert_same(once.state_dict(), often.state_dict())


def test_no_more_are_watched_than_may_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketch_module, "MAX_WATCHED", 10)
    monkeypatch.setattr(sketch_module, "ESTIMATED_TOGETHER", 7)
    z = tokens(300, 11)
    found = feed(sketched(), z)
    i, j = all_pairs()
    found.watch(i, j)
    estimate = found.correlation(i, j)
    best = estimate.topk(10).indices
    watched = found.state_dict()["pairs"]["watched"]
    assert set(zip(watched["i"].tolist(), watched["j"].tolist(), strict=True)) == set(
        zip(i[best].tolist(), j[best].tolist(), strict=True)
    )
    other = feed(sketched(rank=1), tokens(300, 12))
    other.watch(i[:9], j[:9])
    found.merge(other)
    assert found.state_dict()["pairs"]["watched"]["i"].numel() == 10


@pytest.mark.parametrize("kind", ["none", "weights"])
def test_resuming_in_the_middle_changes_no_bit(kind: str) -> None:
    z, weights = tokens(600, 13), weights_of(600, kind)

    def part(found: FeatureCorrelation, a: int, b: int) -> None:
        feed(found, z[a:b], None if weights is None else weights[a:b])

    whole = sketched()
    part(whole, 0, 200)
    whole.watch(*some_pairs(14))
    part(whole, 200, 400)
    resumed = sketched()
    resumed.load_state_dict(copy.deepcopy(whole.state_dict()))
    for found in (whole, resumed):
        part(found, 400, 500)
        found.watch(*some_pairs(15))
        part(found, 500, 600)
    assert_same(whole.state_dict(), resumed.state_dict())
    for left, right in zip(
        vars(whole.statistics(*all_pairs())).values(), vars(resumed.statistics(*all_pairs())).values(), strict=True
    ):
        assert torch.equal(left, right)
    # A state without watched pairs takes those that are here away.
    resumed.load_state_dict(feed(sketched(), z).state_dict())
    assert_over(resumed.statistics(*all_pairs()), z[-RING:])


WATCHED = ("i", "j", "weight", "total", "square", "fired", "product", "joint")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        *((name, None, f"pairs.watched: expected a field '{name}'") for name in WATCHED),
        ("more", torch.zeros(3), "pairs.watched: unknown field 'more'"),
        ("i", torch.zeros(3), "pairs.watched.i: expected torch.int64"),
        ("j", torch.tensor([1, 2]), r"pairs.watched.j: expected shape \[3\], got \[2\]"),
        ("joint", torch.zeros(3), "pairs.watched.joint: expected torch.int64"),
        ("total", torch.zeros(3).double(), r"pairs.watched.total: expected shape \[2, 3\], got \[3\]"),
        ("i", torch.tensor([0, 0, 9]), f"pairs.watched.i, j: expected 0 <= i < j < {D}"),
        ("j", torch.tensor([1, 2, D]), f"pairs.watched.i, j: expected 0 <= i < j < {D}"),
        ("i", torch.tensor([-1, 0, 1]), f"pairs.watched.i, j: expected 0 <= i < j < {D}"),
        ("j", torch.tensor([2, 1, 3]), "pairs.watched.i, j: expected pairs that ascend"),
        ("j", torch.tensor([1, 1, 3]), "pairs.watched.i, j: expected pairs that ascend"),
    ],
)
def test_a_watched_state_that_does_not_fit_changes_nothing(field: str, value: Tensor | None, words: str) -> None:
    i, j = torch.tensor([0, 0, 1]), torch.tensor([1, 2, 3])
    found, other = (feed(sketched(), tokens(100, seed)) for seed in (16, 17))
    for part in (found, other):
        part.watch(i, j)
    before = copy.deepcopy(found.state_dict())
    state = copy.deepcopy(other.state_dict())
    if value is None:
        del state["pairs"]["watched"][field]
    else:
        state["pairs"]["watched"][field] = value
    with pytest.raises(ValueError, match="load_state_dict: " + words):
        found.load_state_dict(state)
    assert_same(found.state_dict(), before)


def test_a_loaded_state_is_not_written_to() -> None:
    one = feed(sketched(), tokens(200, 18))
    one.watch(*some_pairs(19))
    state = one.state_dict()
    before = copy.deepcopy(state)
    loaded = sketched()
    loaded.load_state_dict(state)
    feed(loaded, tokens(100, 20))
    loaded.forget(torch.tensor([3]))
    assert_same(state, before)


def test_merging_adds_what_both_know() -> None:
    left_z, right_z = tokens(400, 21), tokens(400, 22)
    i, j = all_pairs()
    both, mine, theirs, neither = (slice(n, n + 40) for n in (0, 40, 80, 120))

    def part(z: Tensor, rank: int, *own: slice) -> FeatureCorrelation:
        found = feed(sketched(rank=rank), z[:200])
        found.watch(torch.cat([i[s] for s in own]), torch.cat([j[s] for s in own]))
        return feed(found, z[200:])

    left, right = part(left_z, 0, both, mine), part(right_z, 1, both, theirs)
    untouched = copy.deepcopy(right.state_dict())
    spans = ((both, 100, 100), (mine, 100, 300), (theirs, 300, 100), (neither, 300, 300))
    for pairs, a, b in spans:
        assert_over(left.statistics(i[pairs], j[pairs], beside=[right]), torch.cat([left_z[a:], right_z[b:]]))
    left.merge(right)
    assert_same(right.state_dict(), untouched)
    more = tokens(60, 23)
    feed(left, more)
    for pairs, a, b in spans[:3]:
        assert_over(left.statistics(i[pairs], j[pairs]), torch.cat([left_z[a:], right_z[b:], more]))
    # One that never watched takes over the list of one that did.
    fresh = sketched(rank=2)
    fresh.merge(part(left_z, 0, both))
    feed(fresh, more)
    assert_over(fresh.statistics(i[both], j[both]), torch.cat([left_z[100:], more]))


def test_forgotten_latents_never_fired_in_watched_pairs_either() -> None:
    z, gone = tokens(400, 24), torch.tensor([4, 0, 23])
    silent = z.clone()
    silent[:200, gone] = 0
    states = []
    for stream in (z, silent):
        found = feed(sketched(), stream[:140])
        found.watch(*all_pairs())
        feed(found, stream[140:200])
        found.forget(gone)
        assert_over(found.statistics(*all_pairs()), silent[40:200])
        feed(found, stream[200:])
        states.append(found.state_dict()["pairs"]["watched"])
        assert_over(found.statistics(*all_pairs()), torch.cat([silent[40:200], z[200:]]))
    for name in WATCHED:
        torch.testing.assert_close(*(state[name] for state in states), rtol=0, atol=CLOSE)


def test_a_reset_watches_nothing() -> None:
    z = tokens(400, 25)
    found = feed(sketched(), z[:200])
    found.watch(*all_pairs())
    found.reset()
    feed(found, z[200:])
    assert_over(found.statistics(*all_pairs()), z[300:])
    found.reset()
    # Watched before the first token: everything counts.
    found.watch(*some_pairs(26))
    feed(found, z)
    assert_over(found.statistics(*some_pairs(26)), z)


def test_exact_counts_need_no_list() -> None:
    z = tokens(200, 27)
    plain, watching = (FeatureCorrelation(D) for _ in range(2))
    for part in (plain, watching):
        feed(part, z[:100])
        if part is watching:
            part.watch(*some_pairs(28))
        feed(part, z[100:])
    assert_same(plain.state_dict(), watching.state_dict())
    assert plain.survey(0.5).candidates is None
    got = plain.statistics(*all_pairs())
    assert bool((got.weight == 200).all())


def test_what_cannot_be_watched_is_refused() -> None:
    z = tokens(100, 29)
    one = torch.tensor([1])
    for options in ({}, {"sketch_dim": DIM}):
        found = feed(FeatureCorrelation(D, **options), z)  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=rf"j: expected latents in \[0, {D}\), got {D}"):
            found.watch(one, torch.tensor([D]))
        with pytest.raises(ValueError, match=r"watch: i, j: expected two of one length \[P\], got \[1\] and \[2\]"):
            found.watch(one, torch.tensor([1, 2]))
        with pytest.raises(TypeError, match="i: expected integer latent ids"):
            found.watch(one.float(), one)
    fading = feed(FeatureCorrelation(D, DIM, halflife=50.0), z)
    before = copy.deepcopy(fading.state_dict())
    with pytest.raises(ValueError, match=r"watch: expected statistics without a half-life, got 50\.0"):
        fading.watch(one, one + 1)
    assert_same(fading.state_dict(), before)


@pytest.mark.parametrize("page", [5, 1 << 17])
def test_pairs_found_from_the_rarer_latent_are_those_of_the_triangle(
    page: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_backend, "PAGE_PAIRS", page)
    z = tokens(80, 30)
    z[:, 9] = 0  # a latent without an entry
    # Of so many digits that the order of a product's factors shows.
    weights = torch.rand(80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    values, indices = z.topk(9, dim=1)
    indices, order = indices.sort(dim=1)
    codes = SparseCodes(values.gather(1, order).flatten(), indices.flatten(), torch.arange(0, 721, 9), (80, D))
    i, j = some_pairs(31, 120)
    triangle = PackedTriangle(D, torch.device("cpu"), decayed=False)
    for compact in (True, False):
        entries = entries_of(codes, weights, None, torch.int64, compact)
        if compact:
            triangle.add(entries, None)
        index = PairIndex(D, i, j, (z > 0).sum(0))
        product, joint = torch.zeros(120, dtype=torch.float64), torch.zeros(120, dtype=torch.int64)
        # Without compaction as on a GPU: the size comes from elsewhere, nothing is read.
        index.add(entries, None if compact else int(index.look_ups(entries.latent)), product, joint)
        assert torch.equal(product, triangle.product[pair_key(i, j)])
        assert torch.equal(joint, triangle.joint[pair_key(i, j)].long())
    # The always-on latent owns nothing: its pairs belong to the others.
    assert int(index.degree[7]) == 0
    assert int(((i == 7) | (j == 7)).sum()) > 0


def test_updates_on_a_gpu_wait_for_their_size_and_reading_takes_them_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """The path of a device whose sizes arrive later, played on this one."""
    z, weights = tokens(400, 32), weights_of(400, "weights")
    assert weights is not None
    read: list[int] = []

    class Late:
        def __init__(self, size: Tensor) -> None:
            self.size = int(size)

        def arrived(self) -> bool:
            return False

        def read(self) -> int:
            read.append(self.size)
            return self.size

    monkeypatch.setattr(op_module, "DeferredSize", Late)
    plain, late = (feed(sketched(), z[:200], weights[:200]) for _ in range(2))
    for part in (plain, late):
        part.watch(*some_pairs(33))
    late.device = SimpleNamespace(type="cuda")  # type: ignore[assignment]
    monkeypatch.setattr(op_module, "check_update", lambda *_: None)
    for a in range(200, 400, BATCH):
        codes = SparseCodes.from_dense(z[a : a + BATCH])
        plain.update(codes, weights[a : a + BATCH])
        late.update(codes, weights[a : a + BATCH])
        # The caller fills its buffers again.
        for part in (codes.values, codes.indices):
            part.zero_()
    assert len(late._pending) == op_module.PENDING_LIMIT
    assert len(read) == 10 - op_module.PENDING_LIMIT
    late.device = plain.device
    assert_same(late.state_dict()["pairs"]["watched"], plain.state_dict()["pairs"]["watched"])
    assert len(read) == 10


@pytest.mark.usefixtures("interpreted_again")
def test_in_the_interpreter() -> None:
    """In a process of its own."""


@pytest.mark.interpreted
@pytest.mark.parametrize("weighted", [pytest.param(False, marks=pytest.mark.slow), True])
def test_backend_triton_counts_watched_pairs_too(weighted: bool, triton_device: torch.device) -> None:
    z = tokens(240, 34)
    weights = weights_of(240, "weights") if weighted else None
    i, j = (part.to(triton_device) for part in some_pairs(35))
    found = sketched(device=triton_device)
    with use_backend("triton"):
        for a in range(0, 240, BATCH):
            if a == 120:
                found.watch(i, j)
            w = None if weights is None else weights[a : a + BATCH].to(triton_device)
            found.update(SparseCodes.from_dense(z[a : a + BATCH].to(triton_device)), w)
        got = found.statistics(i, j)
    got = PairStatistics(*(part.cpu() for part in vars(got).values()))
    assert_over(got, z[20:], None if weights is None else weights[20:])
