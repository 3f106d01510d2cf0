"""One run, killed at fifty random moments, each kill followed by a resume: it ends where the undisturbed one ends."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

KILLS = 50
PROGRAM = Path(__file__).with_name("killed_run.py")


def figures(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of the log, but for clocks and events."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    clocks = ("time", "metrics/tokens_per_second")
    return [
        {k: v for k, v in line.items() if k not in clocks and not k.startswith("time/")}
        for line in lines
        if "event" not in line
    ]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.command(str(PROGRAM), "{folder}", str(KILLS), "6")
def test_fifty_kills_change_no_bit(finished_command: subprocess.CompletedProcess[str]) -> None:
    assert finished_command.returncode == 0, finished_command.stdout
    folder, said = Path(finished_command.args[1]), json.loads(finished_command.stdout.splitlines()[-1])
    print(said)
    assert said["last_status"] == 0, finished_command.stdout
    assert len(said["steps"]) == KILLS
    assert not said["ended_early"], "every kill met a run that was still going"
    assert said["steps"] == sorted(said["steps"]), "no kill loses a checkpoint"
    assert said["in_a_write"] > 0, "some kills hit the writing of a checkpoint"
    whole, killed = folder / "whole", folder / "killed"
    names = sorted(p.name for p in (whole / "checkpoints").iterdir())
    assert sorted(p.name for p in (killed / "checkpoints").iterdir()) == names
    for file in ("transcoder.safetensors", "trainer.safetensors"):
        assert (killed / "checkpoints" / names[-1] / file).read_bytes() == (
            whole / "checkpoints" / names[-1] / file
        ).read_bytes(), file
    reports = sorted(p.name for p in (whole / "anti_duplication_logs").iterdir())
    assert sorted(p.name for p in (killed / "anti_duplication_logs").iterdir()) == reports
    for name in reports:
        ours, theirs = (run / "anti_duplication_logs" / name for run in (killed, whole))
        assert ours.read_bytes() == theirs.read_bytes(), name
    assert figures(killed) == figures(whole)
