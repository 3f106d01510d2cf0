"""Benchmarks: a variant that is wrong fails before it is timed; memory, medians and ratios are what they say."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from bench import machine, results
from bench.cases import SIZES, Case, Size
from bench.operations import OPERATIONS
from bench.peers import eager, ours
from bench.race import Race, Variant, WrongResultError, peak_bytes, ratios, summary, verify
from bench.rows import contestants, measure

TINY = SIZES["tiny"][0]
BUILT_IN = ("eager", "original")
"""torch.compile takes seconds a row: `pytest bench/` has it."""


@pytest.mark.parametrize(("operation", "activation", "nested"), OPERATIONS)
def test_every_variant_of_every_row_is_right(operation, activation, nested) -> None:
    case = Case(TINY, activation, nested)
    variants, _ = contestants(operation, case, BUILT_IN)
    assert variants[0].ours
    assert len(variants) > 1
    assert all(variant.answer is not None for variant in variants)


def wrong(variant: Variant, name: str, change) -> Variant:
    def answer():
        found = dict(variant.answer())
        found[name] = change(found[name])
        return found

    return dataclasses.replace(variant, answer=answer)


@pytest.mark.parametrize("name", ["loss", "W_enc.grad", "b_enc.grad", "W_dec.grad", "b_dec.grad"])
@pytest.mark.parametrize(
    "change",
    [lambda t: 1.001 * t, lambda t: torch.full_like(t, float("nan")), lambda t: t.unsqueeze(0)],
    ids=["scaled", "nan", "shape"],
)
def test_a_wrong_result_is_not_timed(name, change) -> None:
    case = Case(TINY, "batch_topk", nested=True)
    variant = ours.variants("step", case)[0]
    expected = case.expect_step()
    verify(variant, expected)
    with pytest.raises(WrongResultError, match=f"ours.*{name}"):
        verify(wrong(variant, name, change), expected)


def test_an_answer_to_another_question_is_refused() -> None:
    case = Case(TINY)
    with pytest.raises(WrongResultError, match="expected answers among"):
        verify(Variant("other", lambda i: None, answer=lambda: {"noise": torch.ones(1)}), case.expect_encode())
    with pytest.raises(WrongResultError, match="expected answers among"):
        verify(Variant("other", lambda i: None, answer=dict), case.expect_encode())


def test_a_selection_that_lost_one_entry_is_caught() -> None:
    case = Case(TINY)
    (variant,) = eager.encode(case)

    def one_lost(z):
        z = z.detach().clone()
        z[3, int(z[3].argmax())] = 0
        return z

    with pytest.raises(WrongResultError, match="codes"):
        verify(wrong(variant, "codes", one_lost), case.expect_encode())


def test_a_row_has_what_the_report_reads() -> None:
    row, skipped = measure("encode", Case(TINY), (*BUILT_IN, "saelens"), 0.0)
    first, *others = row["variants"].values()
    assert first["ours"]
    assert first["rounds"] >= 5
    assert set(first["seconds"]) == set(row["floor"]) == set(row["to_floor"]) == {"forward", "backward", "both"}
    assert first["ratio"]["both"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert any(not one["ours"] for one in others)
    assert all(
        floor["bytes"] > 0 and floor["operations"] > 0 and floor["seconds"] > 0 for floor in row["floor"].values()
    )
    if "saelens" in skipped:
        assert "sae-lens" in skipped["saelens"]


def test_dense_peers_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda: 1000)
    variants, skipped = contestants("step", Case(TINY), BUILT_IN)
    assert all(variant.ours for variant in variants)
    assert set(skipped) == set(BUILT_IN)
    assert "dense codes need about" in skipped["eager"]


def test_peak_memory_sees_what_is_freed_again() -> None:
    device = torch.device("cpu")
    held = 64 << 20

    def call() -> None:
        torch.ones(held // 4).sum()

    first, second = (peak_bytes(call, device) for _ in range(2))
    if first is None:
        pytest.skip("this system does not say what a process holds at most")
    assert 0.9 * held < first < 1.5 * held
    assert 0.9 * held < second < 1.5 * held
    assert peak_bytes(lambda: None, device) < held / 8


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that was four times slower for a while: the ratio is that of the work, its spread 0."""
    slow = [1, 1, 4, 4, 4, 1]
    assert ratios([2.0 * s for s in slow], [1.0 * s for s in slow]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    assert summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert summary([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}


def test_a_race_takes_turns_and_changes_its_inputs() -> None:
    seen: list[tuple[str, int]] = []
    variants = [Variant(name, lambda i, name=name: seen.append((name, i))) for name in "abc"]
    race = Race(variants, inputs=5, device=torch.device("cpu"))
    race.run(4)
    assert [name for name, _ in seen].count("a") == 4
    for start in range(0, 12, 3):
        assert {name for name, _ in seen[start : start + 3]} == set("abc")
    assert len({i for _, i in seen}) == 5
    assert all(one != other for (_, one), (_, other) in itertools.pairwise(seen))


def test_inputs_do_not_fit_the_cache() -> None:
    case = Case(Size(64, 16, 128, 4))
    assert sum(4 * x.numel() for x in case.pool) >= 2 * machine.cache_bytes()


def test_device_names_make_file_names() -> None:
    assert machine.slug()
    assert set(machine.slug()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert {"hash", "clean"} == set(machine.commit())


def test_merging_adds_peers_with_the_ratio_of_their_own_run() -> None:
    size = {"rows": 1, "d": 2, "d_sae": 3, "k": 1}
    base = {"operation": "step", "activation": "topk", "widths": [3], "size": size}
    rows = [{**base, "variants": {"ours (cpp)": {"seconds": 1}}}]
    more = [{**base, "variants": {"ours (cpp)": {"seconds": 9}, "SAELens": {"seconds": 3}}}]
    results.merge_rows(rows, more, "saelens")
    assert rows[0]["variants"] == {"ours (cpp)": {"seconds": 1}, "SAELens": {"seconds": 3, "environment": "saelens"}}
