"""Meters, baselines, sources, stop requests, evaluation: the small parts of the trainer."""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from transcoder.activations import ActivationBatch
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.baselines import LinearBaseline
from transcoder.training.evaluation import evaluate
from transcoder.training.observers import Meters
from transcoder.training.signals import StopRequest
from transcoder.training.sources import IterableSource, own_data

CPU = torch.device("cpu")


def batch(rows: int, seed: int, d_in: int = 6, d_out: int = 4) -> ActivationBatch:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, d_in, generator=g) * 2 + 1
    W = torch.randn(d_out, d_in, generator=torch.Generator().manual_seed(77))
    y = x @ W.T + 0.5 * torch.relu(x[:, :d_out]) + 3
    return ActivationBatch(x, y, torch.arange(rows), torch.arange(rows))


def test_meters_average_an_interval_and_start_again() -> None:
    meters = Meters()
    for value in (1.0, 2.0, 6.0):
        meters.add({"a": torch.tensor(value)})
    meters.add({"b": torch.tensor(5)})
    assert meters.read({"now": torch.tensor(True)}) == {"a": 3.0, "b": 5.0, "now": 1.0}
    assert meters.read() == {}


def test_meters_resume_within_an_interval() -> None:
    whole, first, second = Meters(), Meters(), Meters()
    whole.add({"a": torch.tensor(1.0)})
    first.add({"a": torch.tensor(1.0)})
    second.load_state_dict(first.state_dict())
    for meters in (whole, second):
        meters.add({"a": torch.tensor(2.0)})
    assert whole.read() == second.read() == {"a": 1.5}


def test_linear_baseline_is_least_squares() -> None:
    baseline = LinearBaseline(6, 4, limit=3000)
    batches = [batch(500, seed) for seed in range(8)]
    for b in batches:
        baseline.update(b.source, b.target)
    assert baseline.tokens == 3000
    x = torch.cat([b.source for b in batches[:6]]).double()
    y = torch.cat([b.target for b in batches[:6]]).double()
    design = torch.cat([x, torch.ones(3000, 1)], 1)
    solution = torch.linalg.lstsq(design, y).solution
    torch.testing.assert_close(baseline.solve(), solution.float(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(baseline.mean(), y.mean(0).float())
    torch.testing.assert_close(baseline.predict(baseline.solve(), x), (design @ solution).float(), rtol=1e-4, atol=1e-4)


def test_baseline_state_goes_on_where_it_was() -> None:
    one, two = LinearBaseline(6, 4, 10**6), LinearBaseline(6, 4, 10**6)
    one.update(*(batch(50, 0).source, batch(50, 0).target))
    two.load_state_dict(one.state_dict())
    for baseline in (one, two):
        baseline.update(batch(50, 1).source, batch(50, 1).target)
    assert torch.equal(one.solve(), two.solve())


@pytest.mark.parametrize("target", [torch.full((9, 4), 0.1), torch.zeros(9, 4), torch.tensor([[1.0, 2, 3, 4]])])
def test_evaluation_of_targets_that_do_not_vary_is_finite(target: torch.Tensor) -> None:
    """FVU is then a share of the targets' mean square, or of 1 a number: as in training."""
    model = Transcoder(TranscoderConfig(6, 4, 20, 3))
    one = ActivationBatch(batch(len(target), 1).source, target, torch.arange(len(target)), torch.arange(len(target)))
    baseline = LinearBaseline(6, 4, 10**6)
    baseline.update(one.source, one.target)
    figures = evaluate(model, [one], one, baseline)
    with torch.no_grad():
        errors = (model.eval()(one.source) - target).double().square().sum()
    size = float(target.double().square().sum()) or target.numel()
    assert figures["evaluation/fvu"] == pytest.approx(float(errors) / size, rel=1e-4)
    assert figures["evaluation/sink_fvu"] == pytest.approx(float(errors) / size, rel=1e-4)
    assert figures["evaluation/baseline_mean_fvu"] == pytest.approx(0, abs=1e-9)


def test_evaluation_says_where_latents_are_active() -> None:
    """Two latents read one input each: the first is on everywhere, the second in the first tenth of the sequence only."""
    model = Transcoder(TranscoderConfig(2, 2, 2, 2))
    with torch.no_grad():
        model.W_enc.copy_(torch.eye(2))
        model.b_enc.zero_()
    positions = torch.arange(100)
    x = torch.stack([torch.ones(100), (positions < 10).float() * 5], 1)
    # Two batches of other positions: neither holds the whole sequence, and the bins are the same all the same.
    held = [ActivationBatch(x[a], x[a] + 1, positions[a], positions[a]) for a in (slice(0, 60), slice(60, 100))] * 4
    sinks = ActivationBatch(torch.tensor([[400.0, 0]]), torch.zeros(1, 2), positions[:1], positions[:1])
    figures = evaluate(model, held, sinks)
    assert figures["evaluation/position_judged"] == 2
    assert figures["evaluation/position_entropy_p01"] == pytest.approx(0, abs=1e-6)
    assert figures["evaluation/position_entropy_median"] == pytest.approx(0, abs=1e-6)
    assert figures["evaluation/sink_mass_p99"] == pytest.approx(0.5)  # 400 of 4 * 100 * 1 + 400
    assert figures["evaluation/sink_mass_median"] == 0
    flat = [ActivationBatch(torch.ones(100, 2), torch.randn(100, 2), positions, positions)]
    assert evaluate(model, flat)["evaluation/position_entropy_p01"] == pytest.approx(1)
    rare = [ActivationBatch(torch.ones(20, 2), torch.randn(20, 2), positions[:20], positions[:20])]
    figures = evaluate(model, rare)
    assert figures["evaluation/position_judged"] == 0
    assert "evaluation/position_entropy_median" not in figures


def test_evaluation_is_the_formula_on_raw_targets() -> None:
    model = Transcoder(TranscoderConfig(6, 4, 20, 3, widths=[5, 20], skip=True))
    held = [batch(64, 1), batch(40, 2)]
    model.set_normalization(held[0].source, held[0].target, "standardize")
    torch.nn.init.normal_(model.W_skip, std=0.1)
    baseline = LinearBaseline(6, 4, 10**6)
    baseline.update(held[0].source, held[0].target)
    figures = evaluate(model, held, batch(7, 3), baseline)
    assert model.training
    x, y = torch.cat([b.source for b in held]), torch.cat([b.target for b in held])
    total = (y - y.mean(0)).square().sum()
    model.eval()
    with torch.no_grad():
        assert figures["evaluation/fvu"] == pytest.approx(float((model(x) - y).square().sum() / total), rel=1e-4)
        codes = model.encode(x)
        narrow = codes.to_dense().clone()
        narrow[:, 5:] = 0
        y_hat = narrow @ model.W_dec + model.b_dec + model.normalize_source(x) @ model.W_skip.T
        narrow_error = (y_hat / model.target_scale + model.target_mean - y).square().sum()
        assert figures["evaluation/fvu_prefix_5"] == pytest.approx(float(narrow_error / total), rel=1e-4)
        assert figures["evaluation/l0"] == pytest.approx(float((codes.values > 0).sum()) / 104)
    mean_error = (y - held[0].target.mean(0)).square().sum()
    assert figures["evaluation/baseline_mean_fvu"] == pytest.approx(float(mean_error / total), rel=1e-4)
    assert 0 < figures["evaluation/baseline_linear_fvu"] < 1
    assert figures["evaluation/sink_tokens"] == 7
    with torch.no_grad():
        on_sinks = model.encode(10 * batch(7, 3).source).to_dense() > 0
        figures = evaluate(model, [batch(2, 9)], dataclasses.replace(batch(7, 3), source=10 * batch(7, 3).source))
        elsewhere = model.encode(batch(2, 9).source).to_dense() > 0
    assert figures["evaluation/sink_l0"] == pytest.approx(float(on_sinks.sum()) / 7)
    wanted = int((on_sinks.any(0) & ~elsewhere.any(0)).sum())
    assert figures["evaluation/sink_only_latents"] == wanted > 0
    with pytest.raises(ValueError, match="at least one held-out batch"):
        evaluate(model, [])


def test_an_iterable_is_looked_at_without_being_used_up() -> None:
    source = IterableSource((batch(8, seed) for seed in range(5)), CPU)
    assert (source.d_in, source.d_out) == (6, 4)
    seen = source.look_ahead(20)
    assert len(seen) == 3
    again = [next(source) for _ in range(5)]
    for a, b in zip(seen, again, strict=False):
        assert torch.equal(a.source, b.source)
    with pytest.raises(StopIteration):
        next(source)
    with pytest.raises(ValueError, match="cannot go on where the run stopped"):
        source.load_state_dict({"origin": None})


class Counting:
    """A resumable iterator."""

    def __init__(self) -> None:
        self.seed = 0

    def __iter__(self) -> Iterator[ActivationBatch]:
        return self

    def __next__(self) -> ActivationBatch:
        self.seed += 1
        return batch(8, self.seed)

    def state_dict(self) -> dict:
        return {"seed": self.seed}

    def load_state_dict(self, state: dict) -> None:
        self.seed = state["seed"]


def test_an_iterable_with_a_state_is_rewound_and_resumed() -> None:
    source = IterableSource(Counting(), CPU)
    source.look_ahead(30)
    first = [next(source) for _ in range(3)]
    assert torch.equal(first[0].source, batch(8, 1).source)
    state = source.state_dict()
    rest = next(source)
    other = IterableSource(Counting(), CPU)
    other.load_state_dict(state)
    assert torch.equal(next(other).source, rest.source)


def test_an_empty_iterable_is_refused() -> None:
    with pytest.raises(ValueError, match="got an empty iterable"):
        IterableSource([], CPU)


def with_field(**changes: Any) -> ActivationBatch:
    base = dataclasses.replace(
        batch(8, 0),
        sequences=torch.arange(8),
        weights=torch.ones(8),
        contexts=torch.zeros(8, 5, dtype=torch.int32),
        context_anchor=3,
    )
    return dataclasses.replace(base, **changes)


NAN = torch.ones(8, 6).index_fill(0, torch.tensor([5]), torch.nan)
WRONG_FIELDS = [
    ({"source": [[1.0]]}, TypeError, "source: expected a tensor \\[B, d_in\\], got list"),
    ({"source": torch.ones(8, 6, dtype=torch.int64)}, TypeError, "source: expected float32, .*, got int64"),
    ({"source": torch.ones(8)}, ValueError, "source: expected \\[B, d_in\\], no size 0, got \\[8\\]"),
    ({"source": torch.ones(0, 6)}, ValueError, "source: expected .*no size 0, got \\[0, 6\\]"),
    ({"target": torch.ones(7, 4)}, ValueError, "target: expected \\[B, d_out\\] with B = 8 as in source"),
    ({"target": None}, TypeError, "target: expected a tensor"),
    ({"tokens": torch.ones(8)}, TypeError, "tokens: expected int64, got float32"),
    ({"tokens": torch.ones(8, 1, dtype=torch.int64)}, ValueError, "tokens: expected \\[B\\]"),
    ({"positions": torch.arange(9)}, ValueError, "positions: expected \\[B\\] with B = 8"),
    ({"positions": torch.arange(8).int()}, TypeError, "positions: expected int64, got int32"),
    ({"sequences": torch.arange(4)}, ValueError, "sequences: expected \\[B\\] with B = 8"),
    ({"weights": torch.ones(8, dtype=torch.int64)}, TypeError, "weights: expected float32"),
    ({"contexts": torch.ones(8, 5)}, TypeError, "contexts: expected int32, int64, got float32"),
    ({"context_anchor": 5}, ValueError, "context_anchor: expected .* below 5, got 5"),
    ({"contexts": None}, ValueError, "context_anchor: expected .* below 1, got 3"),
]
WRONG_VALUES = [
    ({"source": NAN}, ValueError, "source: expected finite numbers; 1 of 8 rows are not, the first is row 5"),
    ({"target": NAN[:, :4]}, ValueError, "target: expected finite numbers"),
    ({"weights": -torch.ones(8)}, ValueError, "weights: expected finite numbers, none below 0"),
    ({"tokens": torch.full((8,), -1)}, ValueError, "tokens: expected none below 0"),
]


@pytest.mark.parametrize(("change", "kind", "words"), WRONG_FIELDS + WRONG_VALUES)
def test_a_wrong_first_batch_is_refused_by_field(change: dict, kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"batches: the first batch: {words}"):
        IterableSource([with_field(**change)], CPU)


@pytest.mark.parametrize(
    ("change", "kind", "words"),
    [
        *WRONG_FIELDS,
        ({"source": torch.ones(8, 7)}, ValueError, "source: expected the same layout .*, width 6 so far, got width 7"),
        ({"contexts": torch.ones(8, 4).int()}, ValueError, "contexts: .*width 5 so far, got width 4"),
        ({"sequences": None}, ValueError, "sequences: .*so far, got absent"),
        ({"context_anchor": 1}, ValueError, "context_anchor: .*3 so far, got 1"),
    ],
)
def test_a_later_batch_is_checked_by_shape(change: dict, kind: type[Exception], words: str) -> None:
    source = IterableSource([with_field(), with_field(source=NAN), with_field(**change)], CPU)
    next(source)
    next(source)  # values are not read in a step
    with pytest.raises(kind, match=f"batches: batch 2: {words}"):
        next(source)


def test_things_that_are_no_batches() -> None:
    with pytest.raises(TypeError, match="batches: expected an iterable of ActivationBatch, got int"):
        IterableSource(3, CPU)
    with pytest.raises(TypeError, match="batches: the first batch: expected an ActivationBatch, got tuple"):
        IterableSource([(torch.ones(3, 2), torch.ones(3, 2))], CPU)


def test_held_out_batches_are_checked_in_full() -> None:
    with pytest.raises(ValueError, match="heldout: batch 1: source: expected finite numbers"):
        own_data([with_field()], [with_field(), with_field(source=NAN)], 8, CPU)
    with pytest.raises(
        ValueError, match="heldout: expected source and target of the widths of `batches`, 6 and 4, got 5"
    ):
        own_data([with_field()], [with_field(source=torch.ones(8, 5))], 8, CPU)
    with pytest.raises(ValueError, match="heldout: expected at least one ActivationBatch"):
        own_data([with_field()], [], 8, CPU)
    source, held = own_data([with_field() for _ in range(4)], None, 9, CPU)
    assert (len(held), len(source.take(100))) == (2, 2)


def test_batches_are_cut_off_from_the_graph_that_made_them() -> None:
    weight = torch.ones(6, 4, requires_grad=True)
    made = with_field(target=torch.ones(8, 6) @ weight)
    assert not next(IterableSource([made], CPU)).target.requires_grad


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_is_noted_once_and_the_handlers_come_back(name: str) -> None:
    number = getattr(signal, name)
    before = signal.getsignal(number)
    caught = []
    signal.signal(number, lambda *_: caught.append(name))
    try:
        with StopRequest() as stop:
            assert stop.signal is None
            os.kill(os.getpid(), number)
            assert stop.signal == name
            assert caught == []
            os.kill(os.getpid(), number)
            assert caught == [name]
        os.kill(os.getpid(), number)
        assert caught == [name, name]
    finally:
        signal.signal(number, before)
