"""Twenty thousand steps: memory and open files stay where they were once the run is warm."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("soaked_run.py")
ROOM = 8 << 20
"""Bytes that resident memory may move by: an allocator keeps pages. A leak of 600 bytes a step would show."""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
@pytest.mark.command(str(PROGRAM), "{folder}")
def test_twenty_thousand_steps_take_no_more_memory_nor_files(
    finished_command: subprocess.CompletedProcess[str],
) -> None:
    assert finished_command.returncode == 0, finished_command.stdout
    memory, files = zip(*json.loads(finished_command.stdout.splitlines()[-1]), strict=True)
    print(memory, files)
    assert len(memory) >= 15
    assert len(set(files)) == 1, files
    assert max(memory) - memory[0] < ROOM, memory
