"""Comparisons of runs and of methods over seeds: differences from the first with their intervals, missing shown as missing."""

from __future__ import annotations

import json
import random
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reporting.page_tree import read
from transcoder import cli
from transcoder.config import RunConfig
from transcoder.reporting import MetricsWriter, Run, compare_runs, format_comparison, write_comparison
from transcoder.reporting.compare import compare_methods, format_methods
from transcoder.reporting.compare_page import write_method_comparison, write_run_comparison

MakeRun = Callable[..., Path]


@pytest.fixture(scope="module")
def runs(make_run: MakeRun, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run with everything, and one whose monitor was off: no report, no duplicates/* figures."""
    folder = tmp_path_factory.mktemp("runs")
    with_parts = shutil.copytree(make_run(latents=3), folder / "with_antidup")
    plain = shutil.copytree(
        make_run(latents=3, seed=1, overrides={"antidup.monitor.enabled": False}), folder / "baseline"
    )
    shutil.rmtree(plain / "anti_duplication_logs")
    for name in ("metrics.jsonl", "summary.json"):
        lines = [json.loads(line) for line in (plain / name).read_text().splitlines()]
        kept = [{k: v for k, v in line.items() if not k.startswith("duplicates/")} for line in lines]
        (plain / name).write_text("".join(json.dumps(line) + "\n" for line in kept))
    return with_parts, plain


def row(comparison: dict, name: str) -> dict:
    (found,) = [r for r in comparison["figures"] if r["name"] == name]
    return found


def test_figures_are_those_of_the_folders(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    a, b = (Run(path) for path in runs)
    fvu = row(comparison, "evaluation/fvu")
    assert fvu["values"] == [a.metric("evaluation/fvu"), b.metric("evaluation/fvu")]
    assert fvu["differences"] == [None, fvu["values"][1] - fvu["values"][0]]
    assert fvu["verdicts"] == [None, "better" if fvu["differences"][1] < 0 else "worse"]
    speed = row(comparison, "metrics/tokens_per_second")
    assert speed["values"][0] == a.metrics.get("metrics/tokens_per_second").rate()
    assert speed["verdicts"][1] is None, "machines and their load differ"
    names = [r["name"] for r in comparison["figures"]]
    assert names[1:5] == [f"evaluation/fvu_prefix_{w}" for w in (64, 192, 448, 512)]
    assert {"metrics/l0", "sparsity/dead_share", "duplicates/flagged", "heldout_duplicates/mergeable"} <= {*names}
    assert row(comparison, "metrics/l0")["verdicts"] == [None, None], "neither more nor less is better"


def test_missing_is_never_zero(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    pairs = row(comparison, "duplicates/pairs")
    assert pairs["values"] == [4.0, None]
    assert pairs["differences"] == [None, None]
    assert pairs["verdicts"] == [None, None]
    text = format_comparison(comparison)
    (line,) = [line for line in text.splitlines() if line.startswith("Candidate pairs")]
    assert line.split()[4:] == ["4", "–", "–"]
    assert "baseline: correlation report the correlation monitor was switched off" in text
    assert "antidup.monitor.enabled: true | false" in text
    assert "training.seed: 0 | 1" in text
    assert "transcoder.k" not in text


def test_duplicates_come_from_the_report_where_no_figure_was_logged(runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = shutil.copytree(runs[0], tmp_path / "run")
    (path / "metrics.jsonl").unlink()
    (path / "summary.json").unlink()
    comparison = compare_runs(runs[0], path)
    for name in ("pairs", "flagged"):
        assert row(comparison, f"duplicates/{name}")["differences"] == [None, 0.0]
    assert row(comparison, "evaluation/fvu")["values"][1] is None


def test_a_run_against_itself(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(runs[0], runs[0])
    assert all(d in (0.0, None) for r in comparison["figures"] for d in r["differences"])
    assert all(v in ("same", None) for r in comparison["figures"] for v in r["verdicts"])
    assert all(
        p["differences"][1] == {"mean": 0, "low": 0, "high": 0} for p in comparison["paired"] if p["steps"] >= 20
    )
    assert "The runs have the same settings." in format_comparison(comparison)


def test_paired_differences_find_a_small_shift_under_shared_noise(tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 0.002)):
        noise, own = random.Random(0), random.Random(name)
        with MetricsWriter(tmp_path / name, RunConfig()) as writer:
            for step in range(10, 2010, 10):
                writer.write(step, {"metrics/fvu": 0.3 + shift + noise.gauss(0, 0.05) + own.gauss(0, 0.001)})
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    (paired,) = comparison["paired"]
    assert (paired["steps"], paired["from_step"]) == (100, 1010)
    difference = paired["differences"][1]
    assert 0 < difference["low"] < 0.002 < difference["high"] < 0.004
    assert "b minus a +0.00" in format_comparison(comparison)


def test_few_common_steps_give_a_mean_without_an_interval(tmp_path: Path) -> None:
    for name, shift in (("a", 0.0), ("b", 0.5)):
        with MetricsWriter(tmp_path / name, RunConfig()) as writer:
            for step in range(10):
                writer.write(step if name == "a" else step + 2, {"metrics/fvu": shift})
    (paired,) = compare_runs(tmp_path / "a", tmp_path / "b")["paired"]
    assert (paired["steps"], paired["from_step"]) == (4, 6)
    assert paired["differences"][1] == {"mean": 0.5, "low": None, "high": None}


def test_three_runs_and_names_that_are_alike(runs: tuple[Path, Path], tmp_path: Path) -> None:
    other = shutil.copytree(runs[0], tmp_path / "elsewhere" / "with_antidup")
    comparison = compare_runs(*runs, other)
    labels = [run["label"] for run in comparison["runs"]]
    assert len(set(labels)) == 3
    assert labels[2] == "elsewhere/with_antidup"
    text = format_comparison(comparison)
    assert "In brackets: difference from" in text
    (line,) = [line for line in text.splitlines() if line.startswith("Held-out FVU")]
    assert line.rstrip().endswith("(±0)")


def test_empty_folders_compare_to_nothing(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    comparison = compare_runs(tmp_path / "a", tmp_path / "b")
    assert comparison["figures"] == []
    assert comparison["paired"] == []
    assert "a: metrics.jsonl not in the folder" in format_comparison(comparison)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        compare_runs(tmp_path / "a", tmp_path / "c")


def test_written_json_is_strict_and_reads_back(runs: tuple[Path, Path], tmp_path: Path) -> None:
    comparison = compare_runs(*runs)
    path = write_comparison(comparison, tmp_path / "new" / "comparison.json")
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == comparison


# -- methods over seeds


@pytest.fixture(scope="module")
def methods(make_run: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Path]]:
    """Three seeds of a base, of a method with a lower FVU in each, and of one that differs by noise around 0."""
    folder = tmp_path_factory.mktemp("methods")
    made: dict[str, list[Path]] = {"base": [], "lower": [], "noise": []}
    for seed in range(3):
        first = make_run(latents=3, seed=seed)
        for name, change in (("base", 0.0), ("lower", -0.02 - 0.001 * seed), ("noise", (0.01, -0.012, 0.001)[seed])):
            run = shutil.copytree(first, folder / f"{name}-{seed}")
            summary = json.loads((run / "summary.json").read_text())
            summary["evaluation/fvu"] += change
            (run / "summary.json").write_text(json.dumps(summary))
            made[name].append(run)
    return made


def test_differences_are_paired_by_seed(methods: dict[str, list[Path]]) -> None:
    comparison = compare_methods(methods)
    json.dumps(comparison, allow_nan=False)
    assert (comparison["methods"], comparison["seeds"]) == (["base", "lower", "noise"], 3)
    fvu = row(comparison, "evaluation/fvu")
    base = [Run(run).metric("evaluation/fvu") for run in methods["base"]]
    assert fvu["means"][0] == pytest.approx(statistics.fmean(base))
    d = fvu["differences"][1]
    # Student's t of two degrees of freedom: 4.303 standard errors.
    assert d["mean"] == pytest.approx(-0.021)
    assert d["high"] - d["mean"] == pytest.approx(4.302653 * 0.001 / 3**0.5)
    assert fvu["relative"][1]["mean"] == pytest.approx(-0.021 / fvu["means"][0])
    assert fvu["verdicts"] == [None, "better", "no difference seen"]
    assert row(comparison, "metrics/l0")["verdicts"] == [None, None, None]
    text = format_methods(comparison)
    assert "-0.021 [-0.0235, -0.0185]) +" in text


def test_one_seed_has_no_interval_and_no_verdict(methods: dict[str, list[Path]]) -> None:
    fvu = row(compare_methods({name: runs[:1] for name, runs in methods.items()}), "evaluation/fvu")
    assert fvu["differences"][1] == {"mean": pytest.approx(-0.02), "low": None, "high": None}
    assert fvu["verdicts"] == [None, None, None]


def test_a_figure_that_a_run_lacks_is_null(methods: dict[str, list[Path]], tmp_path: Path) -> None:
    lacking = shutil.copytree(methods["lower"][0], tmp_path / "lacking")
    summary = json.loads((lacking / "summary.json").read_text())
    del summary["evaluation/baseline_linear_fvu"]
    (lacking / "summary.json").write_text(json.dumps(summary))
    lines = [json.loads(line) for line in (lacking / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k != "evaluation/baseline_linear_fvu"} for line in lines]
    (lacking / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in kept))
    comparison = compare_methods({"a": methods["base"][:1], "b": [lacking]})
    found = row(comparison, "evaluation/baseline_linear_fvu")
    assert found["means"][0] is not None
    assert (found["means"][1], found["differences"][1]) == (None, None)


def test_unequal_seeds_are_refused(methods: dict[str, list[Path]]) -> None:
    with pytest.raises(ValueError, match=r"equally many runs.*a: 3, b: 2"):
        compare_methods({"a": methods["base"], "b": methods["lower"][:2]})
    with pytest.raises(ValueError, match=r"b: expected runs of different seeds, got training.seed = \[0, 0, 0\]"):
        compare_methods({"a": methods["base"], "b": methods["lower"][:1] * 3})
    with pytest.raises(ValueError, match="same seeds in the same order"):
        compare_methods({"a": methods["base"], "b": methods["lower"][::-1]})
    with pytest.raises(ValueError, match="two or more methods"):
        compare_methods({"a": methods["base"]})


def test_the_command_compares_methods(methods: dict[str, list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{name}={','.join(map(str, runs))}" for name, runs in methods.items()]
    assert cli.main(["compare", *words]) == cli.Exit.OK
    assert "paired, with its 95 % interval" in capsys.readouterr().out
    assert cli.main(["compare", words[0], str(methods["base"][0])]) == cli.Exit.INPUT
    assert "expected NAME=RUN,RUN" in capsys.readouterr().err


# -- the page


def test_the_page_of_runs(make_run: Callable[..., Path], tmp_path: Path) -> None:
    runs = [make_run(seed=n, interrupted=n == 2, overrides={"transcoder.k": 8 + n}) for n in range(3)]
    comparison = compare_runs(*runs)
    page = read(write_run_comparison(comparison, tmp_path / "new" / "both.html"))
    assert list(page.sections) == ["metrics", "paired", "curves", "settings", "missing"]
    metrics = page.sections["metrics"].all("table")[-1]
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


def test_the_page_of_methods(make_run: Callable[..., Path], tmp_path: Path) -> None:
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
    assert cli.main(["compare", *runs, "--html", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    assert cli.main(["compare", f"a={runs[0]}", f"b={runs[0]}", "--html", str(page)]) == 0
    assert list(read(page).sections) == ["metrics", "differences"]
