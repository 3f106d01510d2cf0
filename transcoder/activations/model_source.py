"""Activations made while training runs: documents -> sequences -> one forward pass -> rows."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.activations.documents import DataError, Document, Reader, RecordSource, is_heldout
from transcoder.activations.language_model import HookedModel
from transcoder.activations.masking import SinkMasker
from transcoder.activations.packing import Packed, Packer
from transcoder.activations.record_sources import record_sources
from transcoder.activations.rows import (
    Chunk,
    MakePositionChoice,
    Pass,
    RowMaker,
    Substitute,
    counters_of,
    grid,
    row_bytes,
)
from transcoder.config import RunConfig


class ModelSource:
    """Runs the language model over packed text; see `passes.ActivationSource`.

    Training and evaluation read disjoint documents: the two splits of `stdlib`, or for other data a share of
    the documents chosen by a hash of their place in the stream.
    """

    def __init__(
        self, config: RunConfig, device: torch.device, make_sampler: MakePositionChoice | None, context_tokens: int
    ) -> None:
        self._section = section = config.activations
        # Before the model is loaded: a wrong path or an unreadable file should not cost minutes.
        self._training_source, self._heldout_source, self._fraction = record_sources(section)
        reader = Reader(self._training_source)
        first = next(reader, None)
        if first is None:
            raise DataError(
                f"activations.dataset: {section.dataset!r} holds no usable document ({reader.skipped} records were skipped as "
                "empty, binary or not UTF-8); text must be plain UTF-8, JSONL or Parquet"
            )
        self._model = HookedModel(
            config.model.name,
            section.source_hook,
            section.target_hook,
            getattr(torch, config.model.dtype),
            device,
            config.logging.progress,
        )
        self.d_in, self.d_out, self.vocabulary = self._model.d_in, self._model.d_out, self._model.vocabulary
        self.vocabulary.encode(first)  # ids of another vocabulary show here rather than in the first pass
        self.sequence_length = section.sequence_length
        longest = self._model.max_length
        if longest is not None and section.sequence_length > longest:
            raise DataError(
                f"activations.sequence_length: the model reads at most {longest} tokens, got {section.sequence_length}"
            )
        self.identity: dict[str, Any] = {
            "kind": "model",
            "dtype": config.model.dtype,
            "model": {"name": Path(config.model.name).name, "weights": self._model.fingerprint()},
            "source_hook": section.source_hook,
            "target_hook": section.target_hook,
            "d_in": self.d_in,
            "d_out": self.d_out,
            "vocabulary": self.vocabulary.size,
            "sequence_length": section.sequence_length,
            "sequences_per_forward": section.sequences_per_forward,
            "prepend_bos": section.prepend_bos,
            "text": section.tokens_column is None,
            "data": self._digest(),
        }
        self.holds_out = self._fraction > 0 or self._heldout_source is not self._training_source
        self._device, self._context_tokens = device, context_tokens
        self.row_bytes = row_bytes(self._model.token_bytes, make_sampler is not None, context_tokens)
        self.pass_rows = section.sequences_per_forward * section.sequence_length
        self._masker = SinkMasker(
            section, self.vocabulary.special_ids, self.vocabulary.size, self.vocabulary.pad_id, device
        )
        sampler = None if make_sampler is None else make_sampler(self.vocabulary.special_ids)
        self._rows = RowMaker(self._masker, context_tokens, sampler)
        self._packer = self._pack(self._training_source, self._trains)

    def _digest(self) -> str | None:
        """Of the training text, and of the held-out text where that lies apart."""
        sources = dict.fromkeys((self._training_source, self._heldout_source))
        digests = [source.digest() for source in sources]
        return None if None in digests else " ".join(map(str, digests))

    def _pack(self, source: RecordSource, keep: Any) -> Packer:
        return Packer(source, self.vocabulary, self._section.sequence_length, self._section.prepend_bos, keep)

    def _trains(self, document: Document) -> bool:
        return not is_heldout(document.index, self._fraction)

    def _evaluates(self, document: Document) -> bool:
        return self._fraction == 0 or is_heldout(document.index, self._fraction)

    def produce(self) -> Chunk:
        """The next forward pass's rows."""
        made = self._rows.make(self.next_pass(), step=int(self._rows.totals["passes"]))
        return Chunk(made.rows, made.sample, self.cursor())

    def record(self, chunk: Chunk) -> None:
        self._rows.record(chunk.sample)

    def next_pass(self) -> Pass:
        """The next forward pass, sinks and all."""
        packed = self._packer.pack(self._section.sequences_per_forward)
        assert packed is not None  # it repeats for ever
        return self._run(packed, f"forward pass at sequence {packed.first_sequence}")

    def heldout_passes(self) -> Iterator[tuple[ActivationBatch, ActivationBatch]]:
        """(rows, sinks) of each forward pass over the held-out documents, once; no position sampling."""
        packer = self._pack(self._heldout_source, self._evaluates)
        maker = RowMaker(self._masker, self._context_tokens, None)
        number = 0
        while (packed := packer.pack(self._section.sequences_per_forward, repeat=False)) is not None:
            made = maker.make(self._run(packed, f"held-out pass {number}"))
            yield made.rows, made.sinks
            number += 1

    def heldout_losses(self, substitutes: Mapping[str, Substitute | None], tokens: int) -> dict[str, float]:
        """Mean cross-entropy in nats of the first `tokens` or so held-out tokens, once for each of the `substitutes` at the
        target hook (None: the model as it is). Sinks keep their own activations, as they do at inference."""
        packer = self._pack(self._heldout_source, self._evaluates)
        totals = torch.zeros(len(substitutes), dtype=torch.float64, device=self._device)
        count, seen = 0, 0
        while seen < tokens:
            packed = packer.pack(self._section.sequences_per_forward, repeat=False)
            if packed is None:
                break
            size = self._model.sequences_at_a_time(packed.tokens.shape[1])
            columns = (
                torch.from_numpy(c).to(self._device).split(size) for c in (packed.tokens, packed.valid, packed.ids)
            )
            for text, valid, ids in zip(*columns, strict=True):
                positions, _ = grid(ids, text.shape[1])
                predicted = valid[:, 1:] & valid[:, :-1]
                for n, substitute in enumerate(substitutes.values()):
                    past_sinks = None if substitute is None else self._past_sinks(substitute, text, positions, valid)
                    losses = self._model.next_token_losses(text, past_sinks)
                    totals[n] += losses[predicted].double().sum()
                count += int(predicted.sum())
                seen += text.numel()
        return {name: total / max(1, count) for name, total in zip(substitutes, totals.tolist(), strict=True)}

    def unembedding(self) -> Tensor | str:
        """As `HookedModel.unembedding`."""
        return self._model.unembedding()

    def _past_sinks(self, substitute: Substitute, tokens: Tensor, positions: Tensor, valid: Tensor) -> Substitute:
        def run(source: Tensor, target: Tensor) -> Tensor:
            sink = self._masker.find(source, tokens.flatten(), positions, valid.flatten()).any
            return torch.where(sink[:, None], target, substitute(source, target).to(target.dtype))

        return run

    def _run(self, packed: Packed, where: str) -> Pass:
        tokens = torch.from_numpy(packed.tokens).to(self._device)
        source, target = self._model.forward(tokens)
        sequences, length = packed.tokens.shape
        positions, ids = grid(torch.from_numpy(packed.ids).to(self._device), length)
        valid = torch.from_numpy(packed.valid).to(self._device).view(-1)
        return Pass(
            source.flatten(0, 1),
            target.flatten(0, 1),
            tokens.view(-1),
            positions,
            ids,
            valid,
            (sequences, length),
            where,
        )

    def cursor(self) -> dict[str, Any]:
        return {"packer": self._packer.state_dict(), "totals": dict(self._rows.totals)}

    def cursor_bytes_at_most(self) -> int:
        return self._packer.state_bytes_at_most()

    def seek(self, cursor: dict[str, Any]) -> None:
        self._packer = self._pack(self._training_source, self._trains)
        self._packer.load_state_dict(cursor["packer"])
        self._rows.totals = {name: float(value) for name, value in cursor["totals"].items()}

    def counters(self, cursor: dict[str, Any]) -> dict[str, float]:
        names = ("documents", "skipped_documents", "epochs", "sequences")
        return counters_of(cursor["totals"], {name: int(cursor["packer"][name]) for name in names})
