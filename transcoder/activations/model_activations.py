"""Activations made while training runs: documents -> sequences -> one forward pass -> rows."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import re
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.activation_source import ActivationSource
from transcoder.activations.documents import (
    DataError,
    Document,
    Reader,
    RecordSource,
    Unusable,
    is_heldout,
    reasons_in_words,
)
from transcoder.activations.language_model import HookedModel
from transcoder.activations.packing import Packed, Packer
from transcoder.activations.record_sources import record_sources
from transcoder.activations.rows import Group, Pass, Substitute, grid
from transcoder.activations.vocabulary import Vocabulary
from transcoder.config import RunConfig

logger = logging.getLogger(__name__)

_LOOKED_AT = 100
"""Documents of which one must be usable at the start."""


class ModelActivations(ActivationSource):
    """Runs the language model over packed text.

    Training and evaluation read disjoint documents: the two splits of `stdlib`, or for other data a share of
    the documents chosen by a hash of their place in the stream.
    """

    def __init__(self, config: RunConfig, device: torch.device) -> None:
        self._section = section = config.activations
        # Before the model is loaded: a wrong path or an unreadable file should not cost minutes.
        self._training_source, self._heldout_source, self._fraction = record_sources(section)
        reader = Reader(self._training_source)
        first = next(reader, None)
        if first is None:
            raise self._no_document(reader)
        self._model = model = HookedModel(
            config.model.name,
            [pair.source for pair in section.pairs],
            [pair.target for pair in section.pairs],
            getattr(torch, config.model.dtype),
            device,
            config.logging.progress,
        )
        self._check_start(model.vocabulary, [first, *itertools.islice(reader, _LOOKED_AT - 1)], reader)
        longest = model.max_length
        if longest is not None and section.sequence_length > longest:
            raise DataError(
                f"activations.sequence_length: the model reads at most {longest} tokens, got {section.sequence_length}"
            )
        super().__init__(
            config,
            device,
            vocabulary=model.vocabulary,
            widths=model.widths,
            sequence_length=section.sequence_length,
            activation_bytes=model.token_bytes,
            pad_id=model.vocabulary.pad_id,
        )
        self._identity = {
            "kind": "model",
            "dtype": config.model.dtype,
            "model": {"name": Path(config.model.name).name, "weights": self._model.fingerprint()},
            "vocabulary": self.vocabulary.size,
            "sequence_length": section.sequence_length,
            "sequences_per_forward": section.sequences_per_forward,
            "prepend_bos": section.prepend_bos,
            "text": section.tokens_column is None,
            "data": self._digest(),
        }
        self.holds_out = self._fraction > 0 or self._heldout_source is not self._training_source
        self._number, self._count = 0, 1
        self._turn = threading.Lock()
        self._packer = self._pack(self._training_source, self._is_for_training)

    def part(self, number: int, count: int) -> ModelActivations:
        """The same model over every `count`-th document, from the one at place `number` on."""
        part = copy.copy(self)
        part._number, part._count = number, count
        part._identity = {**self._identity, "stream": f"{number} of {count}"}
        part._packer = part._pack(part._training_source, part._is_for_training)
        return part

    def _no_document(self, reader: Reader) -> DataError:
        return DataError(
            f"activations.dataset: {self._section.dataset!r} holds no usable document ({reasons_in_words(reader.reasons)}); "
            "lists of token ids need activations.tokens_column"
        )

    def _check_start(self, vocabulary: Vocabulary, documents: list[Document], reader: Reader) -> None:
        """What does not fit the model shows on the first documents rather than in the first pass."""
        ids = None
        for document in documents:
            try:
                ids = vocabulary.encode(document)
                break
            except Unusable as error:
                reader.skip(str(error))
        if ids is None:
            raise self._no_document(reader)
        section = self._section
        if (
            section.tokens_column
            and not section.keep_rows
            and len(ids)
            and ids[0] == vocabulary.bos_id != vocabulary.eos_id
        ):
            logger.warning(
                "activations.tokens_column: the lists begin with BOS and are packed one after another all the same; set "
                "activations.keep_rows to true to keep each as a sequence of its own"
            )

    def identity(self, layer: int) -> dict[str, Any]:
        (source, target), (d_in, d_out) = self._model.pairs[layer], self.widths[layer]
        return {**self._identity, "source_hook": source, "target_hook": target, "d_in": d_in, "d_out": d_out}

    def _digest(self) -> str | None:
        """Of the training text, and of the held-out text where that lies apart."""
        sources = dict.fromkeys((self._training_source, self._heldout_source))
        digests = [source.digest() for source in sources]
        return None if None in digests else " ".join(map(str, digests))

    def _pack(self, source: RecordSource, keep: Any) -> Packer:
        section = self._section
        return Packer(
            source,
            self.vocabulary,
            section.sequence_length,
            section.prepend_bos,
            keep,
            section.eos_as_bos,
            section.keep_rows,
        )

    def _is_for_training(self, document: Document) -> bool:
        return document.index % self._count == self._number and not is_heldout(document.index, self._fraction)

    def _is_for_evaluation(self, document: Document) -> bool:
        return self._fraction == 0 or is_heldout(document.index, self._fraction)

    def next_pass(self) -> list[Pass]:
        # Parts share the tokenizer, which one thread at a time may use.
        with self._turn:
            try:
                packed = self._packer.pack(self._section.sequences_per_forward)
            except DataError as error:
                if self._count == 1:
                    raise
                stream = f"stream {self._number} of parallel.streams = {self._count}, which has every {self._count}th document"
                raise DataError(f"{stream}: {error}") from None
            assert packed is not None  # it repeats for ever
            return self._run(packed, f"forward pass at sequence {packed.first_sequence}")

    def from_start(self, heldout: bool, skip: int = 0) -> Iterator[list[Pass]]:
        kind = "held-out" if heldout else "training"
        for number, packed in itertools.islice(enumerate(self._sequences_from_start(heldout)), skip, None):
            yield self._run(packed, f"{kind} pass {number} from the start")

    def _sequences_from_start(self, heldout: bool) -> Iterator[Packed]:
        source, keep = (
            (self._heldout_source, self._is_for_evaluation)
            if heldout
            else (self._training_source, self._is_for_training)
        )
        packer = self._pack(source, keep)
        while (packed := packer.pack(self._section.sequences_per_forward, repeat=False)) is not None:
            yield packed

    def heldout_losses(
        self, substitutes: Mapping[str, Mapping[int, Substitute]], tokens: int
    ) -> dict[str, float] | None:
        """Mean cross-entropy in nats of the first `tokens` or so held-out tokens, once for each of the `substitutes`, which
        stand at the target hooks of some layers (none: the model as it is). Sinks keep their own activations, as they do at
        inference; what is a sink is found in the source as the layer then reads it. None where the model does not predict the
        next token."""
        if self._model.without_head is not None:
            logger.warning("no cross-entropy: %s", self._model.without_head)
            return None
        totals = torch.zeros(len(substitutes), dtype=torch.float64, device=self._device)
        count, seen = 0, 0
        for packed in self._sequences_from_start(heldout=True):
            size = self._model.sequences_at_a_time(packed.tokens.shape[1])
            columns = (
                torch.from_numpy(c).to(self._device).split(size) for c in (packed.tokens, packed.valid, packed.ids)
            )
            for text, valid, ids in zip(*columns, strict=True):
                positions, _ = grid(ids, text.shape[1])
                predicted = valid[:, 1:] & valid[:, :-1]
                for n, by_layer in enumerate(substitutes.values()):
                    past_sinks = {
                        layer: self._past_sinks(layer, substitute, text, positions, valid)
                        for layer, substitute in by_layer.items()
                    }
                    losses = self._model.next_token_losses(text, past_sinks)
                    totals[n] += losses[predicted].double().sum()
                count += int(predicted.sum())
                seen += text.numel()
            if seen >= tokens:
                break
        return {name: total / max(1, count) for name, total in zip(substitutes, totals.tolist(), strict=True)}

    def heldout_groups(self, layer: int, tokens: int, sequences: int) -> Iterator[Group]:
        """See `ActivationStream.heldout_groups`."""
        if self._model.without_head is not None:
            logger.warning("no cross-entropy: %s", self._model.without_head)
            return
        special = torch.tensor(self.vocabulary.special_ids, dtype=torch.int64, device=self._device)

        def run(text: Tensor, substitute: Substitute | None) -> Tensor:
            return self._model.logits(text, {} if substitute is None else {layer: substitute})

        seen = 0
        for packed in self._sequences_from_start(heldout=True):
            # Three sets of logits and what is computed of them exist at once.
            size = min(sequences, max(1, self._model.sequences_at_a_time(packed.tokens.shape[1]) // 4))
            columns = (torch.from_numpy(c).to(self._device).split(size) for c in (packed.tokens, packed.valid))
            for text, valid in zip(*columns, strict=True):
                yield text, valid & ~torch.isin(text, special), functools.partial(run, text)
                seen += text.numel()
                if seen >= tokens:
                    return

    def unembedding(self, layer: int) -> Tensor | str:
        """As `HookedModel.unembedding`."""
        return self._model.unembedding(layer)

    def _past_sinks(
        self, layer: int, substitute: Substitute, tokens: Tensor, positions: Tensor, valid: Tensor
    ) -> Substitute:
        def run(source: Tensor, target: Tensor) -> Tensor:
            sink = self.maskers[layer].find(source, tokens.flatten(), positions, valid.flatten()).any
            return torch.where(sink[:, None], target, substitute(source, target).to(target.dtype))

        return run

    def _run(self, packed: Packed, where: str) -> list[Pass]:
        tokens = torch.from_numpy(packed.tokens).to(self._device)
        pairs = self._model.forward_pairs(tokens)
        sequences, length = packed.tokens.shape
        positions, ids = grid(torch.from_numpy(packed.ids).to(self._device), length)
        valid, documents = (torch.from_numpy(c).to(self._device).view(-1) for c in (packed.valid, packed.documents))
        return [
            Pass(
                source=source.flatten(0, 1),
                target=target.flatten(0, 1),
                tokens=tokens.view(-1),
                positions=positions,
                sequences=ids,
                valid=valid,
                shape=(sequences, length),
                where=where,
                documents=documents,
            )
            for source, target in pairs
        ]

    def cursor_bytes_at_most(self) -> int:
        return self._packer.state_bytes_at_most()

    def place(self) -> dict[str, Any]:
        return {"packer": self._packer.state_dict()}

    def seek(self, place: dict[str, Any]) -> None:
        self._packer = self._pack(self._training_source, self._is_for_training)
        self._packer.load_state_dict(place["packer"])

    def progress(self, place: dict[str, Any]) -> dict[str, int]:
        packer = place["packer"]
        reasons = {
            f"skipped_{re.sub(r'[^a-z0-9]+', '_', why.lower())}": count
            for why, count in packer.get("skipped_reasons", {}).items()
        }
        counted = ("documents", "skipped_documents", "epochs", "sequences", "cut_rows", "lost_bytes")
        return {name: int(packer[name]) for name in counted if name in packer} | reasons
