from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from transcoder.activations import ActivationStream, DataError, build_stream
from transcoder.activations.cached_activations import cache_activations
from transcoder.activations.documents import is_heldout
from transcoder.activations.shards import write_index, write_shard
from transcoder.config import RunConfig

CPU = torch.device("cpu")
BOS, LENGTH = 2, 8
Config = Callable[..., RunConfig]


def columns(first: int, sequences: int, d_in: int = 6, d_out: int = 5) -> dict[str, Tensor]:
    """Whole sequences; the activations follow from sequence and position, so a row can be checked alone."""
    numbers = torch.arange(first, first + sequences).repeat_interleave(LENGTH)
    positions = torch.arange(LENGTH).repeat(sequences)
    tokens = 4 + (numbers * 13 + positions * 5) % 90
    tokens[positions == 0] = BOS
    base = (numbers * LENGTH + positions + 1).float()[:, None]
    return {
        "source": 1 + torch.sin(base * torch.arange(1, d_in + 1)),
        "target": torch.cos(base * torch.arange(1, d_out + 1)),
        "tokens": tokens,
        "positions": positions,
        "sequences": numbers,
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three shards of 20, 30 and 10 sequences."""
    first = 0
    for number, count in enumerate((20, 30, 10)):
        write_shard(tmp_path / f"shard_{number:03}.safetensors", **columns(first, count))
        first += count
    write_index(tmp_path, sequence_length=LENGTH, vocab_size=100, special_ids=[0, 1, BOS, 3], pad_id=0)
    return tmp_path


def config(path: Path, **activations: Any) -> RunConfig:
    section = {
        "kind": "cached",
        "cached_path": str(path),
        "sequences_per_forward": 4,
        "buffer_tokens": 64,
        "heldout_fraction": 0.2,
        "prefetch": 0,
        **activations,
    }
    return RunConfig.from_dict({"activations": section, "training": {"batch_size": 16, "evaluation_tokens": 32}})


def stream_of(path: Path, context_tokens: int = 0, sampler: Any = None, **activations: Any) -> ActivationStream:
    return build_stream(
        config(path, **activations),
        CPU,
        context_tokens=context_tokens,
        position_sampler=sampler and (lambda ids: sampler),
    )


@pytest.mark.parametrize("with_sequences", [True, False])
def test_every_row_comes_once_an_epoch_with_its_activations(tmp_path: Path, with_sequences: bool) -> None:
    every = columns(0, 40)
    for number in range(2):
        part = {name: value[number * 160 : (number + 1) * 160] for name, value in every.items()}
        if not with_sequences:
            del part["sequences"]
        write_shard(tmp_path / f"{number}.safetensors", **part)
    write_index(tmp_path, special_ids=[BOS])
    seen: Counter[bytes] = Counter()
    with stream_of(tmp_path, context_tokens=4, heldout_fraction=0.0, prefetch=1) as stream:
        while stream.counters()["epochs"] < 1:
            batch = next(stream)
            assert batch.sequences is not None
            assert batch.contexts is not None
            assert torch.equal(batch.contexts[:, batch.context_anchor], batch.tokens.to(torch.int32))
            seen.update(row.numpy().tobytes() for row in torch.cat([batch.source, batch.target], 1))
            if with_sequences:
                at = batch.sequences * LENGTH + batch.positions
                for name in ("source", "target", "tokens"):
                    assert torch.equal(getattr(batch, name), every[name][at])
        state = stream.state_dict()
        for rows in (state["buffer"]["rows"], *state["pending"].values()):
            seen.update(row.numpy().tobytes() for row in torch.cat([rows["source"], rows["target"]], 1))
        keep = every["tokens"] != BOS
        expected = Counter(row.numpy().tobytes() for row in torch.cat([every["source"], every["target"]], 1)[keep])
        assert seen == expected
        assert stream.counters()["masked_by_id"] == 40


def test_sequences_are_told_apart_without_ids(tmp_path: Path) -> None:
    for number in range(2):
        part = columns(number * 3, 3)
        del part["sequences"]
        write_shard(tmp_path / f"{number}.safetensors", **part)
    write_index(tmp_path)
    with stream_of(tmp_path, heldout_fraction=0.0, mask_bos=False, sequences_per_forward=1) as stream:
        ids = torch.cat([s for s in (next(stream).sequences for _ in range(3)) if s is not None])
    assert len(ids.unique()) == 6


def test_heldout_sequences_never_train(folder: Path) -> None:
    held = {i for i in range(60) if is_heldout(i, 0.2)}
    trained: set[int] = set()
    with stream_of(folder) as stream:
        while stream.counters()["epochs"] < 2:
            sequences = next(stream).sequences
            assert sequences is not None
            trained |= set(sequences.tolist())
        batches = stream.heldout(10_000)
        sinks = stream.heldout_sinks()
    evaluated = {int(s) for b in batches if b.sequences is not None for s in b.sequences}
    assert trained == set(range(60)) - held
    assert evaluated <= held
    assert len(evaluated) > 2
    assert sinks is not None
    assert sinks.sequences is not None
    assert set(sinks.sequences.tolist()) == held
    assert set(sinks.tokens.tolist()) == {BOS}


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize("stop", [0, 5, 31])
def test_resuming_is_bitwise(folder: Path, prefetch: int, stop: int) -> None:
    with (
        stream_of(folder, prefetch=prefetch, context_tokens=5) as stream,
        stream_of(folder, prefetch=2 - prefetch, context_tokens=5) as again,
    ):
        for _ in range(stop):
            next(stream)
        again.load_state_dict(stream.state_dict())
        for _ in range(60):
            a, b = next(stream), next(again)
            for name in ("source", "target", "tokens", "positions", "sequences", "contexts"):
                assert torch.equal(getattr(a, name), getattr(b, name))
        assert stream.counters() == again.counters()


def test_a_state_over_a_cache_that_was_written_again_is_refused(folder: Path) -> None:
    with stream_of(folder) as stream:
        next(stream)
        state = stream.state_dict()
    write_shard(folder / "shard_001.safetensors", **columns(21, 30))
    write_index(folder, sequence_length=LENGTH, vocab_size=100, special_ids=[0, 1, BOS, 3], pad_id=0)
    with stream_of(folder) as stream, pytest.raises(DataError, match=r"data of activations\.cached_path changed"):
        stream.load_state_dict(state)
    with stream_of(folder, allow_changed_data=True) as stream:
        with pytest.warns(UserWarning, match=r"activations\.cached_path changed"):
            stream.load_state_dict(state)
        next(stream)


@dataclass
class Columns:
    """Keeps odd positions."""

    shapes: set[tuple[int, ...]]

    def sample_positions(self, batch_tokens: Tensor, step: int = 0) -> Any:
        self.shapes.add(tuple(batch_tokens.shape))
        keep = (torch.arange(batch_tokens.shape[1]) % 2 == 1).expand(batch_tokens.shape)

        @dataclass
        class Sample:
            keep: Tensor
            weights: Tensor

        return Sample(keep, torch.full(batch_tokens.shape, 2.0))


def test_positions_are_sampled_from_whole_sequences(folder: Path) -> None:
    sampler = Columns(set())
    with stream_of(folder, sampler=sampler) as stream:
        for _ in range(20):
            batch = next(stream)
            assert (batch.positions % 2 == 1).all()
            assert batch.weights is not None
            assert (batch.weights == 2).all()
    assert all(shape[1] == LENGTH for shape in sampler.shapes)


def test_positions_cannot_be_sampled_from_loose_tokens(folder: Path) -> None:
    write_index(folder, vocab_size=100)
    with pytest.raises(DataError, match="no sequence_length"):
        stream_of(folder, sampler=Columns(set()))


def test_a_wrong_sequence_length_is_found(folder: Path) -> None:
    write_index(folder, vocab_size=100, sequence_length=5)
    with pytest.raises(DataError, match="positions do not run 0 to 4"):
        stream_of(folder)


def damage_index(folder: Path, **change: Any) -> None:
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, **change}))


def truncate(folder: Path) -> None:
    path = folder / "shard_001.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    path = folder / "shard_001.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def other_width(folder: Path) -> None:
    write_shard(folder / "shard_001.safetensors", **columns(20, 30, d_in=7))


def other_dtype(folder: Path) -> None:
    part = columns(20, 30)
    part["source"], part["target"] = part["source"].bfloat16(), part["target"].bfloat16()
    write_shard(folder / "shard_001.safetensors", **part)


def other_length(folder: Path) -> None:
    write_shard(folder / "shard_001.safetensors", **columns(20, 29))


def no_tokens(folder: Path) -> None:
    from safetensors.torch import save_file

    part = columns(20, 30)
    del part["tokens"]
    save_file(part, folder / "shard_001.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "shard_001.*not a whole safetensors file"),
        (cut_header, "shard_001.*not a whole safetensors file"),
        (other_width, "shard_001.*d_in 7.*the index says d_in 6"),
        (other_dtype, "shard_001.*BF16.*F32"),
        (other_length, "shard_001.*holds 232 tokens and the index says 240"),
        (no_tokens, r"shard_001.*lacks the tensor\(s\) tokens"),
        (lambda f: (f / "shard_001.safetensors").unlink(), "shard_001.*missing"),
        (lambda f: (f / "index.json").unlink(), r"no index\.json"),
        (lambda f: (f / "index.json").write_text("{"), "not an index"),
        (lambda f: (f / "index.json").write_text("[]"), "not an index"),
        (lambda f: damage_index(f, shards=[]), "names no shard"),
        (lambda f: damage_index(f, d_in="x"), "not an index"),
        (
            lambda f: damage_index(f, shards=[{"file": "../x.safetensors", "tokens": 1}]),
            "names of files in its folder, got",
        ),
        (lambda f: damage_index(f, shards=[{"file": "/etc/passwd", "tokens": 1}]), "names of files in its folder, got"),
        (lambda f: damage_index(f, special_ids=[5000]), "special_ids lie outside"),
    ],
)
def test_damage_is_named_when_the_stream_is_built(folder: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(folder)
    with pytest.raises(DataError, match=message):
        stream_of(folder)


def test_a_changed_byte_is_found_by_its_checksum(folder: Path) -> None:
    path = folder / "shard_000.safetensors"
    data = bytearray(path.read_bytes())
    data[-10] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"shard_000.*sha256"):
        stream_of(folder, prefetch=2)


def test_ids_outside_the_vocabulary_are_named(folder: Path) -> None:
    write_index(folder, vocab_size=50)
    with pytest.raises(DataError, match=r"shard_000.*\[0, 50\)"):
        stream_of(folder)


def test_the_writer_refuses_what_the_reader_could_not_use(tmp_path: Path) -> None:
    part = columns(0, 2)
    with pytest.raises(ValueError, match="one length"):
        write_shard(tmp_path / "a.safetensors", **{**part, "tokens": part["tokens"][:-1]})
    with pytest.raises(TypeError, match="both float32"):
        write_shard(tmp_path / "a.safetensors", **{**part, "source": part["source"].bfloat16()})
    with pytest.raises(ValueError, match="safetensors"):
        write_shard(tmp_path / "a.pt", **part)
    with pytest.raises(DataError, match=r"no \.safetensors"):
        write_index(tmp_path)
    write_shard(tmp_path / "a.safetensors", **part)
    write_shard(tmp_path / "b.safetensors", **columns(2, 2, d_out=9))
    with pytest.raises(DataError, match=r"b\.safetensors.*d_out 9"):
        write_index(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]


def test_what_a_model_gives_can_be_cached_and_trained_on(make_config: Config, tmp_path: Path) -> None:
    live = make_config(heldout_fraction=0.0, sequences_per_forward=4)
    index = cache_activations(live, tmp_path / "cache", tokens=1500, device=CPU, shard_tokens=640)
    described = json.loads(index.read_text())
    assert [s["tokens"] for s in described["shards"]] == [640, 640, 256]
    assert described["sequence_length"] == 16
    assert described["source_hook"] == live.activations.source_hook
    cached = live.replace({"activations.kind": "cached", "activations.cached_path": str(tmp_path / "cache")})
    with build_stream(live, CPU) as a, build_stream(cached, CPU) as b:
        assert a.special_ids == b.special_ids
        for _ in range(25):
            x, y = next(a), next(b)
            for name in ("source", "target", "tokens", "positions", "sequences"):
                assert torch.equal(getattr(x, name), getattr(y, name))
        assert a.decode_tokens(x.tokens.tolist()) == b.decode_tokens(x.tokens.tolist())


def test_what_is_held_out_of_a_cache_shares_no_document_with_what_trains(
    make_config: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "a.jsonl"
    # A token's id is its document's.
    path.write_text("".join(json.dumps({"ids": [10 + n] * (3 + n % 40)}) + "\n" for n in range(200)))
    live = make_config(dataset=str(path), tokens_column="ids", heldout_fraction=0.2)
    cache_activations(live, tmp_path / "cache", tokens=4500, device=CPU, shard_tokens=640)
    cached = live.replace({"activations.kind": "cached", "activations.cached_path": str(tmp_path / "cache")})
    with build_stream(cached, CPU) as stream:
        trained: set[int] = set()
        while stream.counters()["epochs"] < 2:
            trained |= set(next(stream).tokens.tolist())
        held = {int(token) for batch in stream.heldout(10_000) for token in batch.tokens}
    assert len(held) > 10
    assert len(trained) > 3 * len(held)
    assert not held & trained
    # The writer's own held-out documents are not there.
    assert not {token - 10 for token in held | trained if is_heldout(token - 10, 0.2)}
    assert "does not say which document" not in caplog.text


def test_a_cache_without_documents_says_that_it_holds_out_by_sequence(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with stream_of(folder):
        assert "this cache does not say which document a token is from" in caplog.text
    caplog.clear()
    with stream_of(folder, heldout_fraction=0.0):
        assert "document" not in caplog.text


def test_padding_of_kept_rows_stays_padding_in_a_cache(make_config: Config, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"ids": [5 + n % 200] * (3 + n % 9)}) + "\n" for n in range(60)))
    live = make_config(dataset=str(path), tokens_column="ids", keep_rows=True, heldout_fraction=0.0)
    cache_activations(live, tmp_path / "cache", tokens=900, device=CPU)
    cached = live.replace({"activations.kind": "cached", "activations.cached_path": str(tmp_path / "cache")})
    with build_stream(live, CPU) as a, build_stream(cached, CPU) as b:
        for _ in range(10):
            x, y = next(a), next(b)
            assert torch.equal(x.tokens, y.tokens)
            assert torch.equal(x.source, y.source)
            assert 0 not in x.tokens
