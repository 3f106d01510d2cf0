"""Charts: scales, ticks, breaks and averages."""

from __future__ import annotations

import json
import math
import re
from html import unescape

import pytest

from transcoder.reporting.charts import Axis, Line, _labelled, _log_ticks, _ticks, bar_chart, line_chart, ordered_colors


def data(svg: str) -> dict:
    found = re.search(r'data-chart="([^"]*)"', svg)
    assert found
    return json.loads(unescape(found[1]))


def test_axes() -> None:
    linear = Axis(0, 10, 100, 200)
    assert [linear(v) for v in (0, 5, 10)] == [100, 150, 200]
    log = Axis(0.01, 100, 0, 4, log=True)
    assert [log(v) for v in (0.01, 1, 100)] == pytest.approx([0, 2, 4])
    assert Axis(3, 3, 0, 10)(3) == 5


def test_ticks_are_round_and_labelled_apart() -> None:
    assert _ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1.0]
    assert _ticks(15.95, 16.07) == [15.95, 15.975, 16.0, 16.025, 16.05]
    assert _log_ticks(0.003, 0.9) == [0.01, 0.03, 0.1, 0.3] or _log_ticks(0.003, 0.9)[0] >= 0.003
    for low, high in ((0, 1), (15.95, 16.07), (-0.2, 1), (0, 9400), (0, 3e-4), (1e6, 5e6), (0, 18432), (10, 600)):
        labels = [label for _, label in _labelled(_ticks(low, high))]
        assert len(set(labels)) == len(labels), labels
        assert all(len(label) <= 7 for label in labels), labels
    assert [label for _, label in _labelled(_ticks(0, 2e-4))] == ["0", "5e-5", "1e-4", "1.5e-4", "2e-4"]
    assert [label for _, label in _labelled([1.0, 10.0, 100.0, 1000.0, 1e5])] == ["1", "10", "100", "1k", "100k"]
    assert len(_log_ticks(1e-12, 1e12)) <= 8


def test_a_value_that_is_not_finite_breaks_the_line_and_is_counted() -> None:
    svg = line_chart("t", [Line("a", [1, 2, 3, 4], [1.0, math.nan, 2.0, math.inf])])
    (path,) = re.findall(r'class="line c0" d="([^"]*)"', svg)
    assert path.count("M") == 2
    assert "2 values not finite" in svg
    assert "NaN" not in svg
    assert data(svg)["series"][0]["py"][1] is None


def test_nothing_to_draw() -> None:
    assert line_chart("t", []) == ""
    assert line_chart("t", [Line("a", [], [])]) == ""
    assert line_chart("t", [Line("a", [1], [math.nan])]) == ""
    assert bar_chart("t", [0, 1], [("a", [0.0], "c0")], x_label="x", y_label="y") == ""
    assert bar_chart("t", [0], [], x_label="x", y_label="y") == ""


def test_a_long_series_is_averaged_and_ends_where_it_ends() -> None:
    n = 100_003
    svg = line_chart("t", [Line("a", range(n), [float(v % 2) for v in range(n)])])
    (series,) = data(svg)["series"]
    assert len(series["px"]) == 240
    assert series["xt"][-1] == f"{n - 1:,}"
    assert 'class="band c0"' in svg
    assert len(svg) < 40_000


@pytest.mark.parametrize("value", [0.0, 16.0, -3.0, 1e-30, 1e30])
def test_constants_and_single_points(value: float) -> None:
    for x in ([5], [5, 6]):
        svg = line_chart("t", [Line("a", x, [value] * len(x))], from_zero=True, allow_log=True)
        numbers = [float(v) for v in re.findall(r'c[xy]="([^"]*)"|[ML]([\d.-]+)', svg) for v in v if v]
        assert all(map(math.isfinite, numbers))


def test_logarithmic_only_where_it_helps() -> None:
    assert "(log)" in line_chart("t", [Line("a", [1, 2], [0.01, 1.0])], allow_log=True)
    assert "(log)" not in line_chart("t", [Line("a", [1, 2], [0.5, 1.0])], allow_log=True)
    assert "(log)" not in line_chart("t", [Line("a", [1, 2], [0.0, 1.0])], allow_log=True)


def test_bars_tell_their_values() -> None:
    svg = bar_chart(
        "t",
        [0, 1, 2],
        [("<a>", [3.0, 0.0], "c0")],
        x_label="x",
        y_label="y",
        log=True,
        marks=[(1.5, "<m>"), (9, "out")],
    )
    assert svg.count("<rect") == 1
    assert "&lt;a&gt;, 0 to 1: 3" in svg
    assert "&lt;m&gt;" in svg
    assert "out" not in svg


def test_ordered_colors_span_the_scale() -> None:
    assert ordered_colors(0) == []
    assert ordered_colors(1) == ["q7"]
    assert ordered_colors(4) == ["q0", "q2", "q5", "q7"]
