"""A dictionary over gloo processes against one process that holds everything."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch

from transcoder.parallel import Lanes

PROGRAM = str(Path(__file__).with_name("ranks.py"))
ALL = ("codes", "gradients", "training", "a_bad_step_is_bad_everywhere", "files")


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
