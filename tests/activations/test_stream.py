from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.activations.streams import EveryOther, drain, ids_of, same
from transcoder.activations import ActivationBatch, ActivationStream, DataError, ModelError, build_stream, pass_feed
from transcoder.activations.documents import is_heldout
from transcoder.activations.language_model import HookedModel
from transcoder.activations.pass_feed import PassFeed
from transcoder.activations.stream import layer_stream, open_source
from transcoder.config import RunConfig

CPU = torch.device("cpu")


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


def test_a_refill_finds_its_rows_waiting(build: Callable[..., ActivationStream]) -> None:
    # A refill takes 4 batches of 32 rows, so 3 passes: more than `prefetch`.
    stream = build(prefetch=1)
    next(stream)
    for _ in range(6):
        # Until the thread has nothing left to do, however busy the machine is.
        end = time.monotonic() + 10
        while (waiting := stream._feed._producer.waiting()) < 128 and time.monotonic() < end:
            time.sleep(0.005)
        # One refill's rows, and less than one pass (at most 60 rows) more.
        assert 128 <= waiting < 128 + 60
        drain(stream, 4)


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
    stream = build(dataset=str(path), tokens_column="ids", heldout_fraction=0.0, prefetch=2, mask_norm_multiple=10.0)
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
        ({"dataset": "{folder}/compressed.txt"}, DataError, "compressed.txt is damaged, or cut off"),
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


def test_passes_beyond_what_is_kept_are_not_made_from_the_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    config = RunConfig.from_dict({"training": {"batch_size": 256}, "activations": {"buffer_tokens": 2048}})
    config = config.replace({"activations.sequences_per_forward": 8, "activations.layers": [0, 1]})
    config = config.replace({"activations.mask_norm_multiple": 10.0})
    made: list[int] = []
    inner = HookedModel.forward_pairs

    def counted(self: HookedModel, tokens: Tensor) -> Any:
        made.append(len(tokens))
        return inner(self, tokens)

    monkeypatch.setattr(HookedModel, "forward_pairs", counted)

    def looked_at() -> tuple[list[list[Tensor]], int]:
        """The first six passes' rows of two layers, and how many passes that took."""
        feed = PassFeed(open_source(config, CPU), 0)
        streams = [layer_stream(feed, place, config, CPU) for place in (0, 1)]
        made.clear()
        return [[b.source for b in itertools.islice(s.passes(heldout=False), 6)] for s in streams], len(made)

    whole, passes = looked_at()
    assert passes == 6
    # Two layers, 128 inputs and outputs in fp32, 8 sequences of 128 tokens a pass: three are kept, a fourth is looked at.
    monkeypatch.setattr(pass_feed, "KEPT_BYTES", 3 * 2 * 2 * 128 * 4 * 8 * 128)
    again, passes = looked_at()
    assert passes == 4 + 3 + 3
    for one, other in zip(whole, again, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
