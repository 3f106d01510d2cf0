from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from transcoder.config import RunConfig, TrainingSection
from transcoder.training.schedule import Calendar, learning_rate, peak_learning_rate


def test_the_lost_runs_schedule_ends_at_its_floor() -> None:
    """lr 3e-4, warm-up 200, cosine to 1 % over 4882 steps; the lost run ignored the floor."""
    section = TrainingSection(steps=4882, warmup_steps=200, min_lr_ratio=0.01)
    assert learning_rate(0, section, 3e-4) == pytest.approx(3e-4 / 200)
    assert learning_rate(199, section, 3e-4) == pytest.approx(3e-4)
    assert learning_rate(200, section, 3e-4) == pytest.approx(3e-4)
    assert learning_rate(4881, section, 3e-4) == pytest.approx(3e-6)
    middle = 200 + (4881 - 200) / 2
    expected = 3e-6 + (3e-4 - 3e-6) * 0.5 * (1 + math.cos(math.pi * (int(middle) - 200) / 4681))
    assert learning_rate(int(middle), section, 3e-4) == pytest.approx(expected)


@given(
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    floor=st.floats(0, 1),
    schedule=st.sampled_from(["cosine", "constant"]),
)
def test_never_zero_at_the_start_never_above_the_peak_never_below_the_floor(
    steps: int, warmup: int, floor: float, schedule: str
) -> None:
    section = TrainingSection(steps=steps, warmup_steps=warmup, min_lr_ratio=floor, schedule=schedule)
    rates = [learning_rate(step, section, 1.0) for step in range(steps)]
    assert rates[0] > 0 or floor == 0
    assert all(0 <= rate <= 1 + 1e-12 for rate in rates)
    after = rates[warmup:]
    assert all(rate >= floor - 1e-12 for rate in after)
    assert after == sorted(after, reverse=True)


def test_default_peak_follows_the_dictionary() -> None:
    config = RunConfig.from_dict({"transcoder": {"d_sae": 2**16}})
    assert peak_learning_rate(config) == pytest.approx(1e-4)
    assert peak_learning_rate(config.replace({"training.lr": 0.5})) == 0.5


def test_recycling_ends_with_its_share_of_the_run() -> None:
    settings = {
        "training.steps": 100,
        "antidup.recycle.enabled": True,
        "antidup.recycle.every": 10,
        "antidup.recycle.until": 0.5,
    }
    calendar = Calendar(RunConfig().replace(settings))
    assert [step for step in range(0, 101, 5) if calendar.recycling(step)] == [10, 20, 30, 40, 50]


def test_pairs_are_searched_for_at_doubling_steps_before_the_first_report() -> None:
    calendar = Calendar(RunConfig().replace({"antidup.monitor.correlation_save_frequency": 90}))
    assert [step for step in range(1, 200) if calendar.searching(step)] == [10, 20, 40, 80]
    assert next(step for step in range(1, 200) if calendar.reporting(step)) == 90
