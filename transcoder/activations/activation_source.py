"""What a stream draws from: passes of activations of every layer, with a place to go on from, and the rows of each layer."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.documents import DataError
from transcoder.activations.masking import FIT_TOKENS, SinkMasker
from transcoder.activations.rows import Chunk, Group, MakePositionChoice, Pass, RowMaker, Substitute, counters_of
from transcoder.activations.vocabulary import Vocabulary
from transcoder.config import RunConfig


class ActivationSource(ABC):
    """Passes of a language model over text, or of cached shards: the activations of every layer of a run.

    Args:
        config: section `activations` is read.
        device: where the activations lie.
        vocabulary: of the model that made the activations.
        widths: (d_in, d_out) of each layer.
        sequence_length: tokens of a sequence.
        activation_bytes: bytes of a token's source and target, of each layer.
        pad_id: id that the median norm leaves out.

    Attributes:
        holds_out: whether there are held-out data.
        pass_rows: the most rows of a layer that a pass gives.
        no_sampling: why positions cannot be sampled, or None.
    """

    holds_out: bool
    no_sampling: str | None = None

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        *,
        vocabulary: Vocabulary,
        widths: list[tuple[int, int]],
        sequence_length: int,
        activation_bytes: list[int],
        pad_id: int | None,
    ) -> None:
        section = config.activations
        self._device = device
        self.vocabulary, self.widths, self.sequence_length = vocabulary, widths, sequence_length
        self.activation_bytes = activation_bytes
        self.pass_rows = section.sequences_per_forward * sequence_length
        self.maskers = [SinkMasker(section, vocabulary.special_ids, vocabulary.size, pad_id, device) for _ in widths]
        """Of each layer: sinks differ between layers."""
        self._fitted: list[dict[str, Any]] = []

    @abstractmethod
    def identity(self, layer: int) -> dict[str, Any]:
        """JSON values that a saved cursor and this source must share, for the layer of this place in `widths`. A value that is
        a dict with "weights" is compared by those alone; the rest of it is for the message. Under "data" stands the digest of
        the text or cache (None: unknown, not compared), which `activations.allow_changed_data` lets differ."""

    @abstractmethod
    def next_pass(self) -> list[Pass]:
        """Of each layer, the next pass over the data, which begin again when they end; sinks and all."""

    @abstractmethod
    def from_start(self, heldout: bool, skip: int = 0) -> Iterator[list[Pass]]:
        """Of each layer, each pass that has held-out tokens, or else training tokens, from the start of the data to their
        end; the first `skip` of them are left out and cost nothing."""

    @abstractmethod
    def place(self) -> dict[str, Any]:
        """Where the next pass begins."""

    @abstractmethod
    def seek(self, place: dict[str, Any]) -> None:
        """Go on from a place."""

    @abstractmethod
    def progress(self, place: dict[str, Any]) -> dict[str, int]:
        """Documents, epochs and the like up to a place."""

    def trains(self, found: Pass) -> Tensor | None:
        """[T] bool: the tokens that are not held out; None: all of them."""
        return None

    def cursor_bytes_at_most(self) -> int:
        """Bytes that a cursor's tensors can take."""
        return 0

    def heldout_losses(
        self, substitutes: Mapping[str, Mapping[int, Substitute]], tokens: int
    ) -> dict[str, float] | None:
        """See `ActivationStream.heldout_losses`; of each name, the substitutes by the layer's place in `widths`. None without
        a language model."""
        return None

    def heldout_groups(self, layer: int, tokens: int, sequences: int) -> Iterator[Group]:
        """See `ActivationStream.heldout_groups`; none without a language model."""
        return iter(())

    def unembedding(self, layer: int) -> Tensor | str:
        """See `ActivationStream.unembedding`."""
        return "the run had no language model at hand"

    def set_multiple(self, layer: int, multiple: float | str | None) -> None:
        """Mask a layer's norms above this multiple of the median, unless it is `auto`."""
        if multiple != "auto":
            self.maskers[layer].multiple = None if multiple is None else float(multiple)

    def fit_masks(self, tokens: int) -> list[dict[str, Any]]:
        """Find the norm that `mask_norm_multiple: auto` masks from, of each layer, on at least `tokens` tokens from where the
        data stand, or one epoch of them; they are read again afterwards, and read once for all layers. Returns what
        `SinkMasker.fit` found."""
        if self._fitted:
            return self._fitted
        begin, seen = self.place(), 0
        found: list[list[dict[str, Tensor]]] = [[] for _ in self.maskers]
        epoch = self.progress(begin)["epochs"]
        while seen < max(tokens, FIT_TOKENS) and self.progress(self.place())["epochs"] == epoch:
            passes = self.next_pass()
            trains = self.trains(passes[0])
            for one, masker, parts in zip(passes, self.maskers, found, strict=True):
                valid = one.valid if trains is None else one.valid & trains
                parts.append(masker.candidates(one.source, one.tokens, one.positions, valid))
            seen += len(found[0][-1]["ratios"])
        self.seek(begin)
        self._fitted = [
            masker.fit(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]})
            for masker, parts in zip(self.maskers, found, strict=True)
        ]
        return self._fitted


class LayerSource:
    """The rows of one layer of a source.

    Args:
        source: shared by all layers of a run.
        layer: the layer's place in `source.widths`.
        make_sampler: see `build_stream`.
        context_tokens: width of the context windows.

    Attributes:
        identity: as `ActivationSource.identity`.
        row_bytes: bytes of a row: its activations, token id, position and sequence, its importance weight if it has one,
            and its context window.
    """

    def __init__(
        self, source: ActivationSource, layer: int, make_sampler: MakePositionChoice | None, context_tokens: int
    ) -> None:
        if make_sampler is not None and source.no_sampling is not None:
            raise DataError(source.no_sampling)
        self.source, self.layer, self.context_tokens = source, layer, context_tokens
        self.d_in, self.d_out = source.widths[layer]
        self.identity = source.identity(layer)
        self.row_bytes = row_bytes(source.activation_bytes[layer], context_tokens, make_sampler is not None)
        sampler = None if make_sampler is None else make_sampler(source.vocabulary.special_ids)
        self._rows = RowMaker(source.maskers[layer], context_tokens, sampler)

    @property
    def mask_norm_multiple(self) -> float | None:
        """Norms above this multiple of the median are masked; None: none are."""
        return self.source.maskers[self.layer].multiple

    def fit_mask(self, tokens: int) -> dict[str, Any]:
        """This layer's part of `ActivationSource.fit_masks`."""
        sinks = self.source.fit_masks(tokens)[self.layer]
        self._rows.totals |= {f"sinks_{name}": float(sinks[name]) for name in ("multiple", "share", "held")}
        return sinks

    @property
    def passes_made(self) -> int:
        """Passes made into rows for training."""
        return int(self._rows.totals["passes"])

    def chunk(self, found: Pass, trains: Tensor | None, place: dict[str, Any]) -> Chunk:
        """A pass's rows for training; `place` is behind it."""
        made = self._rows.make(found, trains, step=self.passes_made)
        return Chunk(made.rows, made.sample, self.cursor(place))

    def record(self, chunk: Chunk) -> None:
        """Told of each chunk that is taken for training."""
        self._rows.record(chunk.sample)

    def cursor(self, place: dict[str, Any]) -> dict[str, Any]:
        """A place of the source and this layer's totals up to it."""
        return {**place, "totals": dict(self._rows.totals)}

    def seek(self, cursor: dict[str, Any]) -> None:
        """Count on from a cursor."""
        self._rows.totals = {name: float(value) for name, value in cursor["totals"].items()}

    def counters(self, cursor: dict[str, Any]) -> dict[str, float]:
        """What `ActivationStream.counters` gives at a cursor."""
        return counters_of(cursor["totals"], self.source.progress(cursor))


def row_bytes(activations: int, context_tokens: int, weighted: bool) -> int:
    """Bytes of a row, see `LayerSource`."""
    fixed = 3 * torch.int64.itemsize + torch.int32.itemsize * context_tokens
    return activations + fixed + torch.float32.itemsize * weighted
