"""comparison.html: every figure, difference and interval that the comparison has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reporting.page_tree import read
from transcoder.cli import main
from transcoder.reporting import compare_runs
from transcoder.reporting.compare import compare_methods
from transcoder.reporting.compare_page import write_method_comparison, write_run_comparison


def test_runs_beside_each_other(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run(seed=n, interrupted=n == 2, overrides={"transcoder.k": 8 + n}) for n in range(3)]
    comparison = compare_runs(*runs)
    page = read(write_run_comparison(comparison, tmp_path / "new" / "both.html"))
    assert list(page.sections) == ["metrics", "paired", "curves", "settings", "missing"]
    metrics = page.sections["metrics"].one("table")
    assert [row[0] for row in metrics.rows] == [
        f"{row['label'].strip()} {row['meaning']}" for row in comparison["figures"]
    ]
    charts = list(page.sections["paired"].charts.values())
    assert len(charts) == len(comparison["paired"]) > 1
    for chart, row in zip(charts, comparison["paired"], strict=True):
        for shown, d in zip(chart.figure["data"], row["differences"][1:], strict=True):
            assert shown["x"] == [pytest.approx(d["mean"], rel=1e-4)]
            if d["low"] is not None:
                assert shown["error_x"]["array"] == [pytest.approx(d["high"] - d["mean"], rel=1e-4)]
                assert shown["error_x"]["arrayminus"] == [pytest.approx(d["mean"] - d["low"], rel=1e-4)]
    assert len(page.sections["curves"].charts["Training FVU"].figure["data"]) == 3
    assert "transcoder.k" in page.words
    assert "summary.json" in page.words


def test_methods_over_seeds(make_run: Callable[..., Path], tmp_path: Path) -> None:
    methods = {name: [make_run(seed=n, steps=200 + 20 * len(name)) for n in range(2)] for name in ("plain", "<b>ours")}
    comparison = compare_methods(methods)
    page = read(write_method_comparison(comparison, tmp_path / "methods.html"))
    (chart,) = page.sections["differences"].charts.values()
    known = [row for row in comparison["figures"] if row["relative"][1] is not None]
    assert [row[0] for row in chart.rows] == [row["label"].strip() for row in known]
    assert chart.figure["data"][0]["x"] == [pytest.approx(100 * known[0]["relative"][1]["mean"], rel=1e-3)]
    assert "<b>ours" in page.words


def test_the_command_writes_the_page(
    make_run: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(make_run(seed=n, steps=100, latents=2)) for n in range(2)]
    page = tmp_path / "page.html"
    assert main(["compare", *runs, "--html", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    assert main(["compare", f"a={runs[0]}", f"b={runs[0]}", "--html", str(page)]) == 0
    assert list(read(page).sections) == ["metrics", "differences"]
