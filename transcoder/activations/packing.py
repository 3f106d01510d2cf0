"""Documents packed into sequences of one length, and the cursor from which packing goes on exactly."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from transcoder.activations.documents import (
    RECORD_BLOCK_LENGTH,
    DataError,
    Document,
    Reader,
    RecordSource,
    Unusable,
    reasons_in_words,
    reasons_of,
)
from transcoder.activations.vocabulary import Ids, Vocabulary

logger = logging.getLogger(__name__)

_UNKNOWN = 2**62
"""Stands for the documents of the tokens that a saved cursor carried."""
_IDS_A_CHARACTER = 4
"""A tokenizer that falls back to bytes makes at most this many ids of one character of UTF-8."""


@dataclass(frozen=True)
class Packed:
    """S packed sequences.

    Fields:
        tokens: [S, L] int64.
        valid: [S, L] bool, False on padding (only the end of a finite set is ever padded).
        ids: [S] int64, see `sequence_ids`.
        documents: [S, L] int64, the place in the stream of each token's document (of BOS: the next token's), -1 on padding,
            2^62 where a resumed cursor does not know it.
        first_sequence: the number of row 0 among all sequences packed so far.
    """

    tokens: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    ids: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]
    first_sequence: int


def sequence_ids(tokens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """[S] int64 ids, at least 0, of sequences [S, L]: 63 bits of a hash (BLAKE2b) of each one's token ids.

    The same text gets the same id in every epoch, run and machine; two different texts share one with a chance
    of 2^-63 a pair.
    """
    digests = b"".join(hashlib.blake2b(row.tobytes(), digest_size=8).digest() for row in tokens.astype("<i8"))
    return (np.frombuffer(digests, dtype="<u8") >> np.uint64(1)).astype(np.int64)


class Packer:
    """Concatenates documents and cuts them into sequences of BOS + (length - 1) tokens.

    A document ends in the tokenizer's EOS (its BOS where it has no EOS), so that neighbours in one sequence
    are told apart; a sequence that goes on in the middle of a document begins with BOS as well. Attention
    crosses document borders inside a sequence and positions count from the sequence's start: what language
    models are pre-trained on. Nothing is dropped: an epoch's last sequence is filled up with the epoch's first
    tokens, so that every epoch is cut into the same sequences, with the same ids.

    Args:
        source: the documents.
        vocabulary: turns them into ids.
        length: tokens of a sequence, BOS included.
        prepend_bos: whether a sequence begins with BOS.
        keep: which documents to take (training and evaluation see disjoint ones).
        eos_as_bos: whether EOS may be the BOS of a tokenizer that has none.
        rows: each document is a sequence of its own, see `activations.keep_rows`.
    """

    def __init__(
        self,
        source: RecordSource,
        vocabulary: Vocabulary,
        length: int,
        prepend_bos: bool,
        keep: Callable[[Document], bool],
        eos_as_bos: bool = False,
        rows: bool = False,
    ) -> None:
        if prepend_bos and (vocabulary.bos_id is None or (vocabulary.bos_stands_in and not eos_as_bos)):
            other = "" if vocabulary.eos_id is None else ", or activations.eos_as_bos to true to begin with its EOS"
            raise DataError(
                f"activations.prepend_bos: this model's tokenizer has no BOS token; set it to false{other}"
                if vocabulary.has_tokenizer
                else "activations.prepend_bos: the model has no tokenizer, so no BOS is known; set it to false"
            )
        self._source, self._vocabulary, self._length, self._keep = source, vocabulary, length, keep
        self._bos = vocabulary.bos_id if prepend_bos else None
        known = [i for i in (vocabulary.eos_id, vocabulary.bos_id) if i is not None and i < vocabulary.size]
        self._separator = known[0] if known else None
        self._told_bos = False
        self._reader: Reader | None = None
        self._rows = rows
        self._body = length - prepend_bos
        self._rest: Ids = np.empty(0, np.int32)
        self._rest_documents = np.empty(0, np.int64)
        """The document of each id of the rest."""
        self._head: Ids = np.empty(0, np.int32)
        """The epoch's first tokens, as many as a sequence takes."""
        self._head_documents = np.empty(0, np.int64)
        self._epoch = self._sequences = self._documents = self._cut = 0
        self._skipped_before: dict[str, int] = {}
        """{why: records skipped for it} in the epochs before this one."""
        self._lost_before = 0
        self._epoch_tokens = 0

    def pack(self, sequences: int, repeat: bool = True) -> Packed | None:
        """The next `sequences` sequences.

        With `repeat` the documents begin again when they end; without it the last sequences are padded (with
        the pad id, else 0) and, once nothing is left, the answer is None.

        Raises:
            DataError: a whole epoch without a usable document.
        """
        found = self._whole_rows(sequences, repeat) if self._rows else self._cut_text(sequences, repeat)
        if found is None:
            return None
        tokens, documents = found
        valid = documents >= 0
        if self._bos is not None and not self._rows:
            tokens = np.concatenate([np.full((len(tokens), 1), self._bos, np.int64), tokens], 1)
            valid = np.concatenate([np.ones((len(valid), 1), np.bool_), valid], 1)
            documents = np.concatenate([documents[:, :1], documents], 1)
        packed = Packed(tokens, valid, sequence_ids(tokens), documents, self._sequences)
        self._sequences += len(tokens)
        return packed

    def _cut_text(self, sequences: int, repeat: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """(ids, documents), each [S, body], of documents one after another."""
        wanted = sequences * self._body
        parts, documents, have = [self._rest], [self._rest_documents], len(self._rest)
        while have < wanted:
            found = self._next(repeat)
            if found is None:
                break
            parts.append(found[0])
            documents.append(found[1])
            have += len(found[0])
        flat, of = np.concatenate(parts), np.concatenate(documents)
        taken = min(wanted, have)
        if taken == 0:
            return None
        tokens, places = self._blank(-(-taken // self._body), self._body)
        tokens.reshape(-1)[:taken], places.reshape(-1)[:taken] = flat[:taken], of[:taken]
        # Copies: views would keep every document of this pass alive in the saved cursors.
        self._rest, self._rest_documents = flat[taken:].copy(), of[taken:].copy()
        return tokens, places

    def _whole_rows(self, sequences: int, repeat: bool) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
        """(ids, documents), each [S, length], of documents that are a sequence each."""
        tokens, places = self._blank(sequences, self._length)
        for row in range(sequences):
            found = self._next(repeat)
            if found is None:
                return (tokens[:row], places[:row]) if row else None
            ids, index = found[0], int(found[1][0])
            if self._bos is not None and ids[0] != self._bos:
                ids = np.insert(ids, 0, self._bos)
            if len(ids) > self._length:
                if not self._cut:
                    logger.warning(
                        "activations.keep_rows: rows of more than sequence_length = %d tokens are cut to it, such as record %d "
                        "of %d tokens", self._length, index, len(ids),
                    )  # fmt: skip
                self._cut += 1
                ids = ids[: self._length]
            tokens[row, : len(ids)], places[row, : len(ids)] = ids, index
        return tokens, places

    def _blank(self, rows: int, length: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        pad = self._vocabulary.pad_id
        # Many users add a padding token to the tokenizer and no row to the embedding.
        pad = pad if pad is not None and pad < self._vocabulary.size else 0
        return np.full((rows, length), pad, np.int64), np.full((rows, length), -1, np.int64)

    def _next(self, repeat: bool) -> tuple[Ids, npt.NDArray[np.int64]] | None:
        """(ids, their document's place) of the next kept document, its separator included; None at the end of the only
        epoch."""
        while True:
            if self._reader is None:
                self._reader = Reader(self._source)
            for document in self._reader:
                if not self._keep(document):
                    continue
                ids = self._ids(document, self._reader)
                if len(ids):
                    self._epoch_tokens += len(ids)
                    of = np.full(len(ids), document.index, np.int64)
                    if (missing := self._body - len(self._head)) > 0 and not self._rows:
                        self._head = np.concatenate([self._head, ids[:missing]])
                        self._head_documents = np.concatenate([self._head_documents, of[:missing]])
                    return ids, of
            if not repeat:
                return None
            if self._epoch_tokens == 0:
                raise DataError(
                    "activations.dataset: a whole pass over the data gave no usable document "
                    f"({reasons_in_words(self._reader.reasons)}; held-out documents do not train): check dataset, "
                    "text_column and heldout_fraction"
                )
            self._skipped_before, self._lost_before = self.skipped(), self.lost_bytes
            # np.resize repeats: data shorter than one sequence go round in it.
            size = 0 if self._rows else -self._epoch_tokens % self._body
            filling = np.resize(self._head, size), np.resize(self._head_documents, size)
            self._epoch += 1
            self._epoch_tokens = 0
            self._head, self._head_documents = np.empty(0, np.int32), np.empty(0, np.int64)
            self._reader = None
            if size:
                return filling

    def _ids(self, document: Document, reader: Reader) -> Ids:
        """A document's ids as they are packed; none where it cannot be used, which the reader counts."""
        try:
            ids = self._vocabulary.encode(document)
        except Unusable as error:
            reader.skip(str(error))
            return np.empty(0, np.int32)
        if self._bos is not None and len(ids) and ids[0] == self._bos and not self._rows and not self._told_bos:
            self._told_bos = True
            logger.warning(
                "%s begins with BOS already, and sequences are given one more: for rows made as sequences set "
                "activations.keep_rows to true, for others activations.prepend_bos to false",
                document.name,
            )
        if document.ends:
            self._documents += 1
            if self._separator is not None and len(ids) and ids[-1] != self._separator and not self._rows:
                ids = np.append(ids, np.int32(self._separator))
        return ids

    @property
    def epoch(self) -> int:
        """Whole passes over the data so far."""
        return self._epoch

    def skipped(self) -> dict[str, int]:
        """{why: records skipped for it so far}."""
        return dict(Counter(self._skipped_before) + Counter(self._reader.reasons if self._reader else {}))

    @property
    def lost_bytes(self) -> int:
        """Bytes of texts that were no UTF-8 and are left out, so far."""
        return self._lost_before + (self._reader.lost_bytes if self._reader else 0)

    def counts(self) -> dict[str, int]:
        """Numbers so far: documents, skipped_documents, epochs, sequences; cut_rows and lost_bytes where there are some."""
        return {
            "documents": self._documents,
            "skipped_documents": sum(self.skipped().values()),
            "epochs": self._epoch,
            "sequences": self._sequences,
            **{name: n for name, n in (("cut_rows", self._cut), ("lost_bytes", self.lost_bytes)) if n},
        }

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the last sequence: JSON values and the ids that are read but not packed yet."""
        return {
            "reader": None if self._reader is None else self._reader.state(),
            "rest": torch.from_numpy(self._rest.copy()),
            "head": torch.from_numpy(self._head.copy()),
            "epoch_tokens": self._epoch_tokens,
            "skipped_before": dict(self._skipped_before),
            "lost_before": self._lost_before,
            "skipped_reasons": self.skipped(),
            **self.counts(),
        }

    def state_bytes_at_most(self) -> int:
        """Bytes that the tensors of `state_dict` can take: what one document, or one block of a long one, leaves
        over, and an epoch's head. Text is taken to give at most 4 ids a character (bytes of UTF-8)."""
        block = RECORD_BLOCK_LENGTH * _IDS_A_CHARACTER + 1
        return (block + self._body) * np.dtype(np.int32).itemsize

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reader = None if state["reader"] is None else Reader(self._source, state["reader"])
        self._rest, self._head = (state[n].cpu().numpy().astype(np.int32, copy=True) for n in ("rest", "head"))
        self._rest_documents, self._head_documents = (
            np.full(len(n), _UNKNOWN, np.int64) for n in (self._rest, self._head)
        )
        self._documents, self._sequences = int(state["documents"]), int(state["sequences"])
        self._cut, self._lost_before = int(state.get("cut_rows", 0)), int(state.get("lost_before", 0))
        self._epoch, self._epoch_tokens = int(state["epochs"]), int(state["epoch_tokens"])
        self._skipped_before = reasons_of(state["skipped_before"])
