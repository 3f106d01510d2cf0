"""The trainer's rows: a total counts what is rare at its true rate, a round holds what is due from one report to the next."""

from __future__ import annotations

import math

import pytest

from bench import overhead, whole_run
from bench.cases import Size
from bench.monitoring_overhead import DUE, PERIOD, RARE, compared, runs, seconds_of
from bench.roofline import Shape
from bench.statistics import mean, ratios, summary, whole_ratio
from transcoder.config import RunConfig

TINY = Size(64, 16, 128, 4)


def test_ratios_are_taken_within_rounds() -> None:
    """A machine that was four times slower for a while: the ratio is that of the work, its spread 0."""
    slow = [1, 1, 4, 4, 4, 1]
    assert ratios([2.0 * s for s in slow], [1.0 * s for s in slow]) == {"median": 2.0, "low": 2.0, "high": 2.0}
    found = whole_ratio([2.0 * s for s in slow], [1.0 * s for s in slow])
    assert found == {"total": 2.0, "low": 2.0, "high": 2.0}
    assert summary([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0}
    assert summary([7.0]) == {"median": 7.0, "low": 7.0, "high": 7.0}


def test_a_total_counts_what_a_median_leaves_out() -> None:
    off, on = [1.0] * 5, [1.0, 1.0, 1.0, 1.0, 1.5]
    assert ratios(on, off)["median"] == 1.0
    found = whole_ratio(on, off)
    assert found["total"] == pytest.approx(1.1)
    # s / sqrt(n) = 0.1, 4 degrees of freedom.
    assert found["high"] - found["total"] == pytest.approx(2.776 * 0.1, rel=1e-3)
    kinds = compared({"off": off, "all": on}, steps=100, rows=10)
    assert kinds["all"]["ratio"] == found
    assert kinds["off"]["ratio"] == {"total": 1.0, "low": 1.0, "high": 1.0}
    assert kinds["all"]["seconds_per_step"]["total"] == pytest.approx(5.5 / 500)
    assert kinds["all"]["tokens_per_second"] == pytest.approx(5000 / 5.5)


def test_one_round_has_no_interval_and_many_a_narrow_one() -> None:
    assert math.isnan(whole_ratio([2.0], [1.0])["low"])
    few, many = mean([1.0, 2.0]), mean([1.0, 2.0] * 50)
    assert few["total"] == many["total"] == 1.5
    assert many["high"] - 1.5 == pytest.approx(2.0 * 0.5 / math.sqrt(99), rel=0.02)
    assert few["high"] - 1.5 == pytest.approx(12.7062047 * 0.5)  # Student, one degree of freedom


def test_what_is_due_is_as_often_as_by_default() -> None:
    default = RunConfig.load("demo", {"checkpoint.every": 500})
    assert (
        default.antidup.monitor.correlation_save_frequency
        == DUE["antidup.monitor.correlation_save_frequency"]
        == PERIOD
    )
    assert default.antidup.samples.save_frequency == DUE["antidup.samples.save_frequency"] == RARE
    assert DUE["checkpoint.every"] == RARE == whole_run.CHUNK
    assert RARE % PERIOD == 0


def test_a_round_holds_one_report_and_five_hold_the_rest() -> None:
    with runs(TINY, {"all": ("monitor", "samples", "regularizer")}, {}) as opened:
        (run,) = opened.values()
        reports, samples = run.run_dir / "anti_duplication_logs", run.run_dir / "activation_samples" / "samples.parquet"
        wrote = []
        for turn in range(RARE // PERIOD):
            seconds_of(run, PERIOD)
            assert len(list(reports.glob("correlation_step_*.json"))) == turn + 1
            wrote.append(samples.stat().st_mtime_ns if samples.is_file() else 0)
        # What is written beside training is there when the clock stops.
        assert [folder.name for folder in (run.run_dir / "checkpoints").glob("step_*")] == [f"step_{RARE:08d}"]
    # Once in RARE steps, beside the verification of the first round, which is the one that warms up.
    assert len(set(wrote[:-1])) == 1
    assert wrote[-1] > wrote[-2]


def test_the_overhead_is_that_of_runs_in_turn() -> None:
    found = overhead.trainer(TINY, pairs=2, steps=3)
    assert list(found) == ["off", "monitor", "all"]
    assert found["off"]["wall"]["ratio"] == {"total": 1.0, "low": 1.0, "high": 1.0}
    assert all(len(clock["seconds"]) == 2 for kind in found.values() for clock in kind.values())
    lines = overhead.table({"trainer": {"tiny": found}, "roofline": overhead.predicted(Shape(1024, 2304, 18432, 48))})
    assert [line.split(":")[0] for line in lines[1:]] == [
        "trainer tiny",
        "trainer tiny",
        "predicted, H100, B 1024, d 2304, N 18432, k 48",
    ]
    with pytest.raises(SystemExit):
        overhead.main(["--pairs", "4"])
