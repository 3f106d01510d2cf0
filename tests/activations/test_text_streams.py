"""Several streams of text: the same batches whichever process reads which streams, and each document once an epoch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.activations.streams import same
from transcoder.activations import ActivationBatch, ActivationStream, DataError
from transcoder.activations.batch import concatenate
from transcoder.activations.documents import is_heldout
from transcoder.activations.model_activations import ModelActivations
from transcoder.activations.text_streams import TextStreams
from transcoder.config import RunConfig

CPU = torch.device("cpu")


class Alone:
    """One of `count` processes whose exchanges stay with itself."""

    def __init__(self, rank: int, count: int) -> None:
        self.rank, self.count = rank, count

    def rows(self, mine: Tensor) -> Tensor:
        return mine

    def objects(self, mine: Any) -> list[Any]:
        return [mine]


def streams(config: RunConfig, rank: int = 0, count: int = 1) -> TextStreams:
    return TextStreams(ModelActivations(config, CPU), config, CPU, 6, None if count == 1 else Alone(rank, count))


@pytest.fixture
def four(make_config: Callable[..., RunConfig]) -> RunConfig:
    return make_config(prefetch=1, refill_fraction=0.4).replace({"parallel.streams": 4})


def test_any_number_of_processes_reads_the_same_batches_and_resumes_the_state(four: RunConfig) -> None:
    whole, halves = streams(four), [streams(four, rank, 2) for rank in range(2)]
    looked = whole.look_ahead(40)
    assert same(looked[1], concatenate([half.look_ahead(40)[1] for half in halves]))

    def check(parts: list[TextStreams], batches: int) -> None:
        for _ in range(batches):
            batch: ActivationBatch = next(whole)
            assert len(batch) == 32
            assert same(batch, concatenate([next(part) for part in parts]))

    check(halves, 21)
    state = whole.state_dict()
    joined = {name: stream for half in halves for name, stream in half.state_dict()["streams"].items()}
    assert joined.keys() == state["streams"].keys()
    resumed = [streams(four, rank, 4) for rank in range(4)]
    for part in resumed:
        part.load_state_dict({"streams": joined})
    check(resumed, 11)
    with pytest.raises(ValueError, match=r"parallel\.streams: expected 4, as in the saved state, got 2"):
        streams(four.replace({"parallel.streams": 2})).load_state_dict(state)
    for stream in (whole, *halves, *resumed):
        stream.close()


def test_a_stream_that_fails_takes_no_batch_from_the_others(four: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, other = streams(four), streams(four)
    assert same(next(whole), next(other))
    real, calls = ActivationStream._draw, [0]

    def draw(stream: ActivationStream) -> ActivationBatch:
        calls[0] += 1
        if calls[0] == 3:
            raise DataError("the disk is gone")
        return real(stream)

    monkeypatch.setattr(ActivationStream, "_draw", draw)
    with pytest.raises(DataError, match="the disk is gone"):
        next(whole)
    again = streams(four)
    again.load_state_dict(whole.state_dict())
    for _ in range(10):
        wanted = next(other)
        assert same(next(whole), wanted)
        assert same(next(again), wanted)
    for stream in (whole, other, again):
        stream.close()


def test_a_stream_without_documents_is_named(four: RunConfig, tmp_path: Path) -> None:
    text = tmp_path / "two.jsonl"
    text.write_text('{"text": "a b c d e f g"}\n' * 2, encoding="utf-8")
    config = four.replace({"activations.dataset": str(text), "activations.heldout_fraction": 0.0})
    with pytest.raises(DataError, match=r"stream 2 of parallel\.streams = 4, .* no usable document"):
        next(streams(config))


def test_each_document_is_of_one_stream(four: RunConfig) -> None:
    source = ModelActivations(four, CPU)
    read: list[set[int]] = []
    for number in range(4):
        part, found = source.part(number, 4), set()
        while part.progress(part.place())["epochs"] == 0:
            (one,) = part.next_pass()
            assert one.documents is not None
            found |= set(one.documents[one.valid].tolist())
        read.append(found)
    assert sorted(i for found in read for i in found) == [i for i in range(60) if not is_heldout(i, 0.2)]
