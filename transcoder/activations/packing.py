"""Documents packed into sequences of one length, and the cursor from which packing goes on exactly."""

from __future__ import annotations

import hashlib
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
    reasons_in_words,
    reasons_of,
)
from transcoder.activations.vocabulary import Ids, Vocabulary

_IDS_A_CHARACTER = 4
"""A tokenizer that falls back to bytes makes at most this many ids of one character of UTF-8."""


@dataclass(frozen=True)
class Packed:
    """S packed sequences.

    Fields:
        tokens: [S, L] int64.
        valid: [S, L] bool, False on padding (only the end of a finite set is ever padded).
        ids: [S] int64, see `sequence_ids`.
        first_sequence: the number of row 0 among all sequences packed so far.
    """

    tokens: npt.NDArray[np.int64]
    valid: npt.NDArray[np.bool_]
    ids: npt.NDArray[np.int64]
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
    """

    def __init__(
        self,
        source: RecordSource,
        vocabulary: Vocabulary,
        length: int,
        prepend_bos: bool,
        keep: Callable[[Document], bool],
    ) -> None:
        if prepend_bos and vocabulary.bos_id is None:
            raise DataError("activations.prepend_bos: the tokenizer has no BOS token; set prepend_bos to false")
        self._source, self._vocabulary, self._length, self._keep = source, vocabulary, length, keep
        self._bos = vocabulary.bos_id if prepend_bos else None
        self._separator = vocabulary.eos_id if vocabulary.eos_id is not None else vocabulary.bos_id
        self._reader: Reader | None = None
        self._body = length - prepend_bos
        self._rest: Ids = np.empty(0, np.int32)
        self._head: Ids = np.empty(0, np.int32)
        """The epoch's first tokens, as many as a sequence takes."""
        self._epoch = self._sequences = self._documents = 0
        self._skipped_before: dict[str, int] = {}
        """{why: records skipped for it} in the epochs before this one."""
        self._epoch_tokens = 0

    def pack(self, sequences: int, repeat: bool = True) -> Packed | None:
        """The next `sequences` sequences.

        With `repeat` the documents begin again when they end; without it the last sequences are padded (with
        the pad id, else 0) and, once nothing is left, the answer is None.

        Raises:
            DataError: a whole epoch without a usable document.
        """
        body = self._body
        wanted = sequences * body
        parts, have = [self._rest], len(self._rest)
        while have < wanted:
            ids = self._next_ids(repeat)
            if ids is None:
                break
            parts.append(ids)
            have += len(ids)
        flat = np.concatenate(parts)
        taken = min(wanted, have)
        if taken == 0:
            return None
        rows = -(-taken // body)
        pad = self._vocabulary.pad_id if self._vocabulary.pad_id is not None else 0
        tokens = np.full((rows, body), pad, np.int64)
        valid = np.zeros((rows, body), np.bool_)
        tokens.reshape(-1)[:taken] = flat[:taken]
        valid.reshape(-1)[:taken] = True
        # A copy: a view would keep every document of this pass alive in the saved cursors.
        self._rest = flat[taken:].copy()
        if self._bos is not None:
            tokens = np.concatenate([np.full((rows, 1), self._bos, np.int64), tokens], 1)
            valid = np.concatenate([np.ones((rows, 1), np.bool_), valid], 1)
        packed = Packed(tokens, valid, sequence_ids(tokens), self._sequences)
        self._sequences += rows
        return packed

    def _next_ids(self, repeat: bool) -> Ids | None:
        """The ids of the next kept document, its separator included; None at the end of the only epoch."""
        while True:
            if self._reader is None:
                self._reader = Reader(self._source)
            for document in self._reader:
                if not self._keep(document):
                    continue
                ids = self._vocabulary.encode(document)
                if document.ends:
                    self._documents += 1
                    if self._separator is not None and len(ids) and ids[-1] != self._separator:
                        ids = np.append(ids, np.int32(self._separator))
                if len(ids):
                    self._epoch_tokens += len(ids)
                    if len(self._head) < self._body:
                        self._head = np.concatenate([self._head, ids[: self._body - len(self._head)]])
                    return ids
            if not repeat:
                return None
            if self._epoch_tokens == 0:
                raise DataError(
                    "activations.dataset: a whole pass over the data gave no usable document "
                    f"({reasons_in_words(self._reader.reasons)}; held-out documents do not train): check dataset, "
                    "text_column and heldout_fraction"
                )
            self._skipped_before = self.skipped()
            # np.resize repeats: data shorter than one sequence go round in it.
            filling = np.resize(self._head, -self._epoch_tokens % self._body)
            self._epoch += 1
            self._epoch_tokens = 0
            self._head = np.empty(0, np.int32)
            self._reader = None
            if len(filling):
                return filling

    @property
    def epoch(self) -> int:
        """Whole passes over the data so far."""
        return self._epoch

    def skipped(self) -> dict[str, int]:
        """{why: records skipped for it so far}."""
        return dict(Counter(self._skipped_before) + Counter(self._reader.reasons if self._reader else {}))

    def counts(self) -> dict[str, int]:
        """Numbers so far: documents, skipped_documents, epochs, sequences."""
        return {
            "documents": self._documents,
            "skipped_documents": sum(self.skipped().values()),
            "epochs": self._epoch,
            "sequences": self._sequences,
        }

    def state_dict(self) -> dict[str, Any]:
        """The cursor after the last sequence: JSON values and the ids that are read but not packed yet."""
        return {
            "reader": None if self._reader is None else self._reader.state(),
            "rest": torch.from_numpy(self._rest.copy()),
            "head": torch.from_numpy(self._head.copy()),
            "epoch_tokens": self._epoch_tokens,
            "skipped_before": dict(self._skipped_before),
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
        self._documents, self._sequences = int(state["documents"]), int(state["sequences"])
        self._epoch, self._epoch_tokens = int(state["epochs"]), int(state["epoch_tokens"])
        self._skipped_before = reasons_of(state["skipped_before"])
