"""bench.measure and bench.peers: what fails is said, and costs the other figures nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import interleaved_timing, measure, report, results
from bench.peers import LIBRARIES, eager
from bench.peers import __main__ as peers_main


@pytest.fixture(autouse=True)
def few_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interleaved_timing, "MOST_INPUTS", 8)


TINY = ["--size", "tiny", "--seconds", "0"]


def test_a_wrong_peer_is_an_error_and_no_missing_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(LIBRARIES, "eager", "torch")
    monkeypatch.setattr(eager, "project", lambda W: None)
    monkeypatch.setattr(peers_main, "OPERATIONS", (("optimizer", "topk", False), ("decode", "topk", False)))
    target = tmp_path / "eager.json"
    assert peers_main.main(["eager", "--here", *TINY, "--json", str(target)]) == 1
    found = json.loads(target.read_text(encoding="utf-8"))
    (name,) = found["failed"]
    assert name == "optimizer topk, B64-d16-N128-k4, eager PyTorch"
    assert "step: off by" in found["failed"][name]
    assert [row["operation"] for row in found["rows"]] == ["optimizer", "decode"]
    assert "wrong" in found["rows"][0]["variants"]["eager PyTorch"]
    assert "seconds" in found["rows"][1]["variants"]["eager PyTorch"]
    assert "step: off by" in capsys.readouterr().err


def test_a_peer_that_breaks_costs_its_own_row_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(case):
        raise AttributeError("a release without this call")

    monkeypatch.setitem(LIBRARIES, "eager", "torch")
    monkeypatch.setattr(eager, "optimizer", gone)
    monkeypatch.setattr(peers_main, "OPERATIONS", (("optimizer", "topk", False), ("decode", "topk", False)))
    target = tmp_path / "eager.json"
    assert peers_main.main(["eager", "--here", *TINY, "--json", str(target)]) == 1
    found = json.loads(target.read_text(encoding="utf-8"))
    assert [row["operation"] for row in found["rows"]] == ["decode"]
    assert list(found["failed"].values()) == ["AttributeError: a release without this call"]
    assert "a release without this call" in capsys.readouterr().err


def test_no_environment_is_another_matter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nowhere = tmp_path / "a-file"
    nowhere.write_text("", encoding="utf-8")
    target = tmp_path / "saelens.json"
    code = peers_main.main(["saelens", "--into", str(nowhere), *TINY, "--json", str(target)])
    assert code == peers_main.NO_ENVIRONMENT
    assert "skipped" in json.loads(target.read_text(encoding="utf-8"))
    assert "no environment for saelens" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stage_that_fails_leaves_the_others(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """The whole run cannot take no steps, and saelens has nowhere to be; what is not asked for is kept."""
    target, nowhere = tmp_path / "results" / "here.json", tmp_path / "a-file"
    nowhere.write_text("", encoding="utf-8")
    scaling, theirs = {"points": []}, {"skipped": "kept"}
    before = {"device": {"name": "x"}, "peers": {"sparsify": theirs}, "scaling": scaling, "whole_run": {"kinds": {}}}
    results.save({"format": results.FORMAT, **before}, target)
    words = [
        "--only",
        "peers,whole_run",
        "--libraries",
        "saelens",
        "--into",
        str(nowhere),
        "--steps",
        "0",
        "--no-report",
    ]
    assert measure.main([*words, *TINY, "--out", str(target)]) == 1
    found = results.load(target)
    assert found["scaling"] == scaling
    assert found["peers"]["sparsify"] == theirs
    assert set(found["peers"]["saelens"]) == {"skipped", "seconds"}
    assert "exit code 1, nothing was written" in found["whole_run"]["failed"]
    said = capfd.readouterr()
    assert "FAILED, in whole or in part: whole_run;" in said.err
    assert said.out.count("s in all") == 2
    page = report.render([report.merged(found)])
    assert "| whole_run | failed |" in page
    assert "| peer: saelens | skipped |" in page


def test_nothing_of_another_format_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "old.json"
    target.write_text(json.dumps({"format": 1, "device": {"name": "x"}, "rows": {"rows": []}}), encoding="utf-8")
    options = type("Options", (), {"only": ["scaling"], "libraries": []})()
    assert measure.kept(target, options) == {}
    assert "expected a result file of format" in capsys.readouterr().out
