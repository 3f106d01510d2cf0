"""What a stream draws from: passes of activations, made into rows, with a place to go on from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.activations.masking import SinkMasker
from transcoder.activations.rows import Chunk, Group, MakePositionChoice, Pass, RowMaker, Substitute, counters_of
from transcoder.activations.vocabulary import Vocabulary
from transcoder.config import RunConfig


class ActivationSource(ABC):
    """Passes of a language model over text, or of cached shards, made into rows for training and for evaluation.

    Args:
        config: section `activations` is read.
        device: where the activations lie.
        make_sampler: see `build_stream`.
        context_tokens: width of the context windows.
        vocabulary: of the model that made the activations.
        d_in, d_out: widths of source and target.
        sequence_length: tokens of a sequence.
        activation_bytes: bytes of a token's source and target.
        pad_id: id that the median norm leaves out.

    Attributes:
        identity: JSON values that a saved cursor and this source must share. A value that is a dict with
            "weights" is compared by those alone; the rest of it is for the message. Under "data" stands the digest of the
            text or cache (None: unknown, not compared), which `activations.allow_changed_data` lets differ.
        holds_out: whether there are held-out data.
        pass_rows: the most rows that a pass gives.
        row_bytes: bytes of a row: its activations, token id, position and sequence, its importance weight if it has one,
            and its context window.
    """

    identity: dict[str, Any]
    holds_out: bool

    def __init__(
        self,
        config: RunConfig,
        device: torch.device,
        make_sampler: MakePositionChoice | None,
        context_tokens: int,
        *,
        vocabulary: Vocabulary,
        d_in: int,
        d_out: int,
        sequence_length: int,
        activation_bytes: int,
        pad_id: int | None,
    ) -> None:
        section = config.activations
        self._device, self._context_tokens = device, context_tokens
        self.vocabulary, self.d_in, self.d_out, self.sequence_length = vocabulary, d_in, d_out, sequence_length
        self.pass_rows = section.sequences_per_forward * sequence_length
        self.row_bytes = activation_bytes + 3 * torch.int64.itemsize + torch.int32.itemsize * context_tokens
        if make_sampler is not None:
            self.row_bytes += torch.float32.itemsize
        self._masker = SinkMasker(section, vocabulary.special_ids, vocabulary.size, pad_id, device)
        sampler = None if make_sampler is None else make_sampler(vocabulary.special_ids)
        self._rows = RowMaker(self._masker, context_tokens, sampler)

    @abstractmethod
    def next_pass(self) -> Pass:
        """The next pass over the data, which begin again when they end; sinks and all."""

    @abstractmethod
    def _from_start(self, heldout: bool) -> Iterator[Pass]:
        """Each pass that has held-out tokens, or else training tokens, from the start of the data to their end."""

    @abstractmethod
    def _place(self) -> dict[str, Any]:
        """Where the next pass begins."""

    @abstractmethod
    def _seek(self, place: dict[str, Any]) -> None:
        """Go on from a place."""

    @abstractmethod
    def _progress(self, place: dict[str, Any]) -> dict[str, int]:
        """Documents, epochs and the like up to a place."""

    def _trains(self, found: Pass) -> Tensor | None:
        """[T] bool: the tokens that are not held out; None: all of them."""
        return None

    def cursor_bytes_at_most(self) -> int:
        """Bytes that a cursor's tensors can take."""
        return 0

    def heldout_losses(self, substitutes: Mapping[str, Substitute | None], tokens: int) -> dict[str, float] | None:
        """See `ActivationStream.heldout_losses`; None without a language model."""
        return None

    def heldout_groups(self, tokens: int, sequences: int) -> Iterator[Group]:
        """See `ActivationStream.heldout_groups`; none without a language model."""
        return iter(())

    def unembedding(self) -> Tensor | str:
        """See `ActivationStream.unembedding`."""
        return "the run had no language model at hand"

    def produce(self) -> Chunk:
        """The next pass's rows for training."""
        found = self.next_pass()
        made = self._rows.make(found, self._trains(found), step=int(self._rows.totals["passes"]))
        return Chunk(made.rows, made.sample, self.cursor())

    def record(self, chunk: Chunk) -> None:
        """Told of each chunk that is taken for training."""
        self._rows.record(chunk.sample)

    def passes(self, heldout: bool) -> Iterator[tuple[ActivationBatch, ActivationBatch]]:
        """(rows, sinks) of the held-out data, or else of the training data, pass by pass, once from their start whatever the
        cursor; no position sampling."""
        maker = RowMaker(self._masker, self._context_tokens, None)
        for found in self._from_start(heldout):
            trains = self._trains(found)
            made = maker.make(found, None if trains is None else trains != heldout)
            yield made.rows, made.sinks

    def cursor(self) -> dict[str, Any]:
        """The place from which the next pass follows, and the totals up to it."""
        return {**self._place(), "totals": dict(self._rows.totals)}

    def seek(self, cursor: dict[str, Any]) -> None:
        """Go on from a cursor."""
        self._seek(cursor)
        self._rows.totals = {name: float(value) for name, value in cursor["totals"].items()}

    def counters(self, cursor: dict[str, Any]) -> dict[str, float]:
        """What `ActivationStream.counters` gives at a cursor."""
        return counters_of(cursor["totals"], self._progress(cursor))
