"""Space held for the last state, and what is kept where the whole state does not fit any more."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.faults.small_disk import KIB, MIB, SmallDisk, believe_there_is_room
from tests.training.planted import Planted, config
from transcoder.activations import ActivationBatch, build_stream
from transcoder.checkpoint_folder import CheckpointError
from transcoder.config import CheckpointSection, RunConfig
from transcoder.training import checkpoint, checkpointing, disk_space, train_transcoder
from transcoder.training.checkpoint import CheckpointStore, load_checkpoint
from transcoder.training.disk_space import RESERVE_NAME, Reserve, room_for
from transcoder.training.run_state import essential_tree
from transcoder.training.state_tree import pack_state


def state(step: int, beside: int = 300 * KIB) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and moments of 100 KiB together, and `beside` bytes that a run could go on without."""
    generator = torch.Generator().manual_seed(step)
    tree = {
        "moments": torch.randn(50 * KIB // 4, generator=generator),
        "beside": torch.randn(beside // 4),
        "step": step,
    }
    return {"W_enc": torch.randn(50 * KIB // 4, generator=generator)}, tree


def essential(tree: dict[str, Any]) -> dict[str, Any]:
    return {name: part for name, part in tree.items() if name != "beside"}


def store_with_reserve(disk: SmallDisk, size: int, **section: Any) -> CheckpointStore:
    store = CheckpointStore(disk.folder, CheckpointSection(**{"keep_last": 1, "keep_best": False, **section}))
    store.hold_reserve(size)
    return store


def test_the_space_is_really_taken(disk: SmallDisk) -> None:
    before = disk.free()
    reserve = Reserve(disk.folder, 700 * KIB)
    reserve.make()
    assert before - disk.free() >= 700 * KIB, "a sparse file would have taken nothing"
    assert reserve.held == 700 * KIB
    assert reserve.release()
    assert disk.free() >= before - 8 * KIB
    with pytest.raises(CheckpointError, match=r"could not be held.*checkpoint\.reserve"):
        CheckpointStore(disk.folder).hold_reserve(3 * MIB)
    assert not (disk.folder / RESERVE_NAME).exists()
    (disk.folder / RESERVE_NAME).touch()
    os.truncate(disk.folder / RESERVE_NAME, 700 * KIB)
    assert reserve.held == 0, "nor does a sparse file count as held"


def test_it_is_given_up_for_the_whole_state_and_held_again_when_there_is_space(disk: SmallDisk) -> None:
    store = store_with_reserve(disk, 600 * KIB)
    store.save(1, *state(1), {}, essential=essential)
    assert store.reserve.held == 600 * KIB
    filler = disk.leave(8 * KIB)
    with pytest.warns(UserWarning, match="of step 2 the state took the space held for the last"):
        store.save(2, *state(2), {}, essential=essential, last=True)
    loaded = store.latest()
    assert loaded is not None
    assert torch.equal(loaded.trainer_tree["moments"], state(2)[1]["moments"])
    assert "beside" in loaded.trainer_tree
    filler.unlink()
    store.save(3, *state(3), {}, essential=essential)
    assert store.reserve.held == 600 * KIB


def test_where_the_whole_state_does_not_fit_the_essential_one_is_kept(disk: SmallDisk) -> None:
    store = store_with_reserve(disk, 250 * KIB)
    store.save(1, *state(1), {}, essential=essential)
    disk.leave(8 * KIB)
    with pytest.warns(UserWarning, match="of step 2 only the essential state could be kept"):
        store.save(2, *state(2, 900 * KIB), {}, essential=essential)
    assert store.degraded
    loaded = store.latest()
    assert loaded is not None
    assert loaded.step == loaded.trainer_tree["step"] == 2
    assert "beside" not in loaded.trainer_tree
    assert torch.equal(loaded.model["W_enc"], state(2)[0]["W_enc"])


def test_an_earlier_state_leaves_the_space_to_the_last_unless_it_can_be_held_again(disk: SmallDisk) -> None:
    store = store_with_reserve(disk, 500 * KIB, keep_last=3)
    store.save(1, *state(1), {}, essential=essential)
    filler = disk.leave(8 * KIB)
    with pytest.raises(CheckpointError, match="step 2"):
        store.save(2, *state(2), {}, essential=essential)
    assert store.reserve.held == 500 * KIB
    with pytest.warns(UserWarning, match="of step 3 the state took the space"):
        store.save(3, *state(3), {}, essential=essential, last=True)
    filler.unlink()
    # With one kept, the new one takes the old one's place in the end: the reserve only bridges the moment.
    store = store_with_reserve(disk, 500 * KIB)
    store.save(4, *state(4), {}, essential=essential)
    disk.leave(16 * KIB)
    with pytest.warns(UserWarning, match="of step 5 the state took the space"):
        store.save(5, *state(5, 200 * KIB), {}, essential=essential)
    assert store.reserve.held == 500 * KIB


def test_with_nothing_left_at_all_the_good_one_before_stays(disk: SmallDisk) -> None:
    store = store_with_reserve(disk, 32 * KIB)
    store.save(1, *state(1), {}, essential=essential)
    disk.leave(0)
    with pytest.raises(CheckpointError, match="step 2"):
        store.save(2, *state(2), {}, essential=essential)
    loaded = store.latest()
    assert loaded is not None
    assert loaded.step == 1


def test_a_second_location_takes_the_whole_state_before_the_reserve_is_touched(disk: SmallDisk, tmp_path: Path) -> None:
    store = store_with_reserve(disk, 400 * KIB, second_location=str(tmp_path / "second"))
    store.save(1, *state(1), {}, essential=essential)
    disk.leave(0)
    with pytest.warns(UserWarning, match="second location"):
        path = store.save(2, *state(2), {}, essential=essential)
    assert tmp_path / "second" in path.parents
    assert "beside" in load_checkpoint(path).trainer_tree
    assert store.reserve.held == 400 * KIB


def test_a_write_that_fails_for_a_moment_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Something stands in the way until the first pause."""
    (tmp_path / "checkpoints").write_text("in the way")
    monkeypatch.setattr(checkpoint, "BACK_OFF", (0.5, 2.0))
    paused = []

    def pause(seconds: float) -> None:
        if seconds:
            paused.append(seconds)
            (tmp_path / "checkpoints").unlink()

    monkeypatch.setattr(checkpoint.time, "sleep", pause)
    CheckpointStore(tmp_path).save(1, *state(1), {})
    assert paused == [0.5]


def test_space_that_only_taking_it_shows(disk: SmallDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    """As under a quota: what the file system reports as free is not to be had."""
    if not disk.mounted:
        pytest.skip("needs a file system of its own")
    disk.leave(600 * KIB)
    assert room_for(disk.folder, 500 * KIB) == 500 * KIB
    assert 500 * KIB < room_for(disk.folder, 2 * MIB) <= 600 * KIB
    assert [path.name for path in disk.folder.iterdir()] == ["filler"]
    believe_there_is_room(monkeypatch)
    store = CheckpointStore(disk.folder, CheckpointSection(every=1, keep_last=5))
    store.check_space(64 * KIB, steps=3)
    with pytest.raises(CheckpointError, match=r"keep_best false --checkpoint\.keep_last 1 \(needs"):
        store.check_space(150 * KIB, steps=100)
    with pytest.raises(CheckpointError, match="the run's other files"):
        store.check_space(KIB, steps=3, others=700 * KIB)


class Filled(Planted):
    """The disk is full from the batch of step `at` on, but for the space that the run holds; SIGTERM comes at `stop_at`."""

    def __init__(self, disk: SmallDisk, at: int, **planted: Any) -> None:
        super().__init__(**planted)
        self.disk, self.at = disk, at + 4

    def __next__(self) -> ActivationBatch:
        if self.index == self.at:
            self.disk.leave(0)
        return super().__next__()


@pytest.mark.parametrize("disk", [10], indirect=True)
@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_run_on_a_full_disk_keeps_its_last_state_and_goes_on_from_it(
    disk: SmallDisk, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    monkeypatch.setattr(disk_space, "PAGES", 0)
    monkeypatch.setattr(disk_space, "PAIR_BYTES", 8)
    # As in a run of real size: what is held is less than the whole state.
    monkeypatch.setattr(checkpointing, "STATE_SLACK", 24 * KIB)
    settings = config(
        checkpoint__asynchronous=asynchronous, checkpoint__keep_last=1, checkpoint__keep_best=False, checkpoint__every=5
    )
    whole = train_transcoder(settings, tmp_path / "whole", batches=Planted(stop_at=27))
    run_dir = disk.folder / "run"
    with pytest.warns(UserWarning, match="only the essential state could be kept"):
        stopped = train_transcoder(settings, run_dir, batches=Filled(disk, 12, stop_at=27))
    assert (stopped.step, stopped.interrupted_by) == (whole.step, "SIGTERM")
    weights = "checkpoints/step_00000024/transcoder.safetensors"
    assert (run_dir / weights).read_bytes() == (tmp_path / "whole" / weights).read_bytes()
    assert not (run_dir / RESERVE_NAME).exists(), "a run that has ended holds nothing"
    (disk.folder / "filler").unlink()
    held = [next(b) for b in [Planted()] for _ in range(4)]
    resumed = train_transcoder(settings, run_dir, resume=True, batches=Planted(), heldout=held)
    assert resumed.finished
    assert load_checkpoint(run_dir / "checkpoints" / "step_00000030").trainer_tree["tokens"] == 30 * 64


def test_a_reserve_is_held_while_a_run_goes_on_and_taken_away_after_it(tmp_path: Path) -> None:
    seen = []

    class Looking(Planted):
        def __next__(self) -> ActivationBatch:
            seen.append(Reserve(tmp_path / "run", 0).held)
            return super().__next__()

    train_transcoder(config(training__steps=3, antidup__verify_at_step=3), tmp_path / "run", batches=Looking())
    parameters = 64 * (12 + 10)
    assert seen[-1] > 3 * 4 * parameters
    assert not (tmp_path / "run" / RESERVE_NAME).exists()


def test_the_essential_state_of_a_stream_goes_on_behind_its_rows(tmp_path: Path) -> None:
    """On the shipped language model: the next rows are those behind the ones that were lost."""

    settings = RunConfig.load("demo").replace(
        {"activations.buffer_tokens": 512, "training.batch_size": 128, "activations.sequences_per_forward": 4}
    )
    with build_stream(settings, torch.device("cpu")) as stream:
        for _ in range(3):
            next(stream)
        saved = essential_tree({"source": stream.state_dict()})
        assert saved["source"]["buffer"]["rows"] == {}
        tensors, _ = pack_state(saved)
        assert sum(t.nbytes for t in tensors.values()) <= stream.essential_bytes_at_most()
        before = stream.counters()["sequences"]
    with build_stream(settings, torch.device("cpu")) as again:
        again.load_state_dict(saved["source"])
        assert again.counters()["sequences"] == before
        batch = next(again)
        assert batch.sequences is not None
        assert again.counters()["sequences"] > before
