from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transcoder.activations import ActivationBatch, ActivationStream, DataError, ModelError, build_stream
from transcoder.activations.documents import is_heldout
from transcoder.activations.language_model import HookedModel
from transcoder.activations.packing import Packer, sequence_ids
from transcoder.activations.record_sources import FileRecords, files_digest
from transcoder.config import RunConfig

CPU = torch.device("cpu")
COLUMNS = ("source", "target", "tokens", "positions", "sequences", "weights", "contexts")


@pytest.fixture
def build(make_config: Callable[..., RunConfig]) -> Iterator[Callable[..., ActivationStream]]:
    """build(position_sampler=, context_tokens=, **activations): a stream that is closed when the test ends."""
    made: list[ActivationStream] = []

    def make(position_sampler: Any = None, context_tokens: int = 0, **activations: Any) -> ActivationStream:
        config = make_config(**activations)
        sampler = position_sampler and (lambda ids: position_sampler)
        made.append(build_stream(config, CPU, position_sampler=sampler, context_tokens=context_tokens))
        return made[-1]

    yield make
    for stream in made:
        stream.close()


def same(a: ActivationBatch, b: ActivationBatch) -> bool:
    for name in COLUMNS:
        x, y = getattr(a, name), getattr(b, name)
        if (x is None) != (y is None) or (x is not None and not torch.equal(x, y)):
            return False
    return a.context_anchor == b.context_anchor


def ids_of(tokens: Tensor) -> list[int]:
    return [int(i) for i in sequence_ids(tokens.numpy())]


def drain(stream: ActivationStream, batches: int) -> None:
    for _ in range(batches):
        next(stream)


@pytest.fixture
def packed(jsonl: Path, hooked: HookedModel) -> Callable[[int], Tensor]:
    """packed(n): the first n training sequences [n, 16] of the default test run, straight from the packer."""

    def pack(count: int) -> Tensor:
        packer = Packer(
            FileRecords(jsonl, "text", None), hooked.vocabulary, 16, True, lambda d: not is_heldout(d.index, 0.2)
        )
        found = packer.pack(count)
        assert found is not None
        return torch.from_numpy(found.tokens)

    return pack


def test_a_batch_holds_the_models_activations_at_its_tokens(
    build: Callable[..., ActivationStream], packed: Callable[[int], Tensor], hooked: HookedModel
) -> None:
    stream = build(context_tokens=8)
    assert (stream.d_in, stream.d_out, stream.sequence_length) == (16, 16, 16)
    assert stream.special_ids == [0, 1, 2, 3]
    assert stream.vocab_size == hooked.vocabulary.size
    tokens = packed(400)
    # In passes of the same size as the stream's, so that the comparison can be bitwise.
    parts = [hooked.forward(part) for part in tokens.split(4)]
    source, target = (torch.cat([p[side] for p in parts]) for side in (0, 1))
    rows = {number: row for row, number in enumerate(ids_of(tokens))}
    for _ in range(40):
        batch = next(stream)
        assert len(batch) == 32
        assert batch.tokens.dtype == batch.positions.dtype == torch.int64
        assert batch.sequences is not None
        assert batch.contexts is not None
        assert batch.sequences.dtype == torch.int64
        at = (torch.tensor([rows[int(i)] for i in batch.sequences]), batch.positions)
        assert torch.equal(batch.tokens, tokens[at])
        assert torch.equal(batch.source, source[at])
        assert torch.equal(batch.target, target[at])
        assert torch.equal(batch.contexts[:, batch.context_anchor], batch.tokens.to(torch.int32))
        assert not any(int(t) in stream.special_ids for t in batch.tokens)
        assert batch.weights is None


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("refill_fraction", [0.3, 0.5, 1.0])
def test_every_unmasked_token_of_an_epoch_comes_exactly_once(
    build: Callable[..., ActivationStream],
    packed: Callable[[int], Tensor],
    prefetch: int,
    refill_fraction: float,
) -> None:
    stream = build(prefetch=prefetch, refill_fraction=refill_fraction)
    seen: Counter[tuple[int, int]] = Counter()
    while stream.counters()["epochs"] < 3:
        batch = next(stream)
        assert batch.sequences is not None
        seen.update(zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True))
    state = stream.state_dict()
    waiting = [state["buffer"]["rows"], *state["pending"].values()]
    for rows in waiting:
        seen.update(zip(rows["sequences"].tolist(), rows["positions"].tolist(), strict=True))
    sequences = int(stream.counters()["sequences"])
    tokens = packed(sequences)
    ids = ids_of(tokens)
    # Drawn plus waiting is everything that the model has read but the sinks: nothing lost, nothing doubled. The same
    # text has one id in every epoch, and so comes as often as there were epochs.
    assert seen == Counter((ids[int(s)], int(p)) for s, p in (tokens > 3).nonzero())
    assert max(seen.values()) > 2


def test_batches_mix_sequences(build: Callable[..., ActivationStream]) -> None:
    stream = build()
    for _ in range(30):
        sequences = next(stream).sequences
        assert sequences is not None
        assert len(sequences.unique()) >= 6


def test_prefetch_changes_nothing(build: Callable[..., ActivationStream]) -> None:
    streams = [build(prefetch=depth, context_tokens=4) for depth in (0, 1, 3)]
    for _ in range(40):
        first, second, third = (next(s) for s in streams)
        assert same(first, second)
        assert same(first, third)
    assert streams[0].counters() == streams[2].counters()


def test_seed_changes_the_order_only(
    build: Callable[..., ActivationStream],
) -> None:
    a, b, c = build(), build(), build(seed=1)
    assert same(next(a), next(b))
    assert not same(next(a), next(c))


@dataclass
class EveryOther:
    """Keeps positions whose (pass + row + column) is even, weighted by the column."""

    steps: list[int]

    def sample_positions(self, batch_tokens: Tensor, step: int = 0) -> Any:
        self.steps.append(step)
        rows, columns = (torch.arange(n) for n in batch_tokens.shape)
        keep = (rows[:, None] + columns + step) % 2 == 0
        weights = columns.expand(batch_tokens.shape) / 8.0

        @dataclass
        class Sample:
            keep: Tensor
            weights: Tensor

        return Sample(keep, weights)


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


def test_a_refill_finds_its_rows_waiting(build: Callable[..., ActivationStream]) -> None:
    # A refill takes 4 batches of 32 rows, so 3 passes: more than `prefetch`.
    stream = build(prefetch=1)
    next(stream)
    for _ in range(6):
        # Until the thread has nothing left to do, however busy the machine is.
        end = time.monotonic() + 10
        while (waiting := stream._producer.waiting()) < 128 and time.monotonic() < end:
            time.sleep(0.005)
        # One refill's rows, and less than one pass (at most 60 rows) more.
        assert 128 <= waiting < 128 + 60
        drain(stream, 4)


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
        ahead = stream._source.cursor_bytes_at_most()
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


@pytest.mark.parametrize(
    ("length", "whole", "places"),
    [
        (10_000_000, 10_000_000, [0, 1, 70_000, 5_000_000, 9_999_999]),
        (10_000_000, 9_999_999, [0, 65_535, 9_934_464, 9_999_999]),
        (1_048_576, 0, [*range(0, 1_048_576, 70_001), 1_048_575]),
        (65_537, 0, [0, 65_535, 65_536]),
        (1, 0, [0]),
    ],
)
def test_a_files_digest_sees_changes(tmp_path: Path, length: int, whole: int, places: list[int]) -> None:
    """Everywhere in files that are small together, and in large ones in their blocks, first and last included."""
    path = tmp_path / "file"

    def digest(content: bytes, name: str = "name") -> str:
        path.write_bytes(content)
        return files_digest([(name, path)], whole)

    content = b"a" * length
    before = digest(content)
    for place in places:
        assert digest(content[:place] + b"b" + content[place + 1 :]) != before, place
    assert digest(content) == before
    assert digest(content, "other") != before
    assert digest(content[:-1]) != before
    assert digest(content + b"a") != before


def test_positions_are_those_sampled(build: Callable[..., ActivationStream], packed: Callable[[int], Tensor]) -> None:
    sampler = EveryOther([])
    stream = build(position_sampler=sampler)
    # The same text may come in several passes.
    offsets: dict[int, set[int]] = {}
    for n, number in enumerate(ids_of(packed(400))):
        offsets.setdefault(number, set()).add((n // 4 + n % 4) % 2)
    for _ in range(40):
        batch = next(stream)
        assert batch.sequences is not None
        assert batch.weights is not None
        for number, position in zip(batch.sequences.tolist(), batch.positions.tolist(), strict=True):
            assert position % 2 in offsets[number]
        assert torch.equal(batch.weights, batch.positions / 8.0)
        assert batch.weights.dtype == torch.float32
    assert sampler.steps == list(range(len(sampler.steps)))
    assert stream.counters()["left_by_sampler"] > 0
    assert stream.counters()["passes"] == len(sampler.steps)


def test_heldout_documents_never_train(
    build: Callable[..., ActivationStream], documents: list[str], hooked: HookedModel
) -> None:
    stream = build(context_tokens=61, sequence_length=32)
    names = {i for i in range(len(documents)) if is_heldout(i, 0.2)}
    assert 3 < len(names) < 30

    def numbers(batch: ActivationBatch) -> set[int]:
        # Every document begins with its number and a colon, and EOS goes before it.
        found = set()
        assert batch.contexts is not None
        for window in batch.contexts.tolist():
            text = "".join(stream.decode_tokens([t for t in window if t >= 0]))
            for part in text.replace("<bos>", "").split("<eos>")[1:]:
                if ":" in part:
                    found.add(int(part.split(":")[0]))
        return found

    trained: set[int] = set()
    while stream.counters()["epochs"] < 2:
        trained |= numbers(next(stream))
    evaluated: set[int] = set()
    for batch in stream.heldout(10_000):
        evaluated |= numbers(batch)
    assert trained <= set(range(60)) - names
    assert evaluated <= names
    assert len(trained) > 30
    assert len(evaluated) > 2


def test_heldout_is_fixed_whatever_training_does(build: Callable[..., ActivationStream]) -> None:
    stream, other = build(prefetch=2), build(seed=0)
    first = stream.heldout(100)
    assert [len(b) for b in first] == [32, 32, 32, 32]
    for _ in range(30):
        next(stream)
    again = stream.heldout(100)
    fresh = other.heldout(100)
    for a, b, c in zip(first, again, fresh, strict=True):
        assert same(a, b)
        assert same(a, c)
    sinks = stream.heldout_sinks()
    assert sinks is not None
    assert set(sinks.tokens.tolist()) <= {0, 1, 2, 3}
    assert all(not set(b.tokens.tolist()) & {0, 1, 2, 3} for b in first)
    # Asking does not move training.
    untouched = build(prefetch=0)
    for _ in range(30):
        next(untouched)
    assert same(next(stream), next(untouched))


def test_little_heldout_text_gives_what_there_is(build: Callable[..., ActivationStream]) -> None:
    batches = build().heldout(10**6)
    assert len(batches) >= 2
    assert all(len(b) == 32 for b in batches)
    short = build(batch_size=250).heldout(10**6)
    assert len(short) >= 1
    sinks = build().heldout_sinks()
    assert sinks is not None


def test_nothing_held_out(build: Callable[..., ActivationStream], tmp_path: Path) -> None:
    stream = build(heldout_fraction=0.0)
    assert stream.heldout(100) == []
    assert stream.heldout_sinks() is None
    path = tmp_path / "one.jsonl"
    path.write_text('{"text": "only one document, which is not held out"}\n')
    assert not is_heldout(0, 0.02)
    with pytest.raises(DataError, match="raise heldout_fraction"):
        build(dataset=str(path), heldout_fraction=0.02).heldout(100)


def test_norm_sinks_are_dropped_everywhere(build: Callable[..., ActivationStream]) -> None:
    plain = build(mask_norm_multiple=None, prefetch=0)
    rows = [next(plain) for _ in range(60)]
    norms = torch.cat([b.source for b in rows]).norm(dim=-1)
    multiple = 1.2
    masked = build(mask_norm_multiple=multiple)
    kept = [next(masked) for _ in range(60)]
    assert masked.counters()["masked_by_norm"] > 0
    assert masked.counters()["sink_norm_ratio_max"] > multiple
    kept_norms = torch.cat([b.source for b in kept]).norm(dim=-1)
    assert kept_norms.max() < norms.max()
    assert masked.heldout(1000)
    sinks = masked.heldout_sinks()
    assert sinks is not None
    assert any(int(t) > 3 for t in sinks.tokens)
    unmasked = build(mask_bos=False, mask_norm_multiple=None)
    found = torch.cat([next(unmasked).tokens for _ in range(20)])
    assert (found == 2).any()
    assert unmasked.counters()["masked_by_id"] == 0


def test_position_zero_can_be_masked(build: Callable[..., ActivationStream]) -> None:
    stream = build(prepend_bos=False, mask_position_zero=True)
    assert all((next(stream).positions > 0).all() for _ in range(20))
    assert stream.counters()["masked_by_position"] > 0


def test_data_that_leave_nothing_to_train_on(build: Callable[..., ActivationStream], tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"ids": [1, 1, 2, 3]}\n' * 4)
    stream = build(dataset=str(path), tokens_column="ids", heldout_fraction=0.0, prefetch=2)
    with pytest.raises(DataError, match="masked as a sink"):
        next(stream)


def test_tokenised_columns_train_and_bad_ids_reach_the_trainer(
    build: Callable[..., ActivationStream], tmp_path: Path
) -> None:
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "a.parquet"
    good = [[10 + (i * j) % 200 for j in range(40)] for i in range(30)]
    pyarrow.parquet.write_table(pyarrow.table({"ids": good}), path)
    stream = build(dataset=str(path), tokens_column="ids")
    assert len(next(stream)) == 32
    pyarrow.parquet.write_table(pyarrow.table({"ids": [*good, [5, 70000]]}), path)
    stream = build(dataset=str(path), tokens_column="ids", heldout_fraction=0.0, prefetch=2)
    with pytest.raises(DataError, match=r"a\.parquet row 30.*70000"):
        drain(stream, 60)


def test_counters(build: Callable[..., ActivationStream]) -> None:
    stream = build()
    assert stream.counters()["tokens_seen"] == 0
    next(stream)
    counters = stream.counters()
    assert counters["tokens_seen"] == counters["passes"] * 64
    assert counters["sequences"] == counters["passes"] * 4
    assert counters["masked_by_id"] >= counters["sequences"]
    assert counters["documents"] > 0
    assert all(isinstance(value, float) for value in counters.values())


def test_closing_and_the_global_generator(build: Callable[..., ActivationStream]) -> None:
    before = torch.get_rng_state()
    with build(prefetch=2) as stream:
        next(stream)
    stream.close()
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(RuntimeError, match="closed"):
        drain(stream, 20)
    assert stream.heldout(32)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"sequence_length": 129}, DataError, "at most 128 tokens"),
        ({"source_hook": "blocks.1.hook_resid_mdi"}, ModelError, "nearest"),
        ({"dataset": "/nowhere/at.txt"}, DataError, "no file or folder"),
        ({"dataset": "{folder}/compressed.txt"}, DataError, "no usable document .1 records"),
        ({"dataset": "{folder}/ids.jsonl", "tokens_column": "ids"}, DataError, "ids.jsonl line 1.*has 999"),
        ({"context_tokens": -1}, ValueError, "context_tokens"),
    ],
)
def test_errors_come_at_build_stream(
    build: Callable[..., ActivationStream],
    tmp_path: Path,
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    (tmp_path / "compressed.txt").write_bytes(b"\x1f\x8b\x08\x00\xff")
    (tmp_path / "ids.jsonl").write_text('{"ids": [5, 999]}\n')
    change = {name: v.replace("{folder}", str(tmp_path)) if isinstance(v, str) else v for name, v in change.items()}
    with pytest.raises(error, match=message):
        build(**change)


def test_activations_keep_the_models_dtype(make_config: Callable[..., RunConfig]) -> None:
    config = make_config().replace({"model.dtype": "bfloat16"})
    with build_stream(config, CPU) as stream:
        batch = next(stream)
        assert batch.source.dtype == batch.target.dtype == torch.bfloat16


def test_the_shipped_model_over_the_standard_library() -> None:
    config = RunConfig.from_dict({"training": {"batch_size": 256}, "activations": {"buffer_tokens": 2048}})
    config = config.replace({"activations.sequences_per_forward": 8})
    with build_stream(config, CPU, context_tokens=20) as stream:
        batches = [next(stream) for _ in range(8)]
        heldout = stream.heldout(512)
        assert stream.d_in == stream.d_out == batches[0].source.shape[1]
        assert [len(b) for b in heldout] == [256, 256]
        assert stream.heldout_sinks() is not None
        assert all(torch.isfinite(b.source).all() and torch.isfinite(b.target).all() for b in batches)
        text = "".join(stream.decode_tokens(batches[0].tokens.tolist()))
        assert len(text) > 256
