"""ActivationStream: shuffled batches for training, a fixed set for evaluation, a state to resume from."""

from __future__ import annotations

import itertools
import logging
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.activation_source import ActivationSource, LayerSource
from transcoder.activations.batch import ActivationBatch, batch_of, columns_of, concatenate, take_rows
from transcoder.activations.buffer import ShuffleBuffer, permutation, to_device
from transcoder.activations.documents import DataError
from transcoder.activations.pass_feed import PassFeed
from transcoder.activations.rows import Group, MakePositionChoice, Substitute
from transcoder.config import BUFFER_TOKENS, RunConfig

logger = logging.getLogger(__name__)

_SURPLUS_PASSES = 8
"""Passes that a layer of a set may be behind another, besides what the layers hold anyway."""
_JSON_BYTES = 1 << 16
"""Room for a state's identity, counters and place in the data."""


class ActivationStream:
    """An endless iterator of `ActivationBatch`es of `training.batch_size` tokens.

    Activations stay in the type that they were made in (`model.dtype`, or the shards' type) and on the
    stream's device. Finite data repeat; `counters()["epochs"]` counts. Iterating does not touch the global
    random state.

    Attributes:
        d_in, d_out: widths of source and target.
        special_ids: ids of BOS, EOS, PAD and the tokenizer's other special tokens.
        sequence_length: tokens of a packed sequence.
        vocab_size: number of token ids.
        holds_out: whether there are held-out data.
        mask_norm_multiple: norms above this multiple of the median are masked; None: none are.
        sinks: where `auto` found that multiple, what it found, in JSON values, see `SinkMasker.fit`.
    """

    def __init__(self, source: LayerSource, feed: PassFeed, config: RunConfig, device: torch.device) -> None:
        self._source, self._feed, self._device = source, feed, device
        self._batch_size = config.training.batch_size
        self._seed = config.training.seed
        self._evaluation_tokens = config.training.evaluation_tokens
        self._allow_changed_data = config.activations.allow_changed_data
        # Of a layer set each layer's config has the number that was chosen for all.
        capacity = max(config.activations.buffer_tokens or BUFFER_TOKENS, self._batch_size)
        self._capacity, self._refill_fraction = capacity, config.activations.refill_fraction
        self.d_in, self.d_out = source.d_in, source.d_out
        shared = source.source
        self.special_ids: list[int] = shared.vocabulary.special_ids
        self.sequence_length = shared.sequence_length
        self.vocab_size, self.holds_out = shared.vocabulary.size, shared.holds_out
        self.sinks: dict[str, Any] | None = None
        if config.activations.mask_norm_multiple == "auto":
            self.sinks = source.fit_mask(config.transcoder.normalization_tokens)
            _tell_sinks(self.sinks, self.decode_tokens)
        self.mask_norm_multiple = source.mask_norm_multiple
        self._buffer = self._new_buffer()
        self._pending: list[ActivationBatch] = []
        """Rows taken from passes that found no room in the buffer, fewer than one pass gives."""
        self._peeked: deque[ActivationBatch] = deque()
        """Batches that were looked at and are due next."""
        # A layer of a set begins a pass ahead of another at most, unless they mask very different tokens.
        surplus = capacity + config.transcoder.normalization_tokens + _SURPLUS_PASSES * shared.pass_rows
        self._number = feed.join(source, self._buffer.refill_rows, surplus + self._buffer.refill_rows)
        self._cursor = feed.cursor(self._number)
        self._heldout: dict[int, tuple[list[ActivationBatch], ActivationBatch | None]] = {}

    def _new_buffer(self) -> ShuffleBuffer:
        return ShuffleBuffer(self._capacity, self._batch_size, self._refill_fraction, self._seed)

    def __iter__(self) -> ActivationStream:
        return self

    def __next__(self) -> ActivationBatch:
        return self._peeked.popleft() if self._peeked else self._draw()

    def look_ahead(self, tokens: int) -> list[ActivationBatch]:
        """The next batches, at least `tokens` tokens, without using them up: iterating gives the same objects
        again, in the same order. Do not write into them.

        They are drawn now, held outside the buffer until they are due, and part of `state_dict`.
        """
        count = -(-tokens // self._batch_size)
        while len(self._peeked) < count:
            self._peeked.append(self._draw())
        return list(itertools.islice(self._peeked, max(0, count)))

    def _draw(self) -> ActivationBatch:
        if self._buffer.needs_refill:
            self._refill()
        return self._buffer.draw()

    def _refill(self) -> None:
        have = sum(map(len, self._pending))
        barren_since: float | None = None
        while have < self._buffer.room:
            chunk = self._feed.next(self._number)
            # Rows and cursor move together: whatever interrupts this loop, the state saved describes what is
            # held.
            self._cursor = chunk.cursor
            self._source.record(chunk)
            if len(chunk.rows):
                self._pending.append(chunk.rows)
                have += len(chunk.rows)
                barren_since = None
                continue
            epochs = self.counters()["epochs"]
            barren_since = epochs if barren_since is None else barren_since
            if epochs >= barren_since + 2:
                raise DataError(
                    "activations: a whole pass over the data left no token to train on; every one was "
                    f"masked as a sink or left out by the position sampler: {self.counters()}"
                )
        self._pending = self._buffer.refill(self._pending)

    def heldout(self, tokens: int) -> list[ActivationBatch]:
        """At least `tokens` held-out non-sink tokens in shuffled batches of `training.batch_size`, the same
        ones each time.

        Fewer where the held-out data end sooner (then whole batches, or one smaller one if they do not fill
        a batch), and an empty list where nothing is held out (heldout_fraction 0 on data without a split of
        their own).

        Raises:
            DataError: something should be held out, and no document or sequence was.
        """
        if tokens not in self._heldout:
            self._heldout = {tokens: self._read_heldout(tokens)}
        return self._heldout[tokens][0]

    def passes(self, heldout: bool) -> Iterator[ActivationBatch]:
        """The held-out non-sink tokens, or else those of the training text, once from their start, in the order of the text: a
        forward pass of the language model at a time, of unequal sizes. Does not move the stream."""
        return self._feed.passes(self._number, heldout)

    def heldout_sinks(self) -> ActivationBatch | None:
        """The tokens masked out of the sequences that `heldout` read last, for metrics of their own; or None."""
        if not self._heldout:
            self.heldout(self._evaluation_tokens)
        ((_, sinks),) = self._heldout.values()
        return sinks

    def heldout_losses(self, substitutes: Mapping[str, Substitute | None], tokens: int) -> dict[str, float] | None:
        """The language model's mean cross-entropy in nats on held-out text, once for each of the `substitutes` (source
        [T, d_in], target [T, d_out]) -> [T, d_out] at the target hook, None for the model as it is; or None where there is no
        model to run (cached activations) or nothing held out."""
        source, layer = self._source.source, self._source.layer
        by_layer = {name: {} if one is None else {layer: one} for name, one in substitutes.items()}
        return source.heldout_losses(by_layer, tokens) if source.holds_out else None

    def heldout_groups(self, tokens: int, sequences: int) -> Iterator[Group]:
        """About `tokens` tokens of held-out text, at most so many sequences at a time, with the language model to run on them,
        see `Group`. None where there is no model that predicts the next token, or nothing held out."""
        source, layer = self._source.source, self._source.layer
        return source.heldout_groups(layer, tokens, sequences) if source.holds_out else iter(())

    def unembedding(self) -> Tensor | str:
        """[d_out, vocabulary] fp32, what the logits read of the target's stream, see `HookedModel.unembedding`; or the reason
        why there is none."""
        return self._source.source.unembedding(self._source.layer)

    def _read_heldout(self, tokens: int) -> tuple[list[ActivationBatch], ActivationBatch | None]:
        if tokens < 1:
            raise ValueError(f"ActivationStream.heldout: tokens: expected at least 1, got {tokens}")
        wanted = -(-tokens // self._batch_size) * self._batch_size
        if not self._source.source.holds_out:
            return [], None
        rows, sinks = self._feed.heldout(self._number, wanted)
        have = sum(map(len, rows))
        if have == 0:
            raise DataError(
                "activations.heldout_fraction: a whole pass over the data found no held-out token beyond masked "
                f"ones ({sum(len(s) for s in sinks)} masked); raise heldout_fraction or give more data"
            )
        every, masked = concatenate(rows), concatenate(sinks)
        size = min(self._batch_size, have)
        order = to_device(permutation(have, "heldout", self._seed), every.source.device)
        batches = [take_rows(every, order[i * size : (i + 1) * size]) for i in range(min(wanted, have) // size)]
        return batches, masked if len(masked) else None

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the stream depends on: the cursor behind the last consumed pass, the
        rows that wait, the buffer and the batches that were looked at. What a prefetch thread produced beyond
        is not in it and is produced again after loading.

        Tensors stay on the device and are copies.
        """
        return {
            "identity": self._identity(),
            "cursor": self._cursor,
            "pending": _copies(self._pending),
            "peeked": _copies(self._peeked),
            "buffer": self._buffer.state_dict(),
        }

    def state_bytes_at_most(self) -> int:
        """Upper bound of the bytes that `state_dict` will ever hold: a full buffer, a pass's rows that wait, the
        documents' ids read ahead, and the batches that `look_ahead` holds back now (ask after looking ahead).

        Text is taken to give at most 4 token ids a character.
        """
        rows = self._capacity + self._source.source.pass_rows + sum(map(len, self._peeked))
        return rows * self._source.row_bytes + self.essential_bytes_at_most()

    def essential_bytes_at_most(self) -> int:
        """The same without any rows: what a state takes from which the stream goes on behind the rows that it held."""
        return self._source.source.cursor_bytes_at_most() + _JSON_BYTES

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken.

        Raises:
            ValueError: the state belongs to another language model (its weights count, not where it lies),
                dtype, other hooks, widths, sequences or buffer sizes; the message
                names the first. DataError (one of them): the text or the cache changed since, and
                `activations.allow_changed_data` is off; a warning where it is on.
        """
        mine = self._identity()
        saved = dict(state["identity"])
        self._check_data(saved.pop("data", None), mine.pop("data", None))
        for name, value in mine.items():
            if not _agrees(saved.get(name), value):
                raise ValueError(
                    f"ActivationStream.load_state_dict: the saved data cursor has {name} = "
                    f"{saved.get(name)!r} and this run has {value!r}; resume with the settings that the "
                    "run was started with"
                )
        self._feed.seek(self._number, state["cursor"])
        self._cursor = state["cursor"]
        anchor = int(state["buffer"]["anchor"])
        self._pending = self._restored(state["pending"], anchor)
        self._peeked = deque(self._restored(state["peeked"], anchor))
        self._buffer = self._new_buffer()
        self._buffer.load_state_dict(state["buffer"], self._device)

    def _check_data(self, saved: str | None, mine: str | None) -> None:
        if saved is None or mine is None or saved == mine:
            return
        field = "cached_path" if self._source.identity["kind"] == "cached" else "dataset"
        changed = f"the data of activations.{field} changed since the run was started (digest {saved}, now {mine})"
        if not self._allow_changed_data:
            raise DataError(
                f"{changed}: the saved place in them would mean another one. Put the data back, start a new run with "
                "another --out, or add --activations.allow_changed_data true to go on over what is there now"
            )
        warnings.warn(f"{changed}; the run goes on over what is there now", stacklevel=3)

    def _restored(self, saved: dict[str, dict[str, Tensor]], anchor: int) -> list[ActivationBatch]:
        return [
            batch_of({name: value.to(self._device) for name, value in saved[key].items()}, anchor)
            for key in sorted(saved, key=int)
        ]

    def _identity(self) -> dict[str, Any]:
        return {**self._source.identity, "buffer_tokens": self._capacity, "batch_size": self._batch_size}

    def totals(self) -> tuple[dict[str, float], dict[str, int]]:
        """(totals of rows, counts of documents): what `counters` is made of."""
        return self._cursor["totals"], self._source.source.progress(self._cursor)

    def counters(self) -> dict[str, float]:
        """Numbers up to the last pass that the buffer took in (for `look_ahead` too): documents,
        skipped_documents and skipped_<why> for each reason, epochs, sequences, passes, tokens_seen, masked_by_id,
        masked_by_norm, masked_by_position, left_by_sampler, sink_norm_ratio (mean source norm of the masked tokens over the
        median norm) and sink_norm_ratio_max; where `auto` found the mask, sinks_multiple, sinks_share and sinks_held (shares of
        the tokens and of the squared norms).
        """
        return self._source.counters(self._cursor)

    def ready(self, batches: int) -> None:
        """Draw what the next `batches` batches take. Where that fails nothing is lost: what was drawn is due next."""
        self.look_ahead(batches * self._batch_size)

    def share_counters(self) -> None:
        """Let `counters` give those of all processes, which call this together."""

    def decode_tokens(self, ids: Sequence[int]) -> list[str]:
        """One display string for each id."""
        return self._source.source.vocabulary.decode_tokens(ids)

    def close(self) -> None:
        """The stream gives no further batch; held-out data stay readable. The prefetch thread ends with the last layer's."""
        self._feed.leave(self._number)

    def __enter__(self) -> ActivationStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tell_sinks(sinks: Mapping[str, Any], decode: Callable[[Sequence[int]], list[str]]) -> None:
    if not sinks["share"]:
        return
    said = ", ".join(
        f"{word!r} {share:.0%}" for word, share in zip(decode(sinks["ids"]), sinks["id_shares"], strict=True)
    )
    logger.warning(
        "activations.mask_norm_multiple: auto masks norms above %g times the median: %.2g %% of %d tokens, which hold %.0f %% "
        "of the squared norms (at most %.3g times the median). They are %s; %.0f %% stand at position 0",
        sinks["multiple"], 100 * sinks["share"], sinks["tokens"], 100 * sinks["held"], sinks["largest"], said,
        100 * sinks["at_position_0"],
    )  # fmt: skip


def _copies(batches: Iterable[ActivationBatch]) -> dict[str, dict[str, Tensor]]:
    return {str(i): {n: v.clone() for n, v in columns_of(batch).items()} for i, batch in enumerate(batches)}


def _agrees(saved: Any, mine: Any) -> bool:
    if isinstance(saved, dict) and isinstance(mine, dict):
        return bool(saved["weights"] == mine["weights"])
    return bool(saved == mine)


def build_stream(
    config: RunConfig,
    device: torch.device,
    *,
    position_sampler: MakePositionChoice | None = None,
    context_tokens: int = 0,
) -> ActivationStream:
    """The stream that a run's configuration describes.

    Args:
        config: sections `model`, `activations` and `training` (batch_size, seed, evaluation_tokens) are read.
        device: where the language model runs and the buffer lies.
        position_sampler: makes, from the ids of special tokens, what chooses the positions of a pass that train (see
            `PositionChoice`); None keeps all.
        context_tokens: width of the token windows that travel with every activation; 0 for none.

    Raises:
        ModelError, DataError: subclasses of ValueError, as early as it can be known: a missing folder, file,
            hub name, column, hook or shard, or one that does not fit.
    """
    source = open_source(config, device)
    return layer_stream(
        PassFeed(source, config.activations.prefetch), 0, config, device, position_sampler, context_tokens
    )


def resolved_layers(config: RunConfig) -> RunConfig:
    """`config` with the layers that `all` stands for: those of the model, or of the cache."""
    section = config.activations
    if section.layers != "all":
        return config
    if section.kind == "cached":
        from transcoder.activations.cached_activations import cached_layers

        return config.replace({"activations.layers": cached_layers(section)})
    from transcoder.activations.model_name import layer_count

    return config.replace({"activations.layers": list(range(layer_count(config.model.name)))})


def open_source(config: RunConfig, device: torch.device) -> ActivationSource:
    """The passes of all layers that a configuration describes; for a cross-layer transcoder the layers as one. Errors as
    `build_stream`."""
    if config.activations.cross_layer:
        from transcoder.activations.all_layers import AllLayers

        layers = open_source(config.replace({"activations.cross_layer": False}), device)
        return AllLayers(config, device, layers)
    if config.activations.kind == "cached":
        from transcoder.activations.cached_activations import CachedActivations

        return CachedActivations(config, device)
    from transcoder.activations.model_activations import ModelActivations

    return ModelActivations(config, device)


def layer_stream(
    feed: PassFeed,
    layer: int,
    config: RunConfig,
    device: torch.device,
    position_sampler: MakePositionChoice | None = None,
    context_tokens: int = 0,
) -> ActivationStream:
    """The stream of one layer of a source; `layer` is its place in the source, `config` the layer's own. Others as
    `build_stream`."""
    if context_tokens < 0:
        raise ValueError(f"build_stream: context_tokens: expected at least 0, got {context_tokens}")
    return ActivationStream(LayerSource(feed.source, layer, position_sampler, context_tokens), feed, config, device)
