"""Every penalty and its gradient against autograd in float64 on the dense definition."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.antidup import DiversityRegularizer, LedgerError, UsageLedger
from transcoder.antidup.penalties import (
    pair_penalty,
)
from transcoder.config import RegularizerSection
from transcoder.kernels import SparseCodes
from transcoder.usage import REQUIRED_EFFECTS, TERM_UNITS

OFF = RegularizerSection(correlation_weight=0, orthogonality_weight=0)


def dense(batch: int, d_sae: int, density: float, seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(batch, d_sae, generator=g, dtype=torch.float64) + 0.1
    return z * (torch.rand(batch, d_sae, generator=g) < density)


def dense_gradient(value: Tensor, z: Tensor) -> Tensor:
    """d value / dz at the entries that fire, in the order of SparseCodes.from_dense."""
    (gradient,) = torch.autograd.grad(value, z)
    return gradient[z > 0]


def ledger(folder: Path) -> UsageLedger:
    return UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), folder / "usage.json")


def regularizer(section: RegularizerSection, d_sae: int, folder: Path) -> DiversityRegularizer:
    return DiversityRegularizer(section, d_sae, "cpu", 0, ledger(folder), folder)


def test_sink_mass_acts_on_special_tokens_and_resumes(tmp_path: Path) -> None:
    section = replace(OFF, sink_mass_weight=1.0, sink_mass_allowed=0.1)
    z = dense(200, 5, 0.8, 30)
    tokens = torch.arange(200) % 10
    z[:, 0] *= (tokens == 3).double()
    batch = ActivationBatch(torch.zeros(200, 1), torch.zeros(200, 1), tokens, tokens)
    codes, model = SparseCodes.from_dense(torch.cat([z, z])[:200]), SimpleNamespace(W_dec=torch.ones(5, 2))
    loss = torch.zeros((), requires_grad=True)

    def made(ids: tuple[int, ...]) -> DiversityRegularizer:
        return DiversityRegularizer(section, 5, "cpu", 0, ledger(tmp_path), tmp_path, special_ids=ids)

    parts = {ids: made(ids) for ids in ((3,), ())}
    for step in range(3):
        for part in parts.values():
            part.apply_penalty(loss, model, codes=codes, batch=batch, step=step)
    found = {ids: float(part.metrics()["regularizer/sink_mass_penalty"]) for ids, part in parts.items()}
    assert found[()] == 0
    assert found[(3,)] == pytest.approx(0.9**2 / 5, rel=0.01)  # others are near a tenth by chance
    again = made((3,))
    again.load_state_dict(parts[(3,)].state_dict())
    for part in (again, parts[(3,)]):
        part.apply_penalty(loss, model, codes=codes, batch=batch, step=3)
    assert torch.equal(again.state_dict()["sinks"]["sums"], parts[(3,)].state_dict()["sinks"]["sums"])
    with pytest.raises(ValueError, match="sink_mass_weight is above 0"):
        made((3,)).apply_penalty(loss, model, codes=codes)


def test_rare_latents_are_not_taken_for_positional_ones(tmp_path: Path) -> None:
    # Latents 0 to 99 fire at random places, once in a hundred tokens and rarer; latent 100 in the first tenth of
    # the sequence only, as often.
    section = replace(OFF, position_entropy_weight=1.0, position_entropy_floor=0.3)
    g = torch.Generator().manual_seed(27)
    rates = torch.logspace(-3.3, -2, 101)
    totals = {}
    for planted in (False, True):
        part = regularizer(section, 101, tmp_path)
        loss, model = torch.zeros((), requires_grad=True), SimpleNamespace(W_dec=torch.ones(101, 2))
        values, slopes = [], []
        for step in range(60):
            z = torch.rand(256, 101, generator=g) * (torch.rand(256, 101, generator=g) < rates)
            positions = torch.randint(0, 100, (256,), generator=g)
            z[:, 100] = planted * (positions < 10) * (torch.rand(256, generator=g) < 0.1)
            batch = ActivationBatch(torch.zeros(256, 1), torch.zeros(256, 1), positions, positions)
            codes = SparseCodes.from_dense(z)
            part.apply_penalty(loss, model, codes=codes, batch=batch, step=step)
            values.append(float(part.metrics()["regularizer/position_entropy_penalty"]))
            slopes.append(float(part.metrics()["regularizer/position_entropy_gradient_norm"]))
        totals[planted] = (values, slopes)
        assert int((part._positions.firings >= 30).sum()) > 30  # type: ignore[union-attr]
    assert max(totals[False][0]) == max(totals[False][1]) == 0.0
    # The planted one alone is 0.3 below the floor: the mean over judged latents has its share.
    assert totals[True][0][-1] > 0.3 / 101
    assert totals[True][1][-1] > 0


def test_all_weights_zero_returns_the_same_object(tmp_path: Path) -> None:
    part = regularizer(OFF, 5, tmp_path)
    loss = torch.tensor(1.0, requires_grad=True)
    model = SimpleNamespace(W_dec=torch.randn(5, 3))
    pairs = (torch.tensor([0]), torch.tensor([1]))
    codes = SparseCodes.from_dense(dense(8, 5, 0.5, 9))
    assert part.apply_penalty(loss, model, codes=codes, pairs=pairs, step=0) is loss
    assert part.metrics() == {}


@pytest.mark.parametrize(
    ("section", "needs_pairs"),
    [
        (replace(OFF, correlation_weight=0.05, adaptive=False), True),
        (replace(OFF, orthogonality_weight=0.7, orthogonality_every=1, orthogonality_chunk=12), False),
        (replace(OFF, all_pairs_weight=0.2), False),
        (replace(OFF, position_entropy_weight=0.3, position_entropy_floor=0.98), False),
    ],
)
@pytest.mark.parametrize("scale", [1.0, 2.5])
def test_loss_gains_the_weighted_penalty_and_its_gradient(
    section: RegularizerSection, needs_pairs: bool, scale: float, tmp_path: Path
) -> None:
    part = DiversityRegularizer(section, 12, "cpu", 0, ledger(tmp_path), tmp_path, scale=scale)
    z = dense(60, 12, 0.7, 10)
    codes = SparseCodes.from_dense(z)
    values = codes.values.float().requires_grad_()
    codes = codes.with_values(values)
    w_dec = torch.randn(12, 4, generator=torch.Generator().manual_seed(11)).requires_grad_()
    positions = torch.arange(60) % 7
    batch = ActivationBatch(torch.zeros(60, 2), torch.zeros(60, 2), positions, positions)
    base = (values.sum() * 0.5 + w_dec.sum()).double()
    pairs = (torch.tensor([0, 3]), torch.tensor([1, 4])) if needs_pairs else None
    total = part.apply_penalty(base, SimpleNamespace(W_dec=w_dec), codes=codes, batch=batch, pairs=pairs, step=3)
    names = [k for k in part.metrics() if k.endswith("_penalty")]
    assert len(names) == 1
    name = names[0].removesuffix("_penalty").removeprefix("regularizer/")
    weight = getattr(section, f"{name}_weight") * scale
    value, norm = part.metrics()[names[0]], part.metrics()[f"regularizer/{name}_gradient_norm"]
    torch.testing.assert_close((total - base).float(), weight * value, rtol=1e-4, atol=0)
    total.backward()
    target, plain = (w_dec, 1.0) if name == "orthogonality" else (values, 0.5)
    assert target.grad is not None
    torch.testing.assert_close((target.grad - plain).norm(), weight * norm, rtol=1e-3, atol=1e-6)
    effect = part._ledger.record()["components"]["diversity_regularizer"]
    assert effect["calls"] == 1
    assert effect["effect"]["penalty"] == pytest.approx(weight * float(value))
    assert effect["effect"]["gradient_norm"] == pytest.approx(weight * float(norm))
    assert effect["effect"]["gradient_norm"] > 0
    on = {"correlation_pairs": 2, "orthogonality_rows": 12, "all_pairs_entries": codes.nnz}
    assert effect["effect"][f"{name}_evaluations"] == 1
    unit = TERM_UNITS[name]
    assert effect["effect"][f"{name}_{unit}"] == on.get(f"{name}_{unit}", codes.nnz)
    assert sum(key.endswith("_evaluations") for key in effect["effect"]) == 1


def test_correlation_term_waits_for_pairs(tmp_path: Path) -> None:
    part = regularizer(replace(OFF, correlation_weight=0.04), 6, tmp_path)
    loss = torch.tensor(2.0, requires_grad=True)
    codes = SparseCodes.from_dense(dense(8, 6, 0.5, 12))
    empty = torch.empty(0, dtype=torch.int64)
    for pairs in (None, (empty, empty)):
        assert part.apply_penalty(loss, SimpleNamespace(W_dec=torch.ones(6, 2)), codes=codes, pairs=pairs) is loss


def test_descending_the_pair_penalty_parts_a_duplicate() -> None:
    g = torch.Generator().manual_seed(13)
    codes = SparseCodes.from_dense(dense(200, 4, 0.6, 14))
    rows, latents = codes.rows(), codes.indices
    shared = torch.rand(200, generator=g, dtype=torch.float64)
    values = torch.where(latents < 2, shared[rows] + 0.2, codes.values)
    i, j = torch.tensor([0]), torch.tensor([1])
    first = pair_penalty(codes.with_values(values), i, j, 0.3).value
    for _ in range(200):
        got = pair_penalty(codes.with_values(values), i, j, 0.3)
        values = torch.where(values > 0, (values - 3 * got.gradient).clamp(min=0), values)
    assert float(got.value) < 0.5 * float(first)
    assert torch.equal(values[latents >= 2], codes.values[latents >= 2])


def test_dual_control_grows_falls_and_stays_in_bounds(tmp_path: Path) -> None:
    section = replace(OFF, correlation_weight=0.01, correlation_weight_max=0.02, adaptive_step=5.0, target_rate=0.1)
    codes = SparseCodes.from_dense(dense(50, 10, 0.9, 15))
    model = SimpleNamespace(W_dec=torch.ones(10, 2))
    many = (torch.arange(0, 10, 2), torch.arange(1, 10, 2))
    none = (torch.empty(0, dtype=torch.int64),) * 2
    loss = torch.zeros((), requires_grad=True)

    def weight_after(pairs: tuple[Tensor, Tensor], calls: int) -> float:
        part = regularizer(section, 10, tmp_path)
        for step in range(calls):
            part.apply_penalty(loss, model, codes=codes, pairs=pairs, step=step)
        return float(part.state_dict()["weight"])

    # Every live latent paired: rate 1, so one step multiplies by exp(5 * 0.9), beyond the bound.
    assert weight_after(many, 1) == 0.02
    # Nobody has looked for pairs yet: that there are none says nothing.
    assert weight_after(none, 5) == 0.01
    surveyed = regularizer(section, 10, tmp_path)
    surveyed._ledger.record_survey()
    surveyed.apply_penalty(loss, model, codes=codes, pairs=none, step=0)
    assert float(surveyed.state_dict()["weight"]) == pytest.approx(0.01 * math.exp(-5 * 0.1))
    one = (torch.tensor([0]), torch.tensor([1]))
    assert weight_after(one, 1) == pytest.approx(0.01 * math.exp(5 * (0.2 - 0.1)))
    fixed = regularizer(replace(section, adaptive=False), 10, tmp_path)
    fixed.apply_penalty(loss, model, codes=codes, pairs=many)
    assert float(fixed.state_dict()["weight"]) == 0.01


@pytest.mark.parametrize("steps", [40, 4000])
def test_dual_control_is_as_fast_as_the_run_is_long(steps: int, tmp_path: Path) -> None:
    # A tenth of the run from one bound to the other, however far off the rate is, and back when there are no pairs.
    section = replace(OFF, correlation_weight=0.01, correlation_weight_max=0.1, target_rate=0.002)
    part = DiversityRegularizer(section, 500, "cpu", 0, ledger(tmp_path), tmp_path, steps=steps)
    part._ledger.record_survey()
    codes = SparseCodes.from_dense(dense(20, 500, 0.9, 15))
    model, loss = SimpleNamespace(W_dec=torch.ones(500, 2)), torch.zeros((), requires_grad=True)
    one = (torch.tensor([0]), torch.tensor([1]))  # 2 of 500 latents: off by the target itself
    none = (torch.empty(0, dtype=torch.int64),) * 2
    weights = []
    for step in range(steps // 5 + 2):
        part.apply_penalty(loss, model, codes=codes, pairs=one if step < steps // 10 else none, step=step)
        weights.append(float(part.state_dict()["weight"]))
    tenth = steps // 10
    assert weights[tenth // 2 - 1] == pytest.approx(math.sqrt(0.01 * 0.1), rel=1e-6)
    assert weights[tenth - 1] == pytest.approx(0.1, rel=1e-6)
    assert weights[-1] == 0.01


def test_chunks_cover_every_row_before_any_twice(tmp_path: Path) -> None:
    section = replace(OFF, orthogonality_weight=1.0, orthogonality_chunk=7, orthogonality_every=3)
    part = regularizer(section, 20, tmp_path)
    passes = [torch.cat([part._chunk(step) for step in range(start, start + 9, 3)]) for start in (0, 9)]
    for rows in passes:
        assert sorted(rows.tolist()) == list(range(20))
    assert passes[0].tolist() != passes[1].tolist()
    other = DiversityRegularizer(section, 20, "cpu", 1, ledger(tmp_path))
    assert other._chunk(0).tolist() != part._chunk(0).tolist()


def test_orthogonality_acts_every_few_steps_only(tmp_path: Path) -> None:
    section = replace(OFF, orthogonality_weight=1.0, orthogonality_every=4)
    part = regularizer(section, 6, tmp_path)
    loss = torch.zeros((), requires_grad=True)
    model = SimpleNamespace(W_dec=torch.ones(6, 3, requires_grad=True))
    acted = [part.apply_penalty(loss, model, step=s) is not loss for s in range(1, 9)]
    assert acted == [False, False, False, True, False, False, False, True]


def test_half_precision_codes_take_the_gradient_in_their_type(tmp_path: Path) -> None:
    part = regularizer(replace(OFF, correlation_weight=0.04, adaptive=False), 6, tmp_path)
    codes = SparseCodes.from_dense(dense(40, 6, 0.8, 16))
    values = codes.values.bfloat16().requires_grad_()
    pairs = (torch.tensor([0]), torch.tensor([1]))
    loss = part.apply_penalty(
        values.float().sum() * 0, SimpleNamespace(W_dec=torch.ones(6, 2)), codes=codes.with_values(values), pairs=pairs
    )
    loss.backward()
    assert values.grad is not None
    assert values.grad.dtype == torch.bfloat16
    assert bool(values.grad.any())


def test_state_and_file_survive_a_resume(tmp_path: Path) -> None:
    section = replace(OFF, correlation_weight=0.01, orthogonality_weight=0.1, orthogonality_every=1)
    codes = SparseCodes.from_dense(dense(50, 10, 0.9, 17))
    model = SimpleNamespace(W_dec=torch.randn(10, 4, generator=torch.Generator().manual_seed(18)))
    pairs = (torch.tensor([0]), torch.tensor([1]))
    loss = torch.zeros((), requires_grad=True)
    first = regularizer(section, 10, tmp_path)
    for step in (1, 2, 3):
        first.apply_penalty(loss, model, codes=codes, pairs=pairs, step=step)
        first.save(step)
    second = regularizer(section, 10, tmp_path)
    second.load_state_dict(first.state_dict())
    results = [p.apply_penalty(loss, model, codes=codes, pairs=pairs, step=4) for p in (first, second)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(first.state_dict()["weight"], second.state_dict()["weight"])
    # The resumed run repeats step 3.
    path = second.save(3)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    assert "regularizer/correlation_weight" in lines[-1]
    with pytest.raises(ValueError, match="expected d_sae = 4, got 10"):
        regularizer(section, 4, tmp_path).load_state_dict(first.state_dict())


def test_terms_without_what_they_act_on_say_so(tmp_path: Path) -> None:
    loss, model = torch.zeros((), requires_grad=True), SimpleNamespace(W_dec=torch.ones(6, 2))
    pairs = (torch.tensor([0]), torch.tensor([1]))
    with pytest.raises(ValueError, match="correlation_weight is above 0, so expected codes"):
        regularizer(replace(OFF, correlation_weight=0.04), 6, tmp_path).apply_penalty(loss, model, pairs=pairs)
    codes = SparseCodes.from_dense(dense(8, 6, 0.5, 19))
    with pytest.raises(ValueError, match="expected batch"):
        regularizer(replace(OFF, position_entropy_weight=0.1), 6, tmp_path).apply_penalty(loss, model, codes=codes)
    with pytest.raises(ValueError, match="expected d_sae = 7, got shape"):
        regularizer(replace(OFF, all_pairs_weight=0.1), 7, tmp_path).apply_penalty(loss, model, codes=codes)
    with pytest.raises(ValueError, match="expected an out_dir"):
        DiversityRegularizer(OFF, 6, "cpu", 0, ledger(tmp_path)).save(1)
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match="scale: expected a positive number"):
            DiversityRegularizer(OFF, 6, "cpu", 0, ledger(tmp_path), scale=wrong)
    with pytest.raises(ValueError, match="accumulation: expected at least 1"):
        DiversityRegularizer(OFF, 6, "cpu", 0, ledger(tmp_path), accumulation=0)


def test_a_healthy_run_with_nothing_to_penalise_is_not_stopped(tmp_path: Path) -> None:
    # 512 dimensions: no two random decoder rows reach a cosine of 0.3; and the monitor found no pair.
    part = regularizer(RegularizerSection(orthogonality_weight=0.01, orthogonality_every=1), 64, tmp_path)
    book = part._ledger
    book._enabled = {**dict.fromkeys(REQUIRED_EFFECTS, False), "diversity_regularizer": True}
    model = SimpleNamespace(W_dec=torch.randn(64, 512, generator=torch.Generator().manual_seed(28)))
    codes = SparseCodes.from_dense(dense(30, 64, 0.2, 29))
    empty = torch.empty(0, dtype=torch.int64)
    loss = torch.zeros((), requires_grad=True)
    for step in range(3):
        part.apply_penalty(loss, model, codes=codes, pairs=(empty, empty), step=step)
    part.save(3)
    with pytest.raises(LedgerError, match="correlation term was evaluated on 0 pairs and the monitor never surveyed"):
        book.verify(3)
    book.record_survey()
    book.verify(3)
    effect = json.loads(book.write().read_text())["components"]["diversity_regularizer"]["effect"]
    assert effect.pop("finding").startswith("nothing to penalise: correlation was evaluated 3 times over 0 pairs")
    assert effect == {
        "correlation_evaluations": 3,
        "correlation_pairs": 0,
        "orthogonality_evaluations": 3,
        "orthogonality_rows": 192,
        "penalty": 0,
        "gradient_norm": 0,
        "surveys": 1,
    }


def test_a_term_that_is_never_evaluated_is_named(tmp_path: Path) -> None:
    part = regularizer(RegularizerSection(orthogonality_weight=0.01, orthogonality_every=5), 6, tmp_path)
    part._ledger._enabled = {**dict.fromkeys(REQUIRED_EFFECTS, False), "diversity_regularizer": True}
    loss = torch.zeros((), requires_grad=True)
    part.apply_penalty(loss, SimpleNamespace(W_dec=torch.ones(6, 2)), pairs=None, step=1)
    part.save(1)
    with pytest.raises(LedgerError) as caught:
        part._ledger.verify(1)
    assert "the correlation term was never evaluated: it was given no pairs" in str(caught.value)
    assert "the orthogonality term was never evaluated" in str(caught.value)


def test_micro_batches_of_a_step_move_the_dual_weight_once(tmp_path: Path) -> None:
    section = replace(OFF, correlation_weight=0.01, correlation_weight_max=1.0, adaptive_step=0.5, target_rate=0.1)
    half, whole = dense(50, 10, 0.9, 30), dense(50, 10, 0.9, 31)
    half[:, 5:] = 0
    pairs = (torch.tensor([0]), torch.tensor([1]))
    model, loss = SimpleNamespace(W_dec=torch.ones(10, 2)), torch.zeros((), requires_grad=True)
    part = regularizer(section, 10, tmp_path)
    weights = []
    for step in range(3):
        for micro, z in enumerate((half, whole)):
            part.apply_penalty(loss, model, codes=SparseCodes.from_dense(z), pairs=pairs, step=step, micro=micro)
            weights.append(float(part.metrics()["regularizer/correlation_weight"]))
    # Rates: 2 of 5 live at first, then 2 of 10; a step moves by their mean and holds one weight for all of it.
    first = 0.01 * math.exp(0.5 * (0.3 - 0.1))
    second = first * math.exp(0.5 * (0.2 - 0.1))
    assert weights == pytest.approx([0.01, 0.01, first, first, second, second])
    assert part.state_dict()["steps"] == 3
    resumed = regularizer(section, 10, tmp_path)
    resumed.load_state_dict(part.state_dict())
    for each in (part, resumed):
        each.apply_penalty(loss, model, codes=SparseCodes.from_dense(whole), pairs=pairs, step=3)
    assert resumed.state_dict()["weight"] == part.state_dict()["weight"]


def test_orthogonality_is_computed_once_a_step_at_full_weight(tmp_path: Path) -> None:
    section = replace(OFF, orthogonality_weight=1.0, orthogonality_every=1)
    model = SimpleNamespace(W_dec=torch.eye(3).repeat(4, 1))
    loss = torch.tensor(0.0, requires_grad=True)

    def step_total(accumulation: int) -> float:
        part = DiversityRegularizer(section, 12, "cpu", 0, ledger(tmp_path), accumulation=accumulation)
        losses = [part.apply_penalty(loss, model, step=1, micro=m) for m in range(accumulation)]
        assert [x is loss for x in losses] == [False] + [True] * (accumulation - 1)
        record = part._ledger.record()["components"]["diversity_regularizer"]["effect"]
        assert record["orthogonality_evaluations"] == 1
        return float(sum(x.detach() for x in losses) / accumulation)

    assert step_total(4) == pytest.approx(step_total(1)) == pytest.approx(0.49)


def test_position_state_and_failed_writes(tmp_path: Path) -> None:
    section = replace(OFF, position_entropy_weight=1.0, position_entropy_floor=0.99)
    parts = [regularizer(section, 5, tmp_path / name) for name in ("one", "two")]
    model, loss = SimpleNamespace(W_dec=torch.ones(5, 2)), torch.zeros((), requires_grad=True)
    positions = torch.arange(80) % 20
    batch = ActivationBatch(torch.zeros(80, 1), torch.zeros(80, 1), positions, positions)
    for step in range(4):
        codes = SparseCodes.from_dense(dense(80, 5, 0.5, 40 + step))
        if step == 2:
            parts[1] = regularizer(section, 5, tmp_path / "two")
            parts[1].load_state_dict(parts[0].state_dict())
        for part in parts:
            if part is parts[0] or step >= 2:
                part.apply_penalty(loss, model, codes=codes, batch=batch, step=step)
    name = "regularizer/position_entropy_penalty"
    assert float(parts[0].metrics()[name]) > 0
    assert torch.equal(parts[0].metrics()[name], parts[1].metrics()[name])
    path = tmp_path / "one" / "regularizer.jsonl"
    path.mkdir(parents=True)  # a folder in the file's place: it can be neither read nor replaced
    with pytest.raises(IsADirectoryError):
        parts[0].save(4)
    assert list((tmp_path / "one").rglob("*.tmp")) == []
    path.rmdir()
    assert parts[0].save(4) == path
