"""What is counted over a window of tokens, and how large its state can become."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.antidup.test_monitor import BATCH, SECTION, monitor, planted
from transcoder.antidup.window import SequenceCounts, correlation_state_bytes
from transcoder.config import MonitorSection
from transcoder.kernels import FeatureCorrelation, SparseCodes, use_backend


def test_sequence_counts_estimate_the_union() -> None:
    counts = SequenceCounts(3, torch.device("cpu"))
    i, j = torch.tensor([0, 0]), torch.tensor([1, 2])
    assert counts.distinct(i, j) is None
    z = torch.zeros(2000, 3)
    z[:, 0] = 1
    z[:1000, 1] = 1
    # Latent 0 fires in sequences 0..39; latent 2 never.
    counts.update(SparseCodes.from_dense(z), torch.arange(2000) % 40)
    got = counts.distinct(i, j)
    assert got is not None
    assert got.tolist() == pytest.approx([40, 40], abs=4)
    other = SequenceCounts(3, torch.device("cpu"))
    other.update(SparseCodes.from_dense(z), torch.arange(2000) % 40 + 1000)
    counts.merge(other)
    merged = counts.distinct(i, j)
    assert merged is not None
    assert merged.tolist() == pytest.approx([80, 80], abs=7)


@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_sequence_ids_may_be_narrow(backend: str) -> None:
    codes = SparseCodes.from_dense(planted(200, 3, rate=0.3))
    ids = torch.arange(200) // 4
    found = []
    with use_backend(backend):
        for kind in (torch.int64, torch.int32):
            counts = SequenceCounts(codes.shape[1], torch.device("cpu"))
            counts.update(codes, ids.to(kind))
            found.append(counts.state_dict()["map"])
    assert torch.equal(*found)
    assert int(found[0].sum()) > 0


def tree_bytes(tree: object) -> int:
    """Bytes of a state: tensors as they are, everything else as text."""
    if isinstance(tree, Tensor):
        return tree.numel() * tree.element_size()
    if isinstance(tree, dict):
        return sum(tree_bytes(value) for value in tree.values())
    if isinstance(tree, (list, tuple)):
        return sum(map(tree_bytes, tree))
    return len(json.dumps(tree))


@pytest.mark.parametrize(
    "section",
    [
        replace(SECTION, block_tokens=500, blocks_to_flag=1),
        replace(SECTION, block_tokens=500, blocks_to_flag=1, halflife_tokens=10**6),
        replace(SECTION, block_tokens=500, blocks_to_flag=1, sketch_dim=64),
    ],
)
def test_the_state_stays_below_its_bound(section: MonitorSection, tmp_path: Path) -> None:
    # Every latent fires on the same tokens: all pairs fired, are above the threshold, and get flagged.
    d_sae = 60
    g = torch.Generator().manual_seed(22)
    z = (torch.rand(2500, 1, generator=g) < 0.5).float().expand(-1, d_sae) + 0.0
    part = monitor(tmp_path, d_sae, replace(section, max_reported_pairs=5))
    least = part.state_bytes_at_most(batch_tokens=BATCH, entries_per_token=d_sae)
    assert tree_bytes(part.state_dict()) < least
    for step, a in enumerate(range(0, 2500, BATCH), 1):
        part.update_correlations(SparseCodes.from_dense(z[a : a + BATCH]), step, sequences=torch.arange(BATCH))
        part.report(step)
    assert len(part._book.flagged) == d_sae * (d_sae - 1) // 2
    state = part.state_dict()
    size = tree_bytes(state)
    assert size <= least == part.state_bytes_at_most(batch_tokens=BATCH, entries_per_token=d_sae)
    if section.sketch_dim is None:
        # And it is a bound of the right size: what is above it are the wider counts of a very long run.
        assert size > 0.6 * least
        for name in ("block", "past"):
            if name in state:
                joint = part._block if name == "block" else part._past
                assert joint is not None
                assert joint.statistics._exact is not None
                joint.statistics._exact.joint = joint.statistics._exact.joint.long()
        assert tree_bytes(part.state_dict()) <= least


def test_the_ring_of_a_sketch_stays_below_its_bound(tmp_path: Path) -> None:
    part = monitor(tmp_path, 60, replace(SECTION, sketch_dim=8, block_tokens=10**9))
    statistics = part._block.statistics
    statistics.ring_tokens = statistics._sketch.ring_tokens = 300  # type: ignore[union-attr]
    bound = part.state_bytes_at_most(batch_tokens=100, entries_per_token=60)
    z = torch.rand(100, 60, dtype=torch.float64) + 0.1
    for step in range(1, 8):
        part.update_correlations(SparseCodes.from_dense(z), step, weights=torch.ones(100))
        assert tree_bytes(part.state_dict()) <= bound


def test_watched_pairs_are_in_the_bound() -> None:
    found = FeatureCorrelation(60, 8, ring_tokens=100)
    bound = correlation_state_bytes(found, batch_tokens=100, entries_per_token=60)
    i, j = torch.triu_indices(60, 60, 1)
    for _ in range(3):
        found.update(SparseCodes.from_dense(torch.rand(100, 60, dtype=torch.float64) + 0.1), torch.ones(100))
        found.watch(i, j)
        # The watched pairs alone are 156 of at most 310 kB.
        assert 0.7 * bound < tree_bytes(found.state_dict()) <= bound
