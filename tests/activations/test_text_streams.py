"""Several streams of text: the same batches whichever process reads which streams, and each document once an epoch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.activations.streams import same
from transcoder.activations import ActivationBatch
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
