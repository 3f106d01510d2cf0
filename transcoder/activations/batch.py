"""ActivationBatch: what a trainer consumes. Any iterator of these is a data source."""

from __future__ import annotations

from dataclasses import dataclass

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
