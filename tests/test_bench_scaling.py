"""bench.scaling and bench.whole_run, small: every point has ours, and the runs take the steps that they say."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import pytest

from bench import interleaved_timing, scaling, whole_run
from bench.cases import Size
from bench.peers import ours

TINY = Size(32, 16, 128, 4)


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved_timing, "MOST_INPUTS", 8)


@pytest.mark.parametrize("kind", sorted(scaling.AXES))
def test_an_axis_moves_one_number(kind: str) -> None:
    found = list(scaling.points(kind))
    assert {axis for axis, _ in found} == {"d_sae", "rows", "k", "d"}
    for axis in ("d_sae", "rows", "k", "d"):
        sizes = [size for name, size in found if name == axis]
        others = [{n: v for n, v in vars(size).items() if n != axis} for size in sizes]
        assert all(other == others[0] for other in others)
        values = [getattr(size, axis) for size in sizes]
        assert values == sorted(set(values))
        assert all(size.k <= size.d_sae and size.prefixes[0] >= 1 for size in sizes)


def test_the_widest_dictionary_has_a_million_latents() -> None:
    for kind in ("cpu", "cuda"):
        assert max(size.d_sae for _, size in scaling.points(kind)) == 2**20
        assert {size.rows for axis, size in scaling.points(kind) if axis == "rows"} >= {256, 16384}


def test_a_point_has_ours_first_and_gives_up_what_is_too_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    given_up: set[str] = set()
    found = scaling.measure_point(TINY, "step", 0.0, 1e9, given_up)
    names = list(found)
    assert names[0].startswith("ours")
    assert "eager PyTorch" in names
    assert given_up == set()
    assert found[names[0]]["ratio"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    monkeypatch.setattr(scaling, "SLOWEST", 0.0)
    assert list(scaling.measure_point(TINY, "step", 0.0, 1e9, given_up)) == names[:1]
    assert given_up == set(names[1:])


def test_the_dense_step_is_left_out_where_it_does_not_fit() -> None:
    assert "eager PyTorch" not in scaling.measure_point(TINY, "encode", 0.0, 1000, set())
    huge = Size(1024, 64, 2**20, 32)
    assert not scaling.dense_fits(huge, 8 << 30)
    assert scaling.ours_bytes(huge) < 8 << 30


@pytest.mark.parametrize("wrong", [scaling.OPERATIONS[:1], scaling.OPERATIONS[1:]])
def test_every_operation_of_a_point_is_checked(wrong: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong is named and has no times; the other operations have theirs."""

    def broken(make, case):
        variant = make(case)
        answer = variant.answer

        def scaled(probe):
            first, *rest = answer(probe).items()
            return {first[0]: 1.001 * first[1], **dict(rest)}

        return dataclasses.replace(variant, answer=scaled)

    for operation in wrong:
        monkeypatch.setattr(ours, operation, functools.partial(broken, getattr(ours, operation)))
    monkeypatch.setitem(scaling.AXES, "one", {"base": TINY, "rows": {"values": [32]}})
    found = scaling.measure("one", 0.0)
    assert list(found["failed"]) == [f"rows 32 {operation}" for operation in wrong]
    assert all("off by 0.001" in why for why in found["failed"].values())
    assert {point["operation"] for point in found["points"]} == set(scaling.OPERATIONS) - set(wrong)


def test_the_whole_run_takes_its_steps_with_monitoring_on_and_off() -> None:
    found = whole_run.measure(Size(64, 16, 128, 4), steps=7, chunk=3)
    assert found["steps"] == 7
    assert list(found["kinds"]) == ["monitoring off", "monitoring on"]
    off, on = found["kinds"].values()
    for one in (off, on):
        assert one["tokens_per_second"] == pytest.approx(7 * 64 / one["seconds"])
        assert one["seconds_per_step"]["low"] <= one["seconds_per_step"]["total"]
        # Of all steps, the last ones included, which make no whole chunk.
        assert one["ratio"]["total"] == pytest.approx(one["seconds"] / off["seconds"])
    assert whole_run.STEPS == 4882
    size = whole_run.shape()
    assert size.d_sae / size.d == whole_run.LOST.d_sae / whole_run.LOST.d
    assert size.d_sae / size.k == whole_run.LOST.d_sae / whole_run.LOST.k
