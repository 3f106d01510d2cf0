"""Comparisons: differences against the first run, missing shown as missing."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from transcoder.config import RunConfig
from transcoder.reporting import MetricsWriter, Run, compare_runs, format_comparison, write_comparison

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
    assert speed["values"][0] == a.metrics.get("metrics/tokens_per_second").median()
    assert speed["verdicts"][1] == ("better" if speed["differences"][1] > 0 else "worse")
    names = [r["name"] for r in comparison["figures"]]
    assert names[1:5] == [f"evaluation/fvu_prefix_{w}" for w in (64, 192, 448, 512)]
    assert {"metrics/l0", "sparsity/dead_share", "duplicates/flagged", "duplicates/effective_dictionary_size"} <= {
        *names
    }
    assert row(comparison, "metrics/l0")["verdicts"] == [None, None], "neither more nor less is better"


def test_missing_is_never_zero(runs: tuple[Path, Path]) -> None:
    comparison = compare_runs(*runs)
    pairs = row(comparison, "duplicates/pairs")
    assert pairs["values"] == [4.0, None]
    assert pairs["differences"] == [None, None]
    assert pairs["verdicts"] == [None, None]
    text = format_comparison(comparison)
    (line,) = [line for line in text.splitlines() if line.startswith("Candidate pairs")]
    assert line.split()[2:] == ["4", "–", "–"]
    assert "baseline: correlation report the correlation monitor was switched off" in text
    assert "antidup.monitor.enabled: true | false" in text
    assert "training.seed: 0 | 1" in text
    assert "transcoder.k" not in text


def test_duplicates_come_from_the_report_where_no_figure_was_logged(runs: tuple[Path, Path], tmp_path: Path) -> None:
    path = shutil.copytree(runs[0], tmp_path / "run")
    (path / "metrics.jsonl").unlink()
    (path / "summary.json").unlink()
    comparison = compare_runs(runs[0], path)
    for name in ("pairs", "flagged", "effective_dictionary_size"):
        assert row(comparison, f"duplicates/{name}")["differences"] == [None, 0.0]
        assert row(comparison, f"duplicates/{name}")["verdicts"][1] == "same"
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
