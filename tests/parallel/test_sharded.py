"""A dictionary over gloo processes against one process that holds everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from transcoder.config import ConfigError, RunConfig
from transcoder.parallel import Lanes
from transcoder.training.profile import profile_run
from transcoder.training.start_checks import check_for_ranks, check_streams, in_ranks

PROGRAM = str(Path(__file__).with_name("ranks.py"))
ALL = ("codes", "gradients", "training", "a_bad_step_is_bad_everywhere", "files")


@pytest.mark.command(PROGRAM, "1", "2", "codes", "gradients", "files")
def test_two_ranks_are_one_process(finished_command: subprocess.CompletedProcess[str]) -> None:
    assert finished_command.returncode == 0, finished_command.stdout[-8000:]
    assert "all checks hold" in finished_command.stdout


@pytest.mark.slow
@pytest.mark.command(PROGRAM, "2", "2", *ALL)
def test_four_ranks_are_one_process(finished_command: subprocess.CompletedProcess[str]) -> None:
    assert finished_command.returncode == 0, finished_command.stdout[-8000:]
    assert "all checks hold" in finished_command.stdout


@pytest.mark.slow
@pytest.mark.command(PROGRAM, "8", "1", *ALL)
def test_tokens_over_eight(finished_command: subprocess.CompletedProcess[str]) -> None:
    assert finished_command.returncode == 0, finished_command.stdout[-8000:]


@pytest.mark.slow
@pytest.mark.command(PROGRAM, "1", "8", *ALL)
def test_latents_over_eight(finished_command: subprocess.CompletedProcess[str]) -> None:
    assert finished_command.returncode == 0, finished_command.stdout[-8000:]


@pytest.mark.parametrize(("d_sae", "lanes", "ranks"), [(48, 8, 1), (48, 8, 4), (40, 8, 8), (7, 1, 1), (24, 12, 3)])
def test_lanes_hold_every_latent_once(d_sae: int, lanes: int, ranks: int) -> None:
    parts = [Lanes(d_sae, lanes, ranks, rank) for rank in range(ranks)]
    whole = torch.arange(d_sae)
    rows = [part.take(whole) for part in parts]
    assert torch.equal(torch.cat(rows).sort().values, whole)
    assert torch.equal(parts[0].join(rows), whole)
    for part, mine in zip(parts, rows, strict=True):
        assert torch.equal(part.ids(torch.arange(part.local)), mine)
        assert torch.equal(mine, mine.sort().values)
    for width in range(d_sae + 1):
        counts = [part.width(width) for part in parts]
        assert counts == [int((mine < width).sum()) for mine in rows]
        assert max(counts) - min(counts) <= lanes // ranks


@pytest.mark.parametrize(
    ("d_sae", "lanes", "ranks", "named"),
    [(50, 8, 2, "d_sae.*8, got 50"), (48, 8, 3, "lanes.*3, got 8"), (48, 0, 1, "d_sae")],
)
def test_sizes_that_do_not_divide_are_refused(d_sae: int, lanes: int, ranks: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        Lanes(d_sae, lanes, ranks, 0)


@pytest.mark.slow
def test_the_documented_loop_runs(tmp_path: Path) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs" / "scale.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (tmp_path / "loop.py").write_text(program, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--standalone", "loop.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "loss of rank 0's tokens: " in done.stdout
    assert (tmp_path / "sharded" / "transcoder.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "processes", "named"),
    [
        ({"transcoder.activation": "jumprelu"}, 2, "transcoder.activation: expected topk or batch_topk, got jumprelu"),
        ({"model.device": "cuda:0"}, 2, "model.device: expected auto, cuda or cpu, got cuda:0"),
        ({"activations.layers": [0, 1]}, 2, r"activations\.layers: expected null in a run of 2 processes"),
        ({}, 3, r"parallel\.streams: expected a multiple of the number of processes, 3, got 8"),
        (
            {"parallel.streams": 5},
            5,
            r"parallel\.streams: expected 1 or a divisor of training.batch_size = 1024, got 5",
        ),
        (
            {"antidup.positions.enabled": True, "antidup.positions.train": True},
            2,
            r"with antidup\.positions\.train, got 8",
        ),
        ({"activations.kind": "cached", "activations.cached_path": "x"}, 2, "with cached activations.* got 8"),
    ],
)
def test_what_several_processes_cannot_do_is_refused_by_name(
    settings: dict[str, Any], processes: int, named: str
) -> None:
    config = RunConfig.load("demo", settings)

    def start() -> None:
        check_for_ranks(config, processes, False)
        check_streams(in_ranks(config, SimpleNamespace(rank=1, count=processes)), False)  # type: ignore[arg-type]

    with pytest.raises(ConfigError, match=named):
        start()


def test_other_commands_are_refused_under_torchrun(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ConfigError, match=r"expected one process, got 2 .*without torchrun"):
        profile_run(RunConfig.load("demo"), 1)
