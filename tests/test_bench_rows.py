"""Benchmarks: a variant that is wrong, or does not answer, is not timed; inputs leave the cache; memory is what it says."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch

from bench import cases, interleaved_timing, machine, memory, results
from bench.cases import SIZES, Case, Size
from bench.interleaved_timing import MOST_INPUTS, Race, Variant, WrongResultError, held_bytes, pool_size, verify
from bench.operations import OPERATIONS
from bench.peers import eager, ours
from bench.reference_rates import FASTEST
from bench.rows import Contest, measure
from bench.selection import clear
from transcoder.kernels.correlation.cpp_backend import WaitingPairs


@pytest.fixture(autouse=True)
def few_inputs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where the cache is what is tested: drawing a thousand tiny ones takes longer than all else."""
    if "cache" not in request.node.name:
        monkeypatch.setattr(interleaved_timing, "MOST_INPUTS", 32)


TINY = SIZES["tiny"][0]
BUILT_IN = ("eager", "original")
"""torch.compile takes seconds a row: `pytest bench/` has it."""


@pytest.mark.parametrize(("operation", "activation", "nested"), OPERATIONS)
def test_every_variant_of_every_row_is_right_and_says_what_it_does(operation, activation, nested) -> None:
    contest = Contest(operation, Case(TINY, activation, nested), BUILT_IN)
    assert contest.wrong == {}
    assert contest.variants[0].ours
    assert len(contest.variants) > 1
    for variant in contest.variants:
        assert variant.answer is not None, variant.name
        assert variant.ours or variant.note, variant.name


def test_a_peer_without_a_note_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "PRODUCTS", "")
    with pytest.raises(ValueError, match="eager PyTorch: expected a note"):
        Contest("correlation", Case(TINY), ("eager",))


def wrong(variant: Variant, name: str, change) -> Variant:
    def answer(probe):
        found = dict(variant.answer(probe))
        found[name] = change(found[name])
        return found

    return dataclasses.replace(variant, answer=answer)


def check(operation: str, case: Case, variant: Variant) -> None:
    for probe in case.probes:
        verify(variant, probe, case.expect(operation, probe))


@pytest.mark.parametrize("name", ["loss", "W_enc.grad", "b_enc.grad", "W_dec.grad", "b_dec.grad"])
@pytest.mark.parametrize(
    "change",
    [lambda t: 1.001 * t, lambda t: torch.full_like(t, float("nan")), lambda t: t.unsqueeze(0)],
    ids=["scaled", "nan", "shape"],
)
def test_a_wrong_result_is_not_timed(name, change) -> None:
    case = Case(TINY, "batch_topk", nested=True)
    variant = ours.variants("step", case)[0]
    check("step", case, variant)
    with pytest.raises(WrongResultError, match=f"ours.*{name}"):
        check("step", case, wrong(variant, name, change))


def test_an_answer_to_another_question_is_refused() -> None:
    case = Case(TINY)
    for answers in ({"noise": torch.ones(1)}, {}):
        with pytest.raises(WrongResultError, match="expected the answers"):
            check("encode", case, Variant("other", lambda i: None, answer=lambda probe, found=answers: found))


@pytest.mark.parametrize("name", ["codes", "W_enc.grad", "b_enc.grad"])
def test_an_answer_that_is_missing_is_refused(name) -> None:
    case = Case(TINY)
    (variant,) = eager.encode(case)

    def less(probe):
        return {n: value for n, value in variant.answer(probe).items() if n != name}

    lesser = dataclasses.replace(variant, answer=less)
    with pytest.raises(WrongResultError, match="expected the answers"):
        check("encode", case, lesser)
    # Where that is so, it has to be said, and stands in the row; of what is there after all it must not be.
    said = dataclasses.replace(lesser, lacks={name: "it has none"})
    check("encode", case, said)
    assert f"{name} not compared (it has none)" in said.said()
    with pytest.raises(WrongResultError, match="expected the answers"):
        check("encode", case, dataclasses.replace(variant, lacks={name: "it has none"}))


def test_no_answer_at_all_needs_a_reason() -> None:
    case = Case(TINY)
    with pytest.raises(WrongResultError, match="no answer"):
        check("encode", case, Variant("other", lambda i: None))
    check("encode", case, Variant("other", lambda i: None, unchecked="it selects others"))


def test_what_is_wrong_on_many_rows_only_is_caught() -> None:
    """Codes that a batch of the timed size takes through another branch than the small probe."""
    case = Case(Size(128, 16, 64, 4))
    assert [len(probe.x) for probe in case.probes] == [64, 128]
    (variant,) = eager.encode(case)

    def answer(probe):
        found = variant.answer(probe)
        return found if len(probe.x) <= 64 else {**found, "codes": 1.001 * found["codes"]}

    with pytest.raises(WrongResultError, match=r"codes: off by 0\.001 .* on 128 rows"):
        check("encode", case, dataclasses.replace(variant, answer=answer))


@pytest.mark.parametrize("batch", [False, True])
def test_a_probe_leaves_rounding_nothing_to_decide(batch: bool) -> None:
    """Rows whose last place two latents share are drawn anew."""
    g = torch.Generator().manual_seed(0)
    draw = functools.partial(torch.randn, generator=g)
    W, k, x = draw(8, 16), 1, draw(64, 16)
    W[1] = W[0]

    def margin(x: torch.Tensor) -> float:
        acts = (x.double() @ W.double().T).relu()
        acts, last = (acts.view(1, -1), k * len(x)) if batch else (acts, k)
        top = acts.topk(last + 1, dim=1).values
        return float((top[:, last - 1] - top[:, last]).min())

    if batch:
        # The entry that is the last to be selected, once more.
        acts = (x.double() @ W.double().T).relu().flatten()
        x[-1] = x[int(acts.topk(k * 64).indices[-1]) // 64]
    cleared = clear(x, W, k, batch, draw)
    assert margin(x) == 0 or batch
    assert margin(cleared) > 1e-6
    changed = int((cleared != x).any(1).sum())
    assert (0 if batch else 1) <= changed < 32


def test_a_selection_that_lost_one_entry_is_caught() -> None:
    case = Case(TINY)
    (variant,) = eager.encode(case)

    def one_lost(z):
        z = z.detach().clone()
        z[3, int(z[3].argmax())] = 0
        return z

    with pytest.raises(WrongResultError, match="codes"):
        check("encode", case, wrong(variant, "codes", one_lost))


def test_an_optimizer_that_forgets_its_moments_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    finish = eager.finish

    def forgetful(weights, adam):
        finish(weights, adam)
        adam.state.clear()

    case = Case(TINY)
    check("optimizer", case, eager.optimizer(case)[0])
    monkeypatch.setattr(eager, "finish", forgetful)
    with pytest.raises(WrongResultError, match="step: off by"):
        check("optimizer", case, eager.optimizer(case)[0])


def test_a_row_shows_a_peer_that_is_wrong_and_times_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eager, "project", lambda W: None)
    row, _ = measure("optimizer", Case(TINY), BUILT_IN, 0.0)
    assert "step: off by" in row["variants"]["eager PyTorch"]["wrong"]
    assert "seconds" in next(iter(row["variants"].values()))
    assert any("WRONG" in line for line in results.table([row]))


def test_ours_that_is_wrong_makes_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "optimizer_step", lambda *words: None)
    with pytest.raises(WrongResultError, match="ours"):
        measure("optimizer", Case(TINY), BUILT_IN, 0.0)


def test_a_sketch_is_checked_by_its_definition() -> None:
    size = Size(64, 16, 40_000, 4)
    case = Case(size, "batch_topk")
    (variant, *_) = ours.variants("correlation", case)
    check("correlation", case, variant)
    with pytest.raises(WrongResultError, match="correlation"):
        check("correlation", case, wrong(variant, "correlation", lambda t: 1.001 * t))


def test_a_row_has_what_the_report_reads() -> None:
    row, skipped = measure("encode", Case(TINY), (*BUILT_IN, "saelens"), 0.0)
    first, *others = row["variants"].values()
    assert first["ours"]
    assert first["rounds"] >= 5
    assert set(first["seconds"]) == set(row["floor"]) == {"forward", "backward", "both"}
    assert first["ratio"]["both"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert any(not one["ours"] for one in others)
    for floor in row["floor"].values():
        assert floor["bytes"] > 0
        assert floor["operations"] > 0
        assert floor["seconds"] == max(floor["copy_seconds"], floor["product_seconds"])
    if "saelens" in skipped:
        assert "sae-lens" in skipped["saelens"]


def test_the_floor_is_below_every_product_that_was_seen() -> None:
    """PyTorch's fp32 product may be beaten; the fastest product of this machine is at least as fast as that."""
    contest = Contest("encode", Case(TINY), ())
    contest.race.run(3)
    row = contest.row()
    rates, size = row["rates"], row["size"]
    assert rates["fastest_operations_per_second"] >= rates["product_operations_per_second"]
    done = 2 * size["rows"] * size["d"] * size["d_sae"]
    assert row["product_seconds"] == pytest.approx(done / rates["product_operations_per_second"])
    assert row["floor"]["forward"]["product_seconds"] <= row["product_seconds"] * 1.2
    assert FASTEST in contest.race.seconds
    assert " x " in rates["fastest"]


def test_dense_peers_that_do_not_fit_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "free_bytes", lambda: 1000)
    contest = Contest("step", Case(TINY), BUILT_IN)
    assert all(variant.ours for variant in contest.variants)
    assert set(contest.skipped) == set(BUILT_IN)
    assert "dense codes need about" in contest.skipped["eager"]


def test_peak_memory_sees_what_is_freed_again() -> None:
    device = torch.device("cpu")
    held = 64 << 20

    def call() -> None:
        torch.ones(held // 4).sum()

    first, second = (memory.peak_bytes(call, device) for _ in range(2))
    if first is None:
        pytest.skip("this system does not say what a process holds at most")
    assert 0.9 * held < first < 1.5 * held
    assert 0.9 * held < second < 1.5 * held
    assert memory.peak_bytes(lambda: None, device) < held / 8


def test_held_memory_is_weights_moments_and_statistics() -> None:
    case = Case(Size(64, 16, 128, 4))
    weights = 4 * (2 * 128 * 16 + 128 + 16)
    for variant in (eager.optimizer(case)[0], ours.optimizer(case)):
        before = held_bytes(variant, case)
        assert weights <= before < 1.5 * weights, variant.name
        variant.forward(0)
        # Two moments more. Neither the inputs nor the case's own weights.
        assert 3 * weights <= held_bytes(variant, case) < 3.5 * weights, variant.name
    monitor = ours.correlation(case)
    assert held_bytes(monitor, case) >= 12 * 128 * 127 // 2
    decoder = eager.decode(case)[0]
    assert held_bytes(decoder, case) == 4 * (128 * 16 + 16)


def test_held_memory_counts_a_storage_once_and_no_module() -> None:
    x = torch.zeros(1000)
    kept = [x, x[:10], {"again": x.view(10, 100)}]
    assert memory.held_bytes([lambda: kept]) == 4000
    assert memory.held_bytes([lambda: kept], [x]) == 0
    assert memory.held_bytes([torch, torch.nn.Linear]) == 0


@pytest.mark.parametrize("count", range(1, 13))
def test_every_variant_comes_past_every_input(count: int) -> None:
    """However many variants and inputs there are: a count that they share would show each variant the same few inputs."""
    seen: dict[str, list[int]] = {}
    variants = [Variant(str(n), lambda i, n=n: seen.setdefault(str(n), []).append(i)) for n in range(count)]
    Race(variants, torch.device("cpu")).run(64)
    for inputs in (2, 4, 8, 64):
        for name, turns in seen.items():
            assert len(turns) == 64
            assert {i % inputs for i in turns[:inputs]} == set(range(inputs)), (name, inputs)
        for turn in zip(*seen.values(), strict=True):
            assert len({i % inputs for i in turn}) == min(inputs, count)
        # What a variant used comes back to another one late: the others' inputs lie between.
    order = [i for turn in zip(*seen.values(), strict=True) for i in turn]
    last: dict[int, int] = {}
    for place, i in enumerate(order):
        if i % 64 in last:
            assert place - last[i % 64] >= 64 - 2 * 13
        last[i % 64] = place


def test_a_race_takes_turns() -> None:
    order: list[str] = []
    Race([Variant(name, lambda i, name=name: order.append(name)) for name in "abc"], torch.device("cpu")).run(4)
    assert order[2::3] == ["a"] * 4
    assert {"".join(order[n : n + 2]) for n in range(0, 12, 3)} == {"bc", "cb"}


def test_inputs_do_not_fit_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kind by its own bytes: codes are a tenth of what they stand for."""
    # Of a server's 300 MB a case as small as this would need more inputs than `MOST_INPUTS`.
    monkeypatch.setattr(machine, "cache_bytes", lambda: 24 << 20)
    case = Case(Size(512, 32, 256, 16))
    assert sum(4 * x.numel() for x in case.pool) >= 2 * machine.cache_bytes()
    for many in (case.codes, [codes for codes, _ in case.coded]):
        assert len({codes.values.data_ptr() for codes in many}) == len(many)
    pairs = sum(12 * codes.nnz for codes, _ in case.coded) + sum(
        4 * y.numel() for y in {id(y): y for _, y in case.coded}.values()
    )
    assert pairs >= 2 * machine.cache_bytes()
    assert sum(12 * codes.nnz for codes in case.codes) >= 2 * machine.cache_bytes()
    assert sum(4 * z.numel() for z in case.dense) >= 2 * machine.cache_bytes()
    for number in (len(case.pool), len(case.codes), len(case.coded), len(case.dense)):
        assert number & (number - 1) == 0
    assert pool_size(1) == MOST_INPUTS


@pytest.mark.parametrize("activation", ["topk", "batch_topk"])
def test_codes_that_were_moved_are_codes(activation) -> None:
    case = Case(Size(32, 16, 100, 4), activation)
    first, moved = case.codes[0], case.codes[cases.ENCODED * 3]
    moved = dataclasses.replace(moved, _derived={})
    moved.validate()
    assert torch.equal(moved.row_ptr, first.row_ptr)
    assert torch.equal(moved.values.sort().values, first.values.sort().values)
    assert torch.equal(moved.to_dense(), first.to_dense().roll(3 * 7919 % 100, 1))


def test_a_round_of_the_correlation_adds_all_that_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many updates as wait together, at least, and none of them is left to the next round."""
    done: list[str] = []
    for name in ("add", "settle"):
        call = getattr(WaitingPairs, name)
        noted = lambda self, *parts, name=name, call=call: (done.append(name), call(self, *parts))[1]  # noqa: E731
        monkeypatch.setattr(WaitingPairs, name, noted)
    size = Size(64, 16, 512, 4)
    case = Case(size, "batch_topk")
    variant = ours.variants("correlation", case)[0]
    if "cpp" not in variant.name:
        pytest.skip("without the C++ extension no pairs wait")
    for turn in range(2):
        done.clear()
        variant.forward(turn)
        assert done.count("add") == variant.per >= ours.UPDATES
        assert done[-1] == "settle"
        assert variant.per * size.rows * size.k >= WaitingPairs(size.d_sae).limit


def test_device_names_make_file_names() -> None:
    assert machine.slug()
    assert set(machine.slug()) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
    assert {"hash", "clean"} == set(machine.commit())


def test_merging_shows_ours_of_the_peer_s_own_run() -> None:
    size = {"rows": 1, "d": 2, "d_sae": 3, "k": 1}
    base = {"operation": "step", "activation": "topk", "widths": [3], "size": size, "floor": 4, "product_seconds": 5}
    here, there, theirs = ({"ours": own, "seconds": n} for own, n in ((True, 1), (True, 9), (False, 3)))
    rows = [{**base, "variants": {"ours (cpp)": here}}]
    more = [{**base, "floor": 6, "product_seconds": 7, "variants": {"ours (cpp)": there, "SAELens": theirs}}]
    more.append({**more[0], "operation": "encode"})
    results.merge_rows(rows, more, "saelens")
    run = {"environment": "saelens", "floor": 6, "product_seconds": 7}
    assert list(rows[0]["variants"].items()) == [
        ("ours (cpp)", here),
        ("ours (cpp), in the saelens run", {**there, **run}),
        ("SAELens", {**theirs, **run}),
    ]
    # A row that ours lack, because it failed, is theirs alone.
    assert rows[1] == {**more[1], "environment": "saelens"}
