"""A part that is given a state with a piece missing, or of another shape, refuses it and is as it was."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder.activations import ActivationBatch
from transcoder.antidup import ActivationSampleCollector, DiversityRegularizer, PositionSampler, UsageLedger
from transcoder.antidup.flags import FlagBook
from transcoder.antidup.running_mass import PositionMass
from transcoder.antidup.window import SequenceCounts
from transcoder.config import PositionsSection, RegularizerSection, SamplesSection
from transcoder.kernels import SparseCodes
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.baselines import LinearBaseline
from transcoder.training.observers import Meters

D_SAE = 12
PARTS = ("regularizer", "samples", "positions", "ledger", "baseline", "meters", "flags", "mass", "counts", "transcoder")


def codes(rows: int, seed: int) -> SparseCodes:
    g = torch.Generator().manual_seed(seed)
    return SparseCodes.from_dense(torch.rand(rows, D_SAE, generator=g) * (torch.rand(rows, D_SAE, generator=g) < 0.4))


def batch(rows: int) -> ActivationBatch:
    return ActivationBatch(torch.ones(rows, 3), torch.ones(rows, 3), torch.arange(rows), torch.arange(rows))


def used(name: str, folder: Path, seed: int) -> Any:
    """A part after one use; other seeds leave other states."""
    names = ("diversity_regularizer", "position_sampler", "correlation_monitor", "activation_samples")
    ledger = UsageLedger(dict.fromkeys(names, True), folder / "usage.json")
    z = codes(9 + seed, seed)
    if name == "regularizer":
        section = RegularizerSection(position_entropy_weight=0.1, orthogonality_threshold=0.0)
        part = DiversityRegularizer(section, D_SAE, "cpu", 0, ledger)
        model = Transcoder(TranscoderConfig(3, 3, D_SAE, 2), seed=seed)
        pairs = (torch.tensor([0, 1]), torch.tensor([2, 3]))
        part.apply_penalty(torch.zeros(()), model, z, batch(9 + seed), pairs, step=seed)
        return part
    if name == "samples":
        part = ActivationSampleCollector(
            SamplesSection(collect_every=1, top_per_latent=3), D_SAE, "cpu", 0, folder, (), 16, ledger
        )
        part.collect(z, batch(9 + seed), 0)
        return part
    if name == "positions":
        part = PositionSampler(PositionsSection(), 0, (), ledger)
        part.sample_positions(torch.arange(32).view(2, 16), step=seed)
        return part
    if name == "ledger":
        for known in names:
            ledger.record_call(known)
            ledger.record_effect(known, thing=torch.tensor(1.5 + seed))
            ledger.record_file(known, folder / f"file{seed}")
        return ledger
    if name == "baseline":
        part = LinearBaseline(3, 2, 100)
        part.update(torch.rand(5 + seed, 3), torch.rand(5 + seed, 2))
        return part
    if name == "meters":
        part = Meters()
        part.add({"a": torch.tensor(1.0 + seed)})
        return part
    if name == "flags":
        part = FlagBook(1, 2, 0.8)
        part.close_block([(seed, 5), (1, 7)], [], {(1, 7): (0.9, 0.01, 50.0 + seed)})
        return part
    if name == "mass":
        part = PositionMass(D_SAE, "cpu")
        part.add(z, torch.arange(9 + seed))
        return part
    if name == "counts":
        part = SequenceCounts(D_SAE, torch.device("cpu"))
        part.update(z, torch.arange(9 + seed))
        return part
    return Transcoder(TranscoderConfig(3, 3, D_SAE, 2), seed=seed)


def load(part: Any, state: Any) -> None:
    part.load_state_dict(state)


def broken(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """(what was done, a copy of `state` with one entry gone or one tensor of another shape)."""

    def at(tree: Any) -> Any:
        for key in path:
            tree = tree[key]
        return tree

    def changed(what: str, change: Any) -> tuple[str, Any]:
        # A Transcoder's state refuses to be copied whole: its tensors are the parameters.
        other = copy.deepcopy({k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in state.items()})
        change(at(other))
        return f"{what} {'/'.join(map(str, path))}", other

    here = at(state)
    if not isinstance(here, dict):
        return
    for key, value in here.items():
        yield changed(f"without {key} in", lambda tree, key=key: tree.pop(key))
        if isinstance(value, torch.Tensor):
            longer = (
                torch.cat([value.detach().reshape(-1), value.detach().new_zeros(1)]) if value.dim() else value.expand(2)
            )
            yield changed(f"longer {key} in", lambda tree, key=key, longer=longer: tree.update({key: longer}))
        yield from broken(state, (*path, key))


ANY_LENGTH = {("flags", "longer"), ("meters", "longer")}
"""Lists of pairs may have any length, a meter's values any shape."""


@pytest.mark.parametrize("name", PARTS)
def test_a_broken_state_is_refused_whole(name: str, tmp_path: Path) -> None:
    mine, other = used(name, tmp_path, 0), used(name, tmp_path, 1)
    state = other.state_dict()
    tried = 0
    for what, wrong in broken(state):
        free = ("without a" in what and name in ("ledger", "meters")) or "thing in" in what
        if (name, what.split()[0]) in ANY_LENGTH or (free and name == "ledger"):
            continue
        before = copy.deepcopy(
            {k: v.detach() if isinstance(v, torch.Tensor) else v for k, v in mine.state_dict().items()}
        )
        with pytest.raises((ValueError, KeyError)):
            load(mine, wrong)
        same(before, mine.state_dict(), what)
        tried += 1
    assert tried > 0
    load(mine, state)
    same({**state}, mine.state_dict(), "the whole state")


def same(first: Any, second: Any, what: str) -> None:
    if isinstance(first, dict):
        assert first.keys() == second.keys(), what
        for key in first:
            same(first[key], second[key], f"{what}: {key}")
    elif isinstance(first, torch.Tensor):
        assert torch.equal(first, second), what
    elif isinstance(first, list):
        assert len(first) == len(second), what
        for a, b in zip(first, second, strict=True):
            same(a, b, what)
    else:
        assert first == second, what
