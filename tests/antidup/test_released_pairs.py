"""A flag is released by its own pair's evidence, whatever order the statistics are kept in."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from transcoder.antidup import CorrelationMonitor, UsageLedger
from transcoder.config import MonitorSection
from transcoder.kernels import SparseCodes
from transcoder.usage import REQUIRED_EFFECTS


def tokens(tied: list[tuple[int, int]], seed: int) -> Tensor:
    g = torch.Generator().manual_seed(seed)
    z = torch.rand(400, 8, generator=g) * (torch.rand(400, 8, generator=g) < 0.5)
    for i, j in tied:
        z[:, j] = z[:, i]
    return z


@pytest.mark.parametrize("sketch_dim", [None, 64])
def test_the_pair_that_came_apart_is_the_one_released(sketch_dim: int | None, tmp_path: Path) -> None:
    # By (i, j) the pairs are (0, 7), (1, 2); by (j, i) they are (1, 2), (0, 7).
    section = replace(
        MonitorSection(), sketch_dim=sketch_dim, block_tokens=400, blocks_to_flag=1, min_support=10, min_sequences=1
    )
    ledger = UsageLedger(dict.fromkeys(REQUIRED_EFFECTS, True), tmp_path / "usage.json")
    part = CorrelationMonitor(section, 8, "cpu", tmp_path / "logs", ledger)
    part.update_correlations(SparseCodes.from_dense(tokens([(0, 7), (1, 2)], 0)), 0)
    part.report(0)
    assert sorted(part._book.flagged) == [(0, 7), (1, 2)]
    part.update_correlations(SparseCodes.from_dense(tokens([(1, 2)], 1)), 1)
    part.report(1)
    assert sorted(part._book.flagged) == [(1, 2)]
