"""ActivationBatch: what a trainer consumes. Any iterator of these is a data source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class ActivationBatch:
    """B tokens' paired activations, shuffled over sequences, sinks already masked out.

    Fields:
        source: [B, d_in] activations that the transcoder reads.
        target: [B, d_out] activations that it predicts.
        tokens: [B] int64 token ids.
        positions: [B] int64 positions in the packed sequence, 0 is its first token.
        sequences: [B] int64 ids of the packed sequences (two tokens of one sequence share it); None if unknown. An id
            follows from the sequence's token ids alone (63 bits of a hash): the same text read again in a later
            epoch has the same id, so distinct ids count distinct sequences. Cached shards may bring ids of their own,
            which stay the same in every epoch too. Not consecutive: no index into anything.
        weights: [B] fp32 importance weights of mean about 1; None weighs every token 1.
        contexts: [B, C] int32 token ids around each token, -1 where there is none; None if unknown.
        context_anchor: the column of `contexts` that holds the token itself.
    """

    source: Tensor
    target: Tensor
    tokens: Tensor
    positions: Tensor
    sequences: Tensor | None = None
    weights: Tensor | None = None
    contexts: Tensor | None = None
    context_anchor: int = 0

    def __len__(self) -> int:
        return self.source.shape[0]


_COLUMNS = tuple(field.name for field in fields(ActivationBatch) if field.name != "context_anchor")


def columns_of(batch: ActivationBatch) -> dict[str, Tensor]:
    """The batch's tensors by field name, absent ones left out."""
    found = {name: getattr(batch, name) for name in _COLUMNS}
    return {name: value for name, value in found.items() if value is not None}


def batch_of(columns: Mapping[str, Tensor], context_anchor: int) -> ActivationBatch:
    """The batch of these columns; those not there are None."""
    return ActivationBatch(**columns, context_anchor=context_anchor)


def take_rows(batch: ActivationBatch, rows: Tensor | slice) -> ActivationBatch:
    """Rows of a batch: a copy for an index tensor, a view for a slice."""
    return batch_of({name: value[rows] for name, value in columns_of(batch).items()}, batch.context_anchor)


def concatenate(batches: Sequence[ActivationBatch]) -> ActivationBatch:
    """Batches with the same columns, one after another."""
    parts = [columns_of(b) for b in batches]
    return batch_of({name: torch.cat([p[name] for p in parts]) for name in parts[0]}, batches[0].context_anchor)
