"""What FeatureCorrelation refuses: states that do not fit, ids that name no latent. Nothing changes then."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from transcoder.kernels import FeatureCorrelation, SparseCodes

MODES = {"exact": {}, "sketch": {"sketch_dim": 16}, "halflife": {"halflife": 50.0}}


def tokens(count: int, d_sae: int, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(count, d_sae, generator=g)
    return z * (torch.rand(count, d_sae, generator=g) < 0.3)


def streamed(d_sae: int = 12, seed: int = 0, **options: Any) -> FeatureCorrelation:
    found = FeatureCorrelation(d_sae, **options)
    for n in range(3):
        found.update(SparseCodes.from_dense(tokens(20, d_sae, seed + n)), torch.rand(20).double() + 0.1)
    return found


def assert_equal(left: Any, right: Any) -> None:
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            assert_equal(left[key], right[key])
    elif isinstance(left, Tensor):
        assert left.dtype == right.dtype
        assert torch.equal(left, right)
    else:
        assert left == right


def put(*path: str, value: Any) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for name in path[:-1]:
            state = state[name]
        state[path[-1]] = value

    return change


def gone(*path: str) -> Callable[[dict], None]:
    def change(state: dict) -> None:
        for name in path[:-1]:
            state = state[name]
        del state[path[-1]]

    return change


LONG = torch.zeros(3, dtype=torch.int64)
RECENT = ("pairs", "ring", "000001")
WRONG = [
    ("exact", put("d_sae", value=13), "d_sae: expected 12 as built, got 13"),
    ("exact", put("sketch_dim", value=16), "sketch_dim: expected None as built, got 16"),
    ("exact", put("halflife", value=5.0), "halflife: expected None as built, got 5.0"),
    ("exact", gone("halflife"), "state: expected a field 'halflife', which is missing"),
    ("exact", gone("updates"), "state: expected a field 'updates'"),
    ("exact", gone("pairs"), "state: expected a field 'pairs'"),
    ("exact", put("more", value=1), "state: unknown field 'more'"),
    ("exact", put("updates", value=-1), "updates: expected a whole number >= 0, got -1"),
    ("exact", put("tokens_offered", value=1.5), r"tokens_offered: expected a whole number >= 0, got 1\.5"),
    ("exact", put("origin", value=float("nan")), "origin: expected a finite number, got nan"),
    ("exact", put("moments", value=3), "moments: expected a dict, got int"),
    ("exact", gone("moments", "square"), "moments: expected a field 'square'"),
    ("exact", put("moments", "extra", value=LONG), "moments: unknown field 'extra'"),
    ("exact", put("moments", "total", value=torch.zeros(11).double()), r"moments\.total: expected shape \[12\], got \[11\]"),
    ("exact", put("moments", "total", value=torch.zeros(12)), r"moments\.total: expected torch\.float64, got torch\.float32"),
    ("exact", put("moments", "weight", value=1.0), r"moments\.weight: expected a tensor, got float"),
    ("halflife", put("moments", "count", value=torch.zeros(12).long()), r"moments\.count: expected torch\.float64"),
    ("exact", gone("pairs", "joint"), "pairs: expected a field 'joint'"),
    ("exact", put("pairs", "rows", value=LONG), "pairs: unknown field 'rows'"),
    ("exact", put("pairs", "product", value=torch.zeros(65).double()), r"pairs\.product: expected shape \[66\], got \[65\]"),
    ("exact", put("pairs", "joint", value=torch.zeros(66).double()), r"pairs\.joint: expected torch\.int32 or torch\.int64"),
    ("halflife", put("pairs", "joint", value=torch.zeros(66).int()), r"pairs\.joint: expected torch\.float64"),
    ("exact", put("pairs", "key", value=torch.arange(5)), r"pairs\.product: expected shape \[5\], got \[66\]"),
    ("exact", put("pairs", "key", value=torch.tensor([0, 66])), r"pairs\.key: .* in \[0, 66\), got 0 \.\. 66"),
    ("exact", put("pairs", "key", value=torch.tensor([-1, 3])), r"pairs\.key: expected ascending, unique keys"),
    ("exact", put("pairs", "key", value=torch.tensor([4, 4])), r"pairs\.key: expected ascending, unique keys"),
    ("exact", put("pairs", "key", value=torch.zeros(2)), r"pairs\.key: expected torch\.int64"),
    ("exact", put("pairs", "unit", value=torch.zeros(3).double()), r"pairs\.unit: expected shape \[12\], got \[3\]"),
    ("sketch", put("sketch_dim", value=None), "sketch_dim: expected 16 as built, got None"),
    ("sketch", gone("seed"), "state: expected a field 'seed'"),
    ("sketch", put("rank", value=3), "rank: expected 0 as built, got 3"),
    ("sketch", put("pairs", "rows", value=torch.zeros(12, 15)), r"pairs\.rows: expected shape \[12, 16\], got \[12, 15\]"),
    ("sketch", put("pairs", "rows", value=torch.zeros(12, 16).double()), r"pairs\.rows: expected torch\.float32"),
    ("sketch", put("pairs", "ones", value=None), r"pairs\.ones: expected a tensor, got NoneType"),
    ("sketch", gone("pairs", "signs"), "pairs: expected a field 'signs'"),
    ("sketch", put("pairs", "signs", value=LONG), r"pairs\.signs: expected shape \[\*, 3\], got \[3\]"),
    ("sketch", put("pairs", "ring", value=[]), r"pairs\.ring: expected a dict, got list"),
    ("sketch", gone(*RECENT, "value"), r"pairs\.ring\.000001: expected a field 'value'"),
    ("sketch", put(*RECENT, "latent", value=LONG), r"pairs\.ring\.000001\.latent: expected torch\.int32"),
    ("sketch", put(*RECENT, "weight", value=torch.zeros(3).double()), r"pairs\.ring\.000001\.weight: expected shape"),
    ("sketch", put(*RECENT, "row_ptr", value=LONG[:0]), r"pairs\.ring\.000001\.row_ptr: expected at least one"),
    ("sketch", put(*RECENT, "row_ptr", value=LONG[:1].expand(21)), r"pairs\.ring\.000001: row_ptr: row 19: expected to end"),
]  # fmt: skip


@pytest.mark.parametrize(("mode", "change", "words"), WRONG, ids=[words for _, _, words in WRONG])
def test_a_state_that_does_not_fit_changes_nothing(mode: str, change: Callable[[dict], None], words: str) -> None:
    found = streamed(seed=5, **MODES[mode])
    before = copy.deepcopy(found.state_dict())
    state = copy.deepcopy(streamed(seed=9, **MODES[mode]).state_dict())
    if mode != "sketch":
        assert "key" not in state["pairs"]
    change(state)
    with pytest.raises(ValueError, match=r"^FeatureCorrelation\.load_state_dict: " + words):
        found.load_state_dict(state)
    assert_equal(found.state_dict(), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_of_another_kind_is_no_dict_of_this_one(mode: str) -> None:
    found = streamed(**MODES[mode])
    before = copy.deepcopy(found.state_dict())
    for other in MODES:
        if other != mode:
            with pytest.raises(ValueError, match="as built"):
                found.load_state_dict(streamed(**MODES[other]).state_dict())
    for nothing in (None, {}, [1]):
        with pytest.raises(ValueError, match="load_state_dict: state"):
            found.load_state_dict(nothing)  # type: ignore[arg-type]
    assert_equal(found.state_dict(), before)


@pytest.mark.parametrize("mode", MODES)
def test_a_loaded_state_is_not_written_to(mode: str) -> None:
    state = streamed(**MODES[mode]).state_dict()
    if mode == "exact":
        state["pairs"]["unit"] = torch.ones(12, dtype=torch.float64)
    before = copy.deepcopy(state)
    found = FeatureCorrelation(12, **MODES[mode])
    found.load_state_dict(state)
    if found._exact is not None and found._exact.unit is not None:
        found._exact.unit += 1  # as backend triton settles units
    found.update(SparseCodes.from_dense(tokens(20, 12, 3)))
    assert_equal(state, before)


IDS = [
    (torch.tensor([0.5]), TypeError, "integer latent ids, got torch.float32"),
    (torch.tensor([True]), TypeError, "integer latent ids, got torch.bool"),
    (torch.tensor([1j]), TypeError, "integer latent ids, got torch.complex64"),
    (torch.zeros(0), TypeError, "integer latent ids, got torch.float32"),
    (0.5, TypeError, "integer latent ids"),
    (True, TypeError, "integer latent ids, got torch.bool"),
    (None, TypeError, "expected an int or a tensor of latent ids, got None"),
    ("3", TypeError, "expected an int or a tensor of latent ids, got '3'"),
    (1 << 70, TypeError, "expected an int or a tensor"),
    (12, ValueError, r"expected latents in \[0, 12\), got 12 \.\. 12"),
    (torch.tensor([3, -1]), ValueError, r"expected latents in \[0, 12\), got -1 \.\. 3"),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bad", "error", "words"), IDS)
def test_ids_that_name_no_latent(mode: str, bad: object, error: type[Exception], words: str) -> None:
    found = streamed(**MODES[mode])
    with pytest.raises(error, match=r"FeatureCorrelation: i: " + words if "expected" in words else words):
        found.correlation(bad, 0)  # type: ignore[arg-type]
    with pytest.raises(error, match="FeatureCorrelation: j: "):
        found.correlation(0, bad)  # type: ignore[arg-type]
    with pytest.raises(error, match="FeatureCorrelation: i: "):
        found.statistics(bad, torch.tensor([0]))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", MODES)
def test_ids_of_two_lengths(mode: str) -> None:
    found = streamed(**MODES[mode])
    two, three = torch.tensor([0, 1]), torch.tensor([0, 1, 2])
    with pytest.raises(ValueError, match=r"correlation: i, j: expected shapes that broadcast, got \[2\] and \[3\]"):
        found.correlation(two, three)
    for i, j in ((two, three), (two[:1], two), (two[None], two[None]), (two[0], two[0])):
        with pytest.raises(ValueError, match=r"statistics: i, j: expected two of one length \[P\]"):
            found.statistics(i, j)
    assert found.correlation(two.int(), two.to(torch.uint8)).dtype == torch.float64


@pytest.mark.parametrize("mode", MODES)
def test_a_single_latent(mode: str) -> None:
    found = FeatureCorrelation(1, **MODES[mode])
    for value in ([1.0, 0.0, 2.0], [], [0.0]):
        found.update(SparseCodes.from_dense(torch.tensor(value).view(-1, 1)))
    zero = torch.tensor([0])
    assert float(found.statistics(zero, zero).correlation) == pytest.approx(1.0, abs=1e-12)
    assert float(found.correlation(0, 0)) == pytest.approx(1.0, abs=1e-6)
    assert len(found.pairs(-1.0, 0)) == 0
    assert int(found.counts()) == (1 if mode == "halflife" else 2)
    other = FeatureCorrelation(1, **MODES[mode], **({"rank": 1} if mode == "sketch" else {}))
    other.update(SparseCodes.from_dense(torch.ones(2, 1)))
    found.merge(other)
    loaded = FeatureCorrelation(1, **MODES[mode])
    loaded.load_state_dict(found.state_dict())
    assert_equal(loaded.state_dict(), found.state_dict())


@pytest.mark.parametrize("mode", MODES)
def test_no_rows_are_no_update(mode: str) -> None:
    found = streamed(**MODES[mode])
    before = copy.deepcopy(found.state_dict())
    none = SparseCodes.from_dense(torch.zeros(0, 12))
    for mask in (None, torch.ones(0), torch.ones(0, dtype=torch.bool)):
        found.update(none, mask)
    with pytest.raises(ValueError, match=r"mask: expected shape \[0\], got \[1\]"):
        found.update(none, torch.ones(1))
    assert_equal(found.state_dict(), before)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("mask", "error", "words"),
    [
        (torch.ones(5), ValueError, r"mask: expected shape \[20\], got \[5\]"),
        (torch.ones(20, 1), ValueError, r"mask: expected shape \[20\], got \[20, 1\]"),
        (torch.ones(20).long(), TypeError, "mask: expected a bool or floating tensor, got torch.int64"),
        (torch.ones(20, dtype=torch.complex64), TypeError, "mask: expected a bool or floating tensor"),
        ([True] * 20, TypeError, "mask: expected a bool or floating tensor, got list"),
        (torch.ones(20, device="meta"), ValueError, "mask: expected device cpu, got meta"),
    ],
)
def test_masks_that_do_not_fit_change_nothing(mode: str, mask: object, error: type[Exception], words: str) -> None:
    found = streamed(**MODES[mode])
    before = copy.deepcopy(found.state_dict())
    with pytest.raises(error, match=words):
        found.update(SparseCodes.from_dense(tokens(20, 12, 1)), mask)  # type: ignore[arg-type]
    assert_equal(found.state_dict(), before)
