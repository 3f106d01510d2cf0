"""Charts of the page: scales, breaks and averages of what they are given."""

from __future__ import annotations

import json
import math

import pytest

from transcoder.reporting.charts import (
    MAX_POINTS,
    Line,
    bar_chart,
    interval_chart,
    interval_words,
    line_chart,
    ordered_colors,
    short,
)


def test_a_value_that_is_not_finite_breaks_the_line_and_is_counted() -> None:
    chart = line_chart("t", [Line("a", [1, 2, 3, 4], [1.0, math.nan, 2.0, math.inf])])
    assert chart is not None
    assert chart.data[0]["y"] == [1, None, 2, None]
    assert "2 values not finite" in chart.note
    assert chart.spoken == "a ends at 2"
    assert chart.rows[1] == ["2", "–"]
    json.dumps(chart.data, allow_nan=False)


def test_nothing_to_draw() -> None:
    assert line_chart("t", []) is None
    assert line_chart("t", [Line("a", [], [])]) is None
    assert line_chart("t", [Line("a", [1], [math.nan])]) is None
    assert bar_chart("t", [0, 1], [("a", [0.0], "c0")], x_label="x", y_label="y") is None
    assert bar_chart("t", [0], [], x_label="x", y_label="y") is None
    assert interval_chart("t", [], x_label="x") is None


def test_a_long_series_is_averaged_keeps_its_range_and_ends_where_it_ends() -> None:
    n = 100_003
    chart = line_chart("t", [Line("a", range(n), [float(v % 2) for v in range(n)])])
    assert chart is not None
    low, high, mean = chart.data
    assert len(mean["x"]) == len(mean["y"]) == len(low["y"]) == MAX_POINTS
    assert mean["x"][-1] == n - 1
    assert set(low["y"]) == {0}
    assert set(high["y"]) == {1}
    assert all(abs(y - 0.5) < 0.01 for y in mean["y"])
    assert len(json.dumps(chart.data)) < 20_000
    assert len(chart.rows) == 24
    assert chart.rows[-1][0] == f"{n - 1:,}"


def test_logarithmic_only_where_it_helps() -> None:
    def log(*values: float) -> bool:
        chart = line_chart("t", [Line("a", [1, 2], values)], y_label="v", allow_log=True, from_zero=True)
        assert chart is not None
        axis = chart.layout["yaxis"]
        assert ("range" in axis) is not (axis.get("type") == "log")
        assert axis["title"]["text"] == ("v (log)" if "type" in axis else "v")
        return axis.get("type") == "log"

    assert log(0.01, 1.0)
    assert not log(0.5, 1.0)
    assert not log(0.0, 1.0)


def test_marks_outside_the_bins_are_left_out() -> None:
    chart = bar_chart(
        "t", [0, 1, 2], [("a", [3.0, 0.0], "c0")], x_label="x", y_label="y", marks=[(1.5, "m"), (9, "out")]
    )
    assert chart is not None
    assert [(s["x0"], s["label"]["text"]) for s in chart.layout["shapes"]] == [(1.5, "m")]
    assert chart.data[0]["y"] == [3, None], "a bin of 0 has no bar on a logarithmic axis"


def test_intervals_in_words() -> None:
    assert interval_words({"mean": 0.5, "low": None, "high": None}) == "+0.5"
    assert interval_words({"mean": -0.5, "low": -1.0, "high": 0.25}) == "-0.5 [-1, +0.25]"


@pytest.mark.parametrize(
    ("value", "wanted"), [(1.0, 1), (0.1234567, 0.12346), (1e30, 1e30), (math.nan, None), (-2.50004, -2.5)]
)
def test_short_numbers(value: float, wanted: float | None) -> None:
    assert short(value) == wanted


def test_ordered_colors_span_the_scale() -> None:
    assert ordered_colors(0) == []
    assert ordered_colors(1) == ["q7"]
    assert ordered_colors(4) == ["q0", "q2", "q5", "q7"]
