"""The sweep over k: one run a k, figures that are those runs' own, a second call that trains nothing again."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from transcoder import RunConfig, cli
from transcoder.config import ConfigError
from transcoder.training import sweep as module
from transcoder.training.sweep import format_sweep, sweep_k

SMALL = {
    "transcoder.d_sae": 64,
    "transcoder.widths": None,
    "activations.buffer_tokens": 4096,
    "training.steps": 12,
    "training.batch_size": 256,
    "training.evaluation_tokens": 1024,
    "training.evaluation_ce_tokens": 1024,
    "training.evaluation_every": 0,
    "antidup.monitor.block_tokens": 1000,
    "checkpoint.every": 6,
    "logging.progress": False,
    "logging.report": False,
}


@pytest.mark.slow
def test_a_sweep_measures_each_k_and_trains_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.load("demo", SMALL)
    found = sweep_k(config, [2, 8], tmp_path)
    assert [row["k"] for row in found["runs"]] == [2, 8]
    assert json.loads((tmp_path / "sweep.json").read_text()) == found
    for row in found["runs"]:
        summary = json.loads((tmp_path / f"k{row['k']}" / "summary.json").read_text())
        assert row["evaluation/fvu"] == summary["evaluation/fvu"]
        assert row["evaluation/l0"] == pytest.approx(row["k"], rel=0.5)
        assert row["heldout_duplicates/mergeable"] <= row["heldout_duplicates/pairs"]
        assert summary["name"] == f"demo-k{row['k']}"
        assert summary["evaluation/sink_tokens"] > 0  # what is masked is reported apart
    table = format_sweep(found)
    assert len(table.splitlines()) == 4
    assert table.splitlines()[-1].split()[0] == "random"

    def again(*_: object, **__: object) -> None:
        raise AssertionError("trained again")

    monkeypatch.setattr(module, "train_transcoder", again)
    assert sweep_k(config, [2, 8], tmp_path) == found
    with pytest.raises(ConfigError, match=r"k2 was trained with other settings \(training.lr\)"):
        sweep_k(config.replace({"training.lr": 1e-4}), [2, 8], tmp_path)


def test_a_stopped_sweep_says_so_and_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    stopped = SimpleNamespace(finished=False, interrupted_by="SIGTERM")
    monkeypatch.setattr(module, "train_transcoder", lambda *_, **__: stopped)
    assert cli.main(["sweep", "demo", "--k", "2,8", "--out", str(tmp_path)]) == cli.Exit.STOPPED
    said = capsys.readouterr().err
    assert "stopped by SIGTERM in the run of k = 2; the same command goes on" in said
    assert "Traceback" not in said


def test_what_cannot_be_swept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="different numbers"):
        sweep_k(RunConfig(), [4, 4], tmp_path)
    with pytest.raises(ConfigError, match=r"transcoder\.k"):
        sweep_k(RunConfig.load("demo", SMALL), [4, 65], tmp_path)
    assert not list(tmp_path.iterdir())
    assert cli.main(["sweep", "demo", "--k", "8,many", "--out", str(tmp_path)]) == cli.Exit.INPUT
    assert "whole numbers" in capsys.readouterr().err
