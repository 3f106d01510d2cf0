"""Real faults against checkpoints: full disk, killed writer, flipped bits, truncated and missing files."""

from __future__ import annotations

import gc
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.faults.small_disk import KIB, SmallDisk, believe_there_is_room
from transcoder.checkpoint_folder import CheckpointError, verify_checkpoint
from transcoder.config import CheckpointSection
from transcoder.training import checkpoint
from transcoder.training.checkpoint import CheckpointStore, load_checkpoint

FILES = ["state.json", "trainer.safetensors", "transcoder.safetensors"]


def state(step: int, size: int = 100 * KIB) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights of `size` bytes and moments of twice that, all a function of the step."""
    generator = torch.Generator().manual_seed(step)
    model = {"W_enc": torch.randn(size // 4, generator=generator)}
    return model, {"moments": torch.randn(size // 2, generator=generator), "step": step, "text": "x" * 1000}


def assert_holds(loaded: checkpoint.Loaded | None, step: int, size: int = 100 * KIB) -> None:
    assert loaded is not None
    model, trainer = state(step, size)
    assert loaded.step == loaded.trainer_tree["step"] == step
    assert torch.equal(loaded.model["W_enc"], model["W_enc"])
    assert torch.equal(loaded.trainer_tree["moments"], trainer["moments"])


def names(store: CheckpointStore) -> list[str]:
    return sorted(p.name for p in store.folder.iterdir())


@pytest.mark.parametrize("believe", [False, True], ids=["seen by statvfs", "met by the write"])
@pytest.mark.parametrize("room", [0, 20 * KIB, 150 * KIB, 301 * KIB])
def test_a_full_disk_costs_one_checkpoint_and_nothing_else(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, room: int, believe: bool
) -> None:
    store = CheckpointStore(disk.folder / "run")
    store.save(1, *state(1), {})
    filler = disk.leave(room)
    if believe:
        believe_there_is_room(monkeypatch)
    with pytest.raises(CheckpointError, match=r"step 2 .* could not be written.*(space|needs)"):
        store.save(2, *state(2), {})
    assert names(store) == ["step_00000001"], "no temporary folder is left"
    assert_holds(store.latest(), 1)
    filler.unlink()
    store.save(3, *state(3), {})
    assert_holds(store.latest(), 3)


@pytest.mark.parametrize("believe", [False, True], ids=["seen by statvfs", "met by the write"])
def test_room_is_made_by_what_the_retention_lets_go(
    disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, believe: bool
) -> None:
    store = CheckpointStore(disk.folder / "run", CheckpointSection(keep_last=2, keep_best=False))
    if believe:
        believe_there_is_room(monkeypatch)
    for step in range(1, 6):
        store.save(step, *state(step, 250 * KIB), {})
    assert names(store) == ["step_00000004", "step_00000005"]
    assert_holds(store.latest(), 5, 250 * KIB)


def test_the_last_good_one_is_never_given_up(disk: SmallDisk) -> None:
    store = CheckpointStore(disk.folder / "run", CheckpointSection(keep_last=1, keep_best=False))
    store.save(1, *state(1, 400 * KIB), {})
    for step in (2, 3):
        with pytest.raises(CheckpointError, match=f"step {step}"):
            store.save(step, *state(step, 400 * KIB), {})
    assert_holds(store.latest(), 1, 400 * KIB)


def test_a_corrupted_newest_one_does_not_cost_the_good_one_before_it(disk: SmallDisk) -> None:
    store = CheckpointStore(disk.folder / "run", CheckpointSection(keep_last=2, keep_best=False))
    store.save(1, *state(1, 250 * KIB), {})
    damaged = store.save(2, *state(2, 250 * KIB), {})
    flip_bit(damaged / "transcoder.safetensors", 5000)
    disk.leave(10 * KIB)
    with pytest.raises(CheckpointError):
        store.save(3, *state(3, 250 * KIB), {})
    with pytest.warns(UserWarning, match="step_00000002 is not usable"):
        assert_holds(store.latest(), 1, 250 * KIB)


def test_the_second_location_takes_over_and_is_resumed_from(disk: SmallDisk, tmp_path: Path) -> None:
    section = CheckpointSection(keep_last=1, keep_best=False, second_location=str(tmp_path / "second"))
    store = CheckpointStore(disk.folder / "run", section)
    store.check_space(400 * KIB, steps=3)
    store.save(1, *state(1), {})
    filler = disk.leave(0)
    for step in (2, 3):
        with pytest.warns(UserWarning, match="second location"):
            path = store.save(step, *state(step), {})
        assert tmp_path / "second" in path.parents
    assert_holds(CheckpointStore(disk.folder / "run", section).latest(), 3)
    assert [p.name for p in path.parent.iterdir()] == ["step_00000003"], "the second location keeps the newest"
    filler.unlink()
    store.save(4, *state(4), {})
    assert_holds(CheckpointStore(disk.folder / "run", section).latest(), 4)


def test_another_run_of_this_name_does_not_resume_from_the_second_location(tmp_path: Path) -> None:
    section = CheckpointSection(second_location=str(tmp_path / "second"))
    first = CheckpointStore(tmp_path / "run", section)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("in the way")
    with pytest.warns(UserWarning, match="second location"):
        first.save(1, *state(1, 64), {})
    shutil.rmtree(tmp_path / "run")
    assert CheckpointStore(tmp_path / "run", section).latest() is None


def test_a_damaged_later_one_takes_nobodys_place(tmp_path: Path) -> None:
    """A run that went back behind it must not lose what it saves from then on."""
    second = CheckpointSection(keep_last=1, keep_best=False, second_location=str(tmp_path / "second"))
    store = CheckpointStore(tmp_path / "run", CheckpointSection(keep_last=2, keep_best=False))
    for step in (2, 47):
        store.save(step, *state(step, 256), {})
    flip_bit(store.folder / "step_00000047" / "transcoder.safetensors", 5000)
    store.section = second
    with pytest.warns(UserWarning, match="step_00000047 is not usable"):
        assert_holds(store.latest(), 2, 256)
    store.save(3, *state(3, 256), {})
    assert_holds(store.latest(), 3, 256)
    assert names(store) == ["step_00000003"]

    shutil.rmtree(store.folder)
    store.folder.write_text("in the way")
    with pytest.warns(UserWarning, match="second location"):
        later = store.save(47, *state(47, 256), {})
    flip_bit(later / "transcoder.safetensors", 5000)
    with pytest.warns(UserWarning, match="second location"):
        store.save(4, *state(4, 256), {})
    assert_holds(store.latest(), 4, 256)


def test_a_link_in_place_of_the_reserve_leads_nowhere(tmp_path: Path) -> None:
    """A run folder from elsewhere may bring one: what it points at is not ours to truncate."""
    (tmp_path / "run").mkdir()
    precious = tmp_path / "precious"
    precious.write_text("words")
    for name in (".reserve", ".room"):
        (tmp_path / "run" / name).symlink_to(precious)
    store = CheckpointStore(tmp_path / "run")
    store.check_space(1000, steps=3)
    store.hold_reserve(1000)
    assert store.reserve.held == 1000
    assert precious.read_text() == "words"


def test_a_read_only_disk(disk: SmallDisk) -> None:
    store = CheckpointStore(disk.folder / "run")
    store.save(1, *state(1), {})
    if disk.mounted:
        subprocess.run(["mount", "-o", "remount,ro", str(disk.folder)], check=True)
    disk.read_only = True
    with pytest.raises(CheckpointError, match="Read-only"):
        store.save(2, *state(2), {})
    assert_holds(store.latest(), 1)


def test_a_folder_that_vanished_is_made_again(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run")
    store.save(1, *state(1), {})
    shutil.rmtree(tmp_path / "run")
    store.save(2, *state(2), {})
    assert_holds(store.latest(), 2)


LIMITED_AND_KILLED = """
import json, os, random, resource, signal, sys, time
from pathlib import Path
import torch
from transcoder.config import CheckpointSection
from transcoder.training import checkpoint
from transcoder.training.checkpoint import CheckpointError, CheckpointStore

torch.set_num_threads(1)
checkpoint.BACK_OFF = ()
size, draw = 400 * 1024, random.Random(0)

def limited(folder):
    store = CheckpointStore(folder)
    store.save(1, {"w": torch.ones(1000)}, {"m": torch.ones(1000)}, {})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        store.save(2, {"w": torch.ones(1000)}, {"m": torch.ones(100_000)}, {})
    except CheckpointError as error:
        print(json.dumps([str(error), [p.name for p in store.folder.iterdir()], store.latest().step]), flush=True)
    resource.setrlimit(resource.RLIMIT_FSIZE, before)

def state(step):
    generator = torch.Generator().manual_seed(step)
    return {"W_enc": torch.randn(size // 4, generator=generator)}, {
        "moments": torch.randn(size // 2, generator=generator), "step": step, "text": "x" * 1000}

def save_forever(folder, pipe):
    store = CheckpointStore(folder, CheckpointSection(keep_last=2, keep_best=False))
    loaded = store.latest()
    step = 0 if loaded is None else loaded.step
    while True:
        step += 1
        store.save(step, *state(step), {})
        os.write(pipe, b"%d " % step)

def killed(folder):
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        save_forever(folder, writing)
    os.close(writing)
    said = os.read(reading, 1000)
    time.sleep(draw.uniform(0, 0.15))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(reading, "rb") as rest:
        steps = [int(step) for step in (said + rest.read()).split()]
    loaded = CheckpointStore(folder).latest()
    model, tree = state(loaded.step)
    whole = torch.equal(loaded.model["W_enc"], model["W_enc"]) and torch.equal(loaded.trainer_tree["moments"], tree["moments"])
    return [steps[0], steps[-1], loaded.step, whole]

limited(Path(sys.argv[1]) / "limited")
print(json.dumps([killed(Path(sys.argv[1]) / "killed") for _ in range(8)]))
"""


@pytest.fixture(scope="module")
def limited_and_killed(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """What a process says that imports torch once: of a limit on the size of its files, and of its children's kills."""
    command = [sys.executable, "-c", LIMITED_AND_KILLED, str(tmp_path_factory.mktemp("process"))]
    run = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_a_file_size_limit(limited_and_killed: list[Any]) -> None:
    error, names, latest = limited_and_killed[0]
    assert "File too large" in error
    assert (names, latest) == (["step_00000001"], 1)


def test_sigkill_at_random_moments(limited_and_killed: list[Any]) -> None:
    saved = 0
    for first, reported, latest, whole in limited_and_killed[1]:
        assert first > saved, "it went on where the killed one was"
        assert whole
        assert latest >= reported, "a checkpoint that was reported is durable"
        saved = latest


def flip_bit(file: Path, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[bit // 8 % len(data)] ^= 1 << bit % 8
    file.write_bytes(data)


@pytest.fixture
def two(tmp_path: Path) -> CheckpointStore:
    store = CheckpointStore(tmp_path / "run", CheckpointSection(keep_last=3))
    store.save(1, *state(1, 256), {"n": 1})
    store.save(2, *state(2, 256), {"n": 2})
    return store


def assert_falls_back(store: CheckpointStore) -> None:
    damaged = store.folder / "step_00000002"
    with pytest.raises((ValueError, OSError)):
        verify_checkpoint(damaged)
    with pytest.raises((ValueError, OSError)):
        load_checkpoint(damaged)
    with pytest.warns(UserWarning, match="step_00000002 is not usable"):
        assert_holds(store.latest(), 1, 256)


@pytest.mark.parametrize("name", FILES)
def test_bit_flips_are_found(two: CheckpointStore, name: str) -> None:
    file = two.folder / "step_00000002" / name
    original, draw = file.read_bytes(), random.Random(name)
    for _ in range(60):
        bit = draw.randrange(8 * len(original))
        flip_bit(file, bit)
        try:
            # A flip in JSON's spelling can leave the content as it was: then nothing was damaged.
            harmless = name == "state.json" and json.loads(file.read_bytes()) == json.loads(original)
        except ValueError:
            harmless = False
        if harmless:
            assert_holds(two.latest(), 2, 256)
        else:
            assert_falls_back(two)
        file.write_bytes(original)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.9, 0.999])
def test_truncated_files_are_found(two: CheckpointStore, name: str, share: float) -> None:
    file = two.folder / "step_00000002" / name
    os.truncate(file, int(share * file.stat().st_size))
    assert_falls_back(two)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_found(two: CheckpointStore, name: str) -> None:
    (two.folder / "step_00000002" / name).unlink()
    assert_falls_back(two)


@pytest.mark.parametrize(
    "content", [b"", b"null", b"[]", b"3", b'"x"', b"{}", b'{"sha256": 1}', b"\xff\xfe", b"[" * 100_000]
)
def test_foreign_state_files_are_found(two: CheckpointStore, content: bytes) -> None:
    (two.folder / "step_00000002" / "state.json").write_bytes(content)
    gc.disable()  # What a collection in the depth of the last content destroys could not say what went wrong.
    try:
        assert_falls_back(two)
    finally:
        gc.enable()


def test_files_of_another_step_are_found(two: CheckpointStore) -> None:
    for name in FILES[1:]:
        shutil.copy(two.folder / "step_00000001" / name, two.folder / "step_00000002" / name)
    assert_falls_back(two)


def test_when_nothing_verifies_the_run_does_not_silently_start_again(two: CheckpointStore) -> None:
    for folder in two.folder.iterdir():
        os.truncate(folder / "transcoder.safetensors", 10)
    with (
        pytest.warns(UserWarning, match="not usable"),
        pytest.raises(CheckpointError, match="none of 2 checkpoints"),
    ):
        two.latest()
