from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.activations.streams import EveryOther, drain, same
from transcoder.activations import ActivationStream, DataError, build_stream
from transcoder.config import RunConfig

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("form", "prefetch", "stop"),
    [
        ("jsonl", 0, 0),
        ("jsonl", 2, 0),
        ("jsonl", 0, 13),
        ("jsonl", 2, 77),
        ("stdlib", 2, 77),
        ("hub", 0, 13),
        ("hub", 2, 77),
    ],
)
def test_resuming_is_bitwise(
    build: Callable[..., ActivationStream], jsonl: Path, form: str, prefetch: int, stop: int
) -> None:
    dataset = {"jsonl": str(jsonl), "stdlib": "stdlib", "hub": f"hf:{jsonl.parent}"}[form]
    keywords = {"dataset": dataset, "context_tokens": 6, "refill_fraction": 0.4}
    # What `auto` found is found again.
    keywords |= {"mask_norm_multiple": "auto"} if form == "stdlib" else {}
    stream = build(**keywords, prefetch=prefetch, position_sampler=EveryOther([]))
    for _ in range(stop):
        next(stream)
    state = stream.state_dict()
    counters = stream.counters()
    expected = [next(stream) for _ in range(40)]
    after = stream.counters()
    # The other depth: what ran ahead must not matter. A used stream: what it held must not matter either.
    again = build(**keywords, prefetch=2 - prefetch, position_sampler=EveryOther([]))
    for _ in range(5):
        next(again)
    again.load_state_dict(state)
    assert again.counters() == counters
    for batch in expected:
        assert same(batch, next(again))
    assert again.counters() == after


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(("before", "tokens"), [(0, 1), (0, 700), (5, 64), (8, 33)])
def test_looking_ahead_uses_nothing_up(
    build: Callable[..., ActivationStream], prefetch: int, before: int, tokens: int
) -> None:
    stream, plain = build(prefetch=prefetch), build(prefetch=prefetch)
    for _ in range(before):
        assert same(next(stream), next(plain))
    seen = stream.look_ahead(tokens)
    assert len(seen) == -(-tokens // 32)
    assert all(x is y for x, y in zip(seen, stream.look_ahead(tokens), strict=True))
    longer = stream.look_ahead(tokens + 100)
    assert all(x is y for x, y in zip(seen, longer, strict=False))
    for batch in longer:
        expected = next(plain)
        assert same(batch, expected)
        assert same(next(stream), expected)
    for _ in range(20):
        assert same(next(stream), next(plain))


def test_looking_ahead_runs_no_pass_twice(build: Callable[..., ActivationStream]) -> None:
    sampler = EveryOther([])
    stream = build(position_sampler=sampler)
    stream.look_ahead(700)
    drain(stream, 60)
    assert sampler.steps == list(range(len(sampler.steps)))
    assert stream.look_ahead(0) == []


@pytest.mark.parametrize("used", [0, 3, 22, 30])
def test_resuming_between_looked_at_batches_is_bitwise(build: Callable[..., ActivationStream], used: int) -> None:
    stream, again = build(prefetch=2, context_tokens=6), build(context_tokens=6)
    stream.look_ahead(700)
    drain(stream, used)
    again.look_ahead(100)
    again.load_state_dict(stream.state_dict())
    assert again.counters() == stream.counters()
    for _ in range(40):
        assert same(next(again), next(stream))
    assert again.counters() == stream.counters()


class Recording:
    """Notes which passes it drew for and which it was told to count."""

    def __init__(self) -> None:
        self.drawn: list[int] = []
        self.recorded: list[int] = []

    @dataclass
    class Sample:
        keep: Tensor
        weights: Tensor
        step: int

    def sample_positions(self, batch_tokens: Tensor, step: int = 0, record: bool = True) -> Recording.Sample:
        assert not record
        self.drawn.append(step)
        return self.Sample(torch.ones_like(batch_tokens, dtype=torch.bool), torch.ones(batch_tokens.shape), step)

    def record(self, sample: Recording.Sample) -> None:
        self.recorded.append(sample.step)


def test_a_sampler_counts_passes_when_they_are_taken_and_once(build: Callable[..., ActivationStream]) -> None:
    first, second = Recording(), Recording()
    stream = build(position_sampler=first, prefetch=2)
    drain(stream, 30)
    taken = int(stream.counters()["passes"])
    assert first.recorded == list(range(taken))
    # A refill's rows were made ahead: without a hook they would be counted here, and again after the resume.
    end = time.monotonic() + 10
    while len(first.drawn) == taken and time.monotonic() < end:
        time.sleep(0.01)
    assert len(first.drawn) > taken
    again = build(position_sampler=second, prefetch=2)
    again.load_state_dict(stream.state_dict())
    assert second.recorded == []
    drain(again, 30)
    assert second.recorded == list(range(taken, int(again.counters()["passes"])))
    stream.heldout(64)
    assert first.recorded == list(range(taken))


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_no_state_takes_more_bytes_than_said_and_a_full_one_little_less(
    make_config: Callable[..., RunConfig], sampled: bool, dtype: str
) -> None:
    config = make_config(buffer_tokens=4096).replace({"model.dtype": dtype})
    with build_stream(
        config, CPU, position_sampler=(lambda ids: Recording()) if sampled else None, context_tokens=7
    ) as stream:
        at_first = stream.state_bytes_at_most()
        largest = 0
        for i in range(140):
            # Straight behind a refill the buffer lacks one batch only.
            state = stream.state_dict()
            size = sum(leaf.nbytes if isinstance(leaf, Tensor) else len(repr(leaf)) for leaf in leaves(state))
            assert size <= stream.state_bytes_at_most()
            largest = max(largest, size if i < 130 else 0)
            if i == 129:
                stream.look_ahead(2000)
                grown = stream.state_bytes_at_most() - at_first
                assert grown == 63 * 32 * stream._source.row_bytes
            next(stream)
        rows = stream._buffer.state_dict()["rows"]
        assert sum(v[0].nbytes for v in rows.values()) == stream._source.row_bytes
        # The rest of the bound is room for documents read ahead.
        ahead = stream._source.source.cursor_bytes_at_most()
        assert largest > 0.95 * (at_first - ahead - (1 << 16) - 64 * stream._source.row_bytes)


def test_a_state_of_another_language_model_is_refused(
    make_config: Callable[..., RunConfig], model_folder: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    config = make_config()
    with build_stream(config, CPU) as stream:
        drain(stream, 3)
        state = stream.state_dict()
        expected = [next(stream) for _ in range(5)]
    # The same model, moved and renamed.
    moved = tmp_path / "elsewhere"
    shutil.copytree(model_folder, moved)
    with build_stream(config.replace({"model.name": str(moved)}), CPU) as stream:
        stream.load_state_dict(state)
        assert all(same(batch, next(stream)) for batch in expected)
    # Another one of the same shape, in a folder of the same name.
    other = tmp_path / "other" / model_folder.name
    shutil.copytree(model_folder, other)
    weights = load_file(other / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file({**weights, name: weights[name] * 1.01}, other / "model.safetensors", metadata={"format": "pt"})
    with (
        build_stream(config.replace({"model.name": str(other)}), CPU) as stream,
        pytest.raises(ValueError, match=f"saved data cursor has model = .*{model_folder.name}"),
    ):
        stream.load_state_dict(state)
    with (
        build_stream(config.replace({"model.dtype": "bfloat16"}), CPU) as stream,
        pytest.raises(ValueError, match=r"saved data cursor has dtype = .float32. and this run has .bfloat16.\W"),
    ):
        stream.load_state_dict(state)


def leaves(tree: Any) -> Iterator[Any]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            assert isinstance(key, str)
            yield from leaves(value)
    else:
        yield tree


def test_state_holds_tensors_and_json_values_only(build: Callable[..., ActivationStream]) -> None:
    stream = build(prefetch=2)
    for _ in range(9):
        next(stream)
    for leaf in leaves(stream.state_dict()):
        assert isinstance(leaf, Tensor) or json.loads(json.dumps(leaf)) == leaf


def test_state_is_not_changed_by_going_on(build: Callable[..., ActivationStream]) -> None:
    stream = build()
    for _ in range(9):
        next(stream)
    state = stream.state_dict()
    copy = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves(state)]
    for _ in range(50):
        next(stream)
    for before, now in zip(copy, leaves(state), strict=True):
        assert torch.equal(before, now) if isinstance(now, Tensor) else before == now


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"sequence_length": 12}, "sequence_length"),
        ({"target_hook": "blocks.1.mlp.hook_out"}, "target_hook"),
        ({"buffer_tokens": 128}, "buffer_tokens"),
        ({"sequences_per_forward": 2}, "sequences_per_forward"),
    ],
)
def test_a_state_of_other_settings_is_refused(
    build: Callable[..., ActivationStream], change: dict[str, Any], named: str
) -> None:
    state = build().state_dict()
    with pytest.raises(ValueError, match=f"saved data cursor has {named} = "):
        build(**change).load_state_dict(state)


def edited(path: Path) -> None:
    path.write_text(path.read_text().replace("fox", "cat", 1))


def longer(path: Path) -> None:
    path.write_text(path.read_text() + json.dumps({"text": "one more"}) + "\n")


def joined(path: Path) -> None:
    (path.parent / "new.jsonl").write_text(json.dumps({"text": "one more"}) + "\n")


def removed(path: Path) -> None:
    (path.parent / "second.jsonl").unlink()


@pytest.mark.parametrize("change", [edited, longer, joined, removed])
def test_a_state_over_text_that_changed_since_is_refused(
    build: Callable[..., ActivationStream], jsonl: Path, tmp_path: Path, change: Callable[[Path], None]
) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("first.jsonl", "second.jsonl"):
        shutil.copy(jsonl, data / name)
    stream = build(dataset=str(data))
    drain(stream, 3)
    state = stream.state_dict()
    expected = next(stream)
    shutil.copytree(data, tmp_path / "copy")
    again = build(dataset=str(tmp_path / "copy"))
    again.load_state_dict(state)
    assert same(next(again), expected), "a copy of the data is the same data"

    change(data / "first.jsonl")
    with pytest.raises(DataError, match=r"activations\.dataset changed .*--activations\.allow_changed_data true"):
        build(dataset=str(data)).load_state_dict(state)
    willing = build(dataset=str(data), allow_changed_data=True)
    with pytest.warns(UserWarning, match=r"activations\.dataset changed"):
        willing.load_state_dict(state)
    assert same(next(willing), expected), "what was read before the change is still due"
    drain(willing, 100)
