"""Checkpoints: bitwise round trips, retention, replacing, space."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from transcoder.checkpoint_folder import CheckpointError, content_digest, find_checkpoint, verify_checkpoint
from transcoder.config import CheckpointSection
from transcoder.files import WrittenFile
from transcoder.tensor_file import read_tensors, tensor_bytes, write_tensors
from transcoder.training.checkpoint import (
    CheckpointStore,
    load_checkpoint,
)
from transcoder.training.disk_space import checkpoint_bytes, free_bytes, human_bytes
from transcoder.training.state_tree import pack_state, unpack_state

DTYPES = [
    *(torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.bool),
    *(
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.uint16,
        torch.uint32,
        torch.uint64,
    ),
]


def bits(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def assert_same(a: Any, b: Any) -> None:
    assert type(a) is type(b)
    if isinstance(a, Tensor):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert bits(a) == bits(b)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, float) and math.isnan(a):
        assert math.isnan(b)
    else:
        assert a == b


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Every bit pattern may occur, NaN payloads and subnormals included."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    size = torch.empty((), dtype=dtype).element_size()
    raw = torch.randint(0, 256, (math.prod(shape) * size,), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def write(path: Path, tensors: dict[str, Tensor]) -> WrittenFile:
    with open(path, "wb") as file:
        return write_tensors(file, tensors)


def state(seed: int = 0, size: int = 64) -> tuple[dict[str, Tensor], dict[str, Any]]:
    model = {
        "W_enc": random_bits((size, 3), torch.float32, seed),
        "b": random_bits((size,), torch.float32, seed + 1),
    }
    trainer = {
        "moments": {"W_enc": random_bits((size, 3), torch.float32, seed + 2)},
        "generator": random_bits((17,), torch.uint8, seed + 3),
        "cursor": {"document": 2**60 + seed, "rate": 0.1 + seed, "names": ["a", None, True]},
        "buffer": [torch.ones(2), (1, 2)],
    }
    return model, trainer


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (0, 3), (1,), (5, 7), (2, 3, 4)], ids=str)
def test_tensor_file_is_bitwise(tmp_path: Path, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensors = {"x": random_bits(shape, dtype, 1), "another": random_bits((3,), torch.uint8, 2)}
    written = write(tmp_path / "t.safetensors", tensors)
    assert written.bytes == (tmp_path / "t.safetensors").stat().st_size == tensor_bytes(tensors)
    found = read_tensors(tmp_path / "t.safetensors", written)
    assert found.keys() == tensors.keys()
    for name in tensors:
        assert_same(tensors[name], found[name])


def test_tensor_file_is_read_by_the_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    tensors = {"a": random_bits((3, 4), torch.int64, 0), "b": torch.ones(5).bool()}
    write(tmp_path / "t.safetensors", tensors)
    with safe_open(tmp_path / "t.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in tensors:
            assert torch.equal(file.get_tensor(name), tensors[name])


def test_strided_shared_and_expanded_tensors(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(4, 6)
    parameter = torch.nn.Parameter(base.clone())
    tensors = {"t": base.T, "row": base[1], "step": base[:, ::2], "same": base, "parameter": parameter}
    tensors["wide"] = base[:1].expand(5, 6)
    written = write(tmp_path / "t.safetensors", tensors)
    found = read_tensors(tmp_path / "t.safetensors", written)
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor.detach())
    found["same"].zero_()
    assert torch.equal(found["row"], base[1]), "loaded tensors own their memory"


def test_a_dtype_that_safetensors_lacks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="complex128"):
        write(tmp_path / "t.safetensors", {"z": torch.zeros(2, dtype=torch.complex128)})


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=5),
    st.builds(random_bits, st.sampled_from([(), (0,), (2, 3)]), st.sampled_from(DTYPES), st.integers(0, 99)),
)
KEYS = st.one_of(st.text(max_size=5), st.sampled_from(["$tensor", "$items", "a/b", "a", "b"]), st.integers(-3, 3))
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(KEYS, inner, max_size=3),
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(TREES)
def test_any_state_packs_and_unpacks(tree: Any) -> None:
    tensors, skeleton = pack_state(tree)
    assert_same(unpack_state(tensors, json.loads(json.dumps(skeleton))), tree)


@pytest.mark.parametrize(
    ("tree", "place"),
    [
        ({"a": {"b": object()}}, "a/b"),
        ({"a": [1, {2}]}, "a/1"),
        ({("x",): 1}, "root"),
        ({"s": torch.eye(3).to_sparse()}, "s"),
    ],
)
def test_unknown_leaves_are_refused_by_place(tree: Any, place: str) -> None:
    with pytest.raises(TypeError, match=place):
        pack_state(tree)


def test_save_and_load(tmp_path: Path) -> None:
    model, trainer = state()
    store = CheckpointStore(tmp_path / "run")
    assert store.latest() is None
    path = store.save(7, model, trainer, {"evaluation/fvu": 0.25, "odd": math.nan}, metric=0.25)
    assert path == tmp_path / "run" / "checkpoints" / "step_00000007"
    names = sorted(p.name for p in path.iterdir())
    assert names == ["state.json", "trainer.safetensors", "transcoder.safetensors"]
    loaded = store.latest()
    assert loaded is not None
    assert (loaded.step, loaded.metric, loaded.path) == (7, 0.25, path)
    assert_same(loaded.model, dict(sorted(model.items())))
    assert_same(loaded.trainer_tree, trainer)
    assert loaded.summary["evaluation/fvu"] == 0.25
    assert math.isnan(loaded.summary["odd"])
    assert find_checkpoint(tmp_path / "run") == find_checkpoint(path) == path
    assert verify_checkpoint(path) == 7


def test_a_summary_with_tensors_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="fvu"):
        CheckpointStore(tmp_path).save(1, {}, {}, {"fvu": torch.ones(())})
    assert list(tmp_path.iterdir()) == []


def saved_steps(run: Path) -> list[int]:
    return sorted(int(p.name[5:]) for p in (run / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("section", "metrics", "expected"),
    [
        (CheckpointSection(keep_last=2), [None] * 6, [50, 60]),
        (CheckpointSection(keep_last=1), [0.5, 0.2, 0.4, None, 0.3, math.nan], [20, 60]),
        (CheckpointSection(keep_last=1, keep_best=False), [0.5, 0.2, 0.4, 0.6, 0.3, 0.7], [60]),
        (CheckpointSection(keep_last=1, keep_best=False, keep_every=20), [None] * 6, [20, 40, 60]),
        (CheckpointSection(keep_last=2, keep_every=30), [0.1, 0.1, 0.3, 0.4, 0.4, 0.4], [20, 30, 50, 60]),
    ],
)
def test_retention(
    tmp_path: Path, section: CheckpointSection, metrics: list[float | None], expected: list[int]
) -> None:
    store = CheckpointStore(tmp_path, section)
    for i, metric in enumerate(metrics):
        store.save(10 * (i + 1), *state(i, size=2), {}, metric=metric)
    assert saved_steps(tmp_path) == expected


def test_the_same_step_is_replaced(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    store.save(5, *state(1), {"n": 1})
    store.save(5, *state(2), {"n": 2})
    loaded = store.latest()
    assert loaded is not None
    assert loaded.summary == {"n": 2}
    assert [p.name for p in store.folder.iterdir()] == ["step_00000005"]


def test_a_kill_between_the_two_renames_of_a_replacement_loses_nothing(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(5, *state(1), {"n": 1})
    path.rename(path.with_name(".replaced_step_00000005"))
    loaded = store.latest()
    assert loaded is not None
    assert loaded.summary == {"n": 1}
    store.save(6, *state(2), {})
    store.save(7, *state(2), {})
    assert saved_steps(tmp_path) == [6, 7]


def test_leftovers_of_a_killed_process_are_ignored_and_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = store.save(5, *state(1), {})
    for name in (".writing_step_00000006", ".deleting_step_00000001"):
        shutil.copytree(path, path.with_name(name))
    loaded = store.latest()
    assert loaded is not None
    assert loaded.step == 5
    store.save(6, *state(1), {})
    assert sorted(p.name for p in store.folder.iterdir()) == ["step_00000005", "step_00000006"]


def test_a_newer_format_is_refused_by_name(tmp_path: Path) -> None:
    path = CheckpointStore(tmp_path).save(5, *state(1), {})
    body = json.loads((path / "state.json").read_text())
    del body["sha256"]
    body["version"] = 99
    (path / "state.json").write_text(json.dumps({**body, "sha256": content_digest(body)}))
    with pytest.raises(CheckpointError, match="format 99"):
        load_checkpoint(path)
    with pytest.raises(CheckpointError, match="upgrade"):
        CheckpointStore(tmp_path).latest()


def test_find_checkpoint_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        find_checkpoint(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        find_checkpoint(tmp_path)


def test_space_is_checked_with_settings_that_would_fit(tmp_path: Path) -> None:
    free = free_bytes(tmp_path)
    section = CheckpointSection(every=10, keep_last=5, keep_every=10)
    store = CheckpointStore(tmp_path, section)
    store.check_space(1000, steps=100)
    with pytest.raises(CheckpointError, match=r"fit: --checkpoint.keep_every null \(needs"):
        store.check_space(free // 8, steps=1000)
    with pytest.raises(CheckpointError, match=r"null --checkpoint.keep_best false \(needs"):
        store.check_space(free * 10 // 65, steps=1000)
    with pytest.raises(CheckpointError, match=r"--checkpoint.keep_last 1 \(needs"):
        store.check_space(free // 3, steps=1000)
    with pytest.raises(CheckpointError, match=r"transcoder.d_sae \(about \d+ % of the present"):
        store.check_space(2 * free, steps=1000)
    with pytest.raises(CheckpointError, match=r"checkpoints \(.* and the run's other files \(.* need .* free are"):
        store.check_space(1000, steps=100, others=2 * free)
    few, more, many = (checkpoint_bytes(section, 1000, steps) for steps in (5, 10, 100))
    assert few == more < many


def test_what_a_resumed_run_already_keeps_counts_as_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transcoder.training import checkpoint

    store = CheckpointStore(tmp_path, CheckpointSection(every=1, keep_last=1, keep_best=False))
    path = store.save(1, *state(1, size=2**15), {})
    size = sum(p.stat().st_size for p in path.iterdir())
    # A nearly full disk, told by the lowest layer: room for one more checkpoint, while the budget is two.
    monkeypatch.setattr(checkpoint, "free_bytes", lambda folder: size + 2 * 64 * 1024)
    store.check_space(size, steps=5)
    with pytest.raises(CheckpointError):
        CheckpointStore(tmp_path / "fresh", store.section).check_space(size, steps=5)


def test_an_unusable_second_location_is_refused_before_training(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    second = str(tmp_path / "file" / "x")
    store = CheckpointStore(tmp_path / "run", CheckpointSection(second_location=second))
    with pytest.raises(CheckpointError, match="second_location"):
        store.check_space(1, steps=1)


def test_human_bytes() -> None:
    assert human_bytes(12) == "12 bytes"
    assert human_bytes(3 * 2**20) == "3,145,728 bytes (3.0 MiB)"
