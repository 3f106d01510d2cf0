"""A run whose disk goes away under it, as a network disk does: not full, not read-only, it just no longer answers."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
import torch

from tests.faults.dead_disk import lost
from tests.training.planted import Planted, config
from transcoder.activations import ActivationBatch
from transcoder.training import train_transcoder
from transcoder.training.checkpoint import CheckpointError, CheckpointStore


class Leaving(Planted):
    """The disk is gone from a batch on."""

    def __init__(self, folder: Path, stack: contextlib.ExitStack) -> None:
        super().__init__()
        self.folder, self.stack = folder, stack

    def __next__(self) -> ActivationBatch:
        if self.index == 4 + 15 and not self.stack.enter_context(lost(self.folder)):
            pytest.skip("no disk can be taken away here")
        return super().__next__()


def test_a_disk_that_is_gone_costs_no_step_where_there_is_a_second_location(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    settings = config(
        checkpoint__second_location=str(tmp_path / "second"), antidup__verify_at_step=20, checkpoint__keep_last=1
    )
    run_dir = tmp_path / "disk" / "run"
    with contextlib.ExitStack() as stack, pytest.warns(UserWarning, match="second location"):
        result = train_transcoder(settings, run_dir, batches=Leaving(tmp_path / "disk", stack))
    assert result.finished
    (place,) = (tmp_path / "second").iterdir()
    assert [folder.name for folder in place.iterdir()] == ["step_00000030"], "one place, and the newest in it"
    # The disk is back: a resume finds what was saved elsewhere.
    loaded = CheckpointStore(run_dir, settings.checkpoint).latest()
    assert loaded is not None
    assert loaded.step == 30
    assert torch.equal(loaded.model["W_dec"], result.transcoder.W_dec.detach())


def test_without_one_training_goes_on_to_the_end_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    settings = config(antidup__verify_at_step=20)
    with contextlib.ExitStack() as stack:
        batches = Leaving(tmp_path / "disk", stack)
        with pytest.raises(CheckpointError, match=r"step 30 .* could not be written"):
            train_transcoder(settings, tmp_path / "disk" / "run", batches=batches)
    assert batches.index == 4 + 30
