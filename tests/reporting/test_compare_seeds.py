"""Methods over seeds: paired differences, their intervals, and no verdict where the interval holds 0."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest

from transcoder import cli
from transcoder.reporting import Run
from transcoder.reporting.compare import compare_methods, format_methods


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


def row(comparison: dict, name: str) -> dict:
    (found,) = [r for r in comparison["figures"] if r["name"] == name]
    return found


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
    assert "-0.021: -0.0235 to -0.0185) +" in text


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


def test_the_command(methods: dict[str, list[Path]], capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"{name}={','.join(map(str, runs))}" for name, runs in methods.items()]
    assert cli.main(["compare", *words]) == cli.Exit.OK
    assert "paired, with its 95 % interval" in capsys.readouterr().out
    assert cli.main(["compare", words[0], str(methods["base"][0])]) == cli.Exit.INPUT
    assert "expected NAME=RUN,RUN" in capsys.readouterr().err
