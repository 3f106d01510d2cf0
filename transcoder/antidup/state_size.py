"""How large the saved state of a streaming correlation can become."""

from __future__ import annotations

from transcoder.kernels import FeatureCorrelation
from transcoder.kernels.correlation.tracked_pairs import MAX_WATCHED

_NUMBERS_BYTES = 1024
"""Room for the numbers of a state that are no tensors, as text."""
_WATCHED_BYTES = 88
"""A watched pair: two latents, the weight, three sums of each latent, the product and the joint count, 8 bytes each."""


def correlation_state_bytes(part: FeatureCorrelation, batch_tokens: int, entries_per_token: int) -> int:
    """Upper bound of the bytes in `part.state_dict()`, however long the stream.

    Args:
        batch_tokens, entries_per_token: of the largest update; the ring of a sketch keeps codes, up to a batch
            more than `ring_tokens`.
    """
    moments = 8 * (2 + 3 * part.d_sae)
    if part.sketch_dim is None:
        # float64 products; counts in int32, int64 once they could overflow, float64 where they decay. A state
        # that lists pairs is written only where it is smaller.
        return moments + 16 * max(1, part.d_sae * (part.d_sae - 1) // 2) + _NUMBERS_BYTES
    tokens = part.ring_tokens + batch_tokens
    # A token's row_ptr and weight take 8 bytes each, and every update's row_ptr has one place more than tokens;
    # an entry takes 4 bytes of latent and at most 8 of value.
    ring = tokens * (24 + 12 * entries_per_token)
    # Statistics with a half-life watch nothing.
    watched = min(MAX_WATCHED, part.d_sae * (part.d_sae - 1) // 2) if part.halflife is None else 0
    return moments + 4 * part.sketch_dim * (part.d_sae + 1) + ring + _WATCHED_BYTES * watched + _NUMBERS_BYTES
