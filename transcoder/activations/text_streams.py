"""Streams of text: a run trains on the same batches in any number of processes that divides their number."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from transcoder.activations.activation_source import LayerSource
from transcoder.activations.batch import ActivationBatch, batch_of, columns_of, concatenate
from transcoder.activations.model_activations import ModelActivations
from transcoder.activations.pass_feed import PassFeed
from transcoder.activations.rows import counters_of
from transcoder.activations.stream import ActivationStream
from transcoder.config import BUFFER_TOKENS, RunConfig

T = TypeVar("T")


class Processes(Protocol):
    """The processes that share the streams: `transcoder.parallel.ranks.Ranks`."""

    rank: int
    count: int

    def rows(self, mine: Tensor) -> Tensor: ...
    def objects(self, mine: T) -> list[T]: ...


class TextStreams(ActivationStream):
    """`parallel.streams` streams. Stream n of S reads the documents whose place is n modulo S, with a packer and 1/S of the
    shuffle buffer of its own, and gives 1/S of each batch: a batch is the streams' parts in their order. What stream n gives
    depends on n, S and the seed alone.

    Held-out data and what `auto` masks are those of a run with one stream. Streams repeat their documents each at its own end.

    Args:
        source: the language model and the text.
        processes: each has S / count consecutive streams, and iterating gives its part of the batch. None: all of them.
        Others as `build_stream`.
    """

    def __init__(
        self,
        source: ModelActivations,
        config: RunConfig,
        device: torch.device,
        context_tokens: int = 0,
        processes: Processes | None = None,
    ) -> None:
        super().__init__(LayerSource(source, 0, None, context_tokens), PassFeed(source, 0), config, device)
        self._processes, self._count = processes, config.parallel.streams or 1
        rank, ranks = (0, 1) if processes is None else (processes.rank, processes.count)
        each = self._count // ranks
        buffer = max(config.activations.buffer_tokens or BUFFER_TOKENS, config.training.batch_size)
        self._streams: dict[int, ActivationStream] = {}
        for number in range(rank * each, (rank + 1) * each):
            own = config.replace(
                {
                    "training.batch_size": config.training.batch_size // self._count,
                    "training.seed": _seed(config.training.seed, number, self._count),
                    "activations.buffer_tokens": buffer // self._count,
                    "activations.mask_norm_multiple": self.mask_norm_multiple,
                }
            )
            part = source.part(number, self._count)
            feed = PassFeed(part, config.activations.prefetch)
            self._streams[number] = ActivationStream(LayerSource(part, 0, None, context_tokens), feed, own, device)
        self._totals = self._own_totals()

    def __next__(self) -> ActivationBatch:
        # A stream that fails does not take the others' part of its batch with it.
        self.ready(1)
        return concatenate([next(stream) for stream in self._streams.values()])

    def ready(self, batches: int) -> None:
        for stream in self._streams.values():
            stream.ready(batches)

    def look_ahead(self, tokens: int) -> list[ActivationBatch]:
        """As of one stream; whole batches, of all processes."""
        each = -(-tokens // self._batch_size) * (self._batch_size // self._count)
        parts = zip(*(stream.look_ahead(each) for stream in self._streams.values()), strict=True)
        mine = [concatenate(batches) for batches in parts]
        processes = self._processes
        if processes is None:
            return mine
        return [
            batch_of({name: processes.rows(value) for name, value in columns_of(batch).items()}, batch.context_anchor)
            for batch in mine
        ]

    def state_dict(self) -> dict[str, Any]:
        """Of each stream, by its number: the same in any number of processes, which call it together."""
        mine = {str(number): stream.state_dict() for number, stream in self._streams.items()}
        if self._processes is not None:
            mine = dict(itertools.chain.from_iterable(one.items() for one in self._processes.objects(_on_host(mine))))
        return {"streams": mine}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """As of one stream. Raises: ValueError also where the state is of another number of streams."""
        if len(state["streams"]) != self._count:
            raise ValueError(
                f"parallel.streams: expected {len(state['streams'])}, as in the saved state, got {self._count}"
            )
        for number, stream in self._streams.items():
            stream.load_state_dict(state["streams"][str(number)])
        self.share_counters()

    def state_bytes_at_most(self) -> int:
        return self._count * next(iter(self._streams.values())).state_bytes_at_most()

    def essential_bytes_at_most(self) -> int:
        return self._count * super().essential_bytes_at_most()

    def share_counters(self) -> None:
        """Take the counters of all streams, which `counters` then gives. All processes call it together."""
        mine = self._own_totals()
        self._totals = mine if self._processes is None else _added(self._processes.objects(mine))

    def _own_totals(self) -> tuple[dict[str, float], dict[str, int]]:
        return _added([stream.totals() for stream in self._streams.values()])

    def counters(self) -> dict[str, float]:
        """As of one stream, of all of them: sums, and epochs of the one that has done fewest. As of the last
        `share_counters`."""
        if self._processes is None:
            self._totals = self._own_totals()
        found = {name: value for name, value in super().counters().items() if name.startswith("sinks_")}
        return counters_of(*self._totals) | found

    def close(self) -> None:
        super().close()
        for stream in self._streams.values():
            stream.close()


def streams_of_text(
    config: RunConfig,
    device: torch.device,
    *,
    position_sampler: None = None,
    context_tokens: int = 0,
    processes: Processes | None = None,
) -> TextStreams:
    """As `build_stream`, of `parallel.streams` streams that `processes` share; `position_sampler` is always None."""
    return TextStreams(ModelActivations(config, device), config, device, context_tokens, processes)


def _seed(seed: int, number: int, count: int) -> int:
    digest = hashlib.blake2b(f"stream {number} of {count}, seed {seed}".encode(), digest_size=4).digest()
    return int.from_bytes(digest, "big") >> 1


def _added(parts: list[tuple[dict[str, float], dict[str, int]]]) -> tuple[dict[str, float], dict[str, int]]:
    def merged(dicts: list[Any], other: Mapping[str, Callable[[list[Any]], Any]]) -> dict[str, Any]:
        names = dict.fromkeys(itertools.chain.from_iterable(dicts))
        return {name: other.get(name, sum)([one[name] for one in dicts if name in one]) for name in names}

    return merged([t for t, _ in parts], {"sink_ratio_max": max}), merged([c for _, c in parts], {"epochs": min})


def _on_host(state: Any) -> Any:
    if isinstance(state, Tensor):
        return state.cpu()
    return {name: _on_host(value) for name, value in state.items()} if isinstance(state, dict) else state
