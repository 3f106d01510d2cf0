"""Every file operation of a run fails in its turn, with ENOSPC, EIO, EDQUOT and EROFS: training goes on and ends well."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

PROGRAM = Path(__file__).with_name("failing_writes.py")
pytestmark = [pytest.mark.slow, pytest.mark.command(str(PROGRAM), "{folder}")]


@pytest.fixture
def results(finished_command: subprocess.CompletedProcess[str]) -> dict[str, list[dict[str, Any]]]:
    assert finished_command.returncode == 0, finished_command.stdout
    found: dict[str, list[dict[str, Any]]] = json.loads(finished_command.stdout.splitlines()[-1])
    return found


def test_one_failure_costs_no_run(results: dict[str, list[dict[str, Any]]]) -> None:
    whole, *others = results["once"]
    assert len(others) == whole["operations"] > 40
    for kind in ("checkpoints", "summary.json", "usage.json", "anti_duplication_logs", "activation_samples"):
        assert any(kind in other["what"] for other in others), f"a write of {kind} failed once"
    for other in others:
        assert other["ended"] == "finished", other
        assert (other["step"], other["weights"]) == (whole["step"], whole["weights"]), other
        assert other["leftovers"] == [], other


def test_a_disk_that_stays_full_leaves_the_last_state_in_the_second_location(
    results: dict[str, list[dict[str, Any]]],
) -> None:
    whole, lasting = results["once"][0], results["lasting"]
    assert len(lasting) > 6
    for other in lasting:
        assert other["ended"] == "finished", other
        assert (other["step"], other["weights"]) == (whole["step"], whole["weights"]), other
