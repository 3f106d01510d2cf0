"""Backend `cpp` of the monitor's counts (csrc/counts.cpp) and of the activation samples (csrc/samples.cpp): one pass over a
batch's entries, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend
from transcoder.kernels.sparse_codes import SparseCodes


def runs(codes: SparseCodes) -> bool:
    return codes.values.is_cpu and active_backend("cpu", "correlation") == "cpp"


def readable(codes: SparseCodes) -> Tensor:
    """The values in the layout that the C++ loops read. Raises ValueError for a wrong pattern."""
    codes.validate()
    values = codes.values.detach()
    return (values if values.dtype in (torch.float32, torch.float64) else values.float()).contiguous()


def mark_sequences(codes: SparseCodes, sequences: Tensor, weights: Tensor | None, bits: int, marks: Tensor) -> int:
    """`marks[latent * bits + hash_bits(sequences[row]) % bits] = 1` where an entry fires on a token of weight above 0, in
    place. Returns the number of pairs of entries that fire on one token, whatever its weight.

    Args:
        sequences: [B] int64.   weights: [B] or None.   bits: a power of two.   marks: [d_sae * bits] uint8.
    """
    weights = None if weights is None else weights.double().contiguous()
    pairs: int = torch.ops.transcoder_cpp.mark_sequences(
        readable(codes),
        codes.indices.contiguous(),
        codes.row_ptr.contiguous(),
        sequences.contiguous(),
        weights,
        bits,
        marks,
    )
    return pairs


def add_by_group(codes: SparseCodes, i: Tensor, j: Tensor, group: Tensor, weights: Tensor | None, sums: Tensor) -> None:
    """Add to `sums`, in place, for each pair of latents and each group of tokens: sum w, sum w z_i, sum w z_i^2, sum w z_j, sum
    w z_j^2, sum w z_i z_j.

    Args:
        i, j: [P] int64.   group: [B] int64 in [0, groups).   weights: [B] or None.   sums: [6, P, groups] float64.
    """
    weights = None if weights is None else weights.detach().double().contiguous()
    order = codes.by_latent()
    i, j, group = (part.contiguous() for part in (i, j, group))
    torch.ops.transcoder_cpp.add_by_group(
        readable(codes), order.permutation, order.rows, order.latent_ptr, i, j, group, weights, sums
    )


def pair_penalty(
    codes: SparseCodes, i: Tensor, j: Tensor, margin: float, weights: Tensor | None
) -> tuple[float, Tensor]:
    """(value, gradient [nnz] with respect to the codes' values) of `antidup.penalties.pair_penalty`.

    Args:
        i, j: [P] int64.   weights: [B] or None.
    """
    weights = None if weights is None else weights.detach().double().contiguous()
    order = codes.by_latent()
    found: tuple[float, Tensor] = torch.ops.transcoder_cpp.pair_penalty(
        readable(codes),
        order.permutation,
        order.rows,
        order.latent_ptr,
        i.contiguous(),
        j.contiguous(),
        margin,
        weights,
        codes.shape[0],
    )
    return found


def offer_samples(
    group: Tensor,
    score: Tensor,
    activation: Tensor,
    rows: Tensor,
    batch: tuple[Tensor, Tensor, Tensor | None, Tensor],
    step: int,
    window: int,
    store: Sequence[Tensor],
) -> int:
    """Offer a batch's entries to a store of the best samples of each group, in place (`antidup.sample_store.merged`).

    Args:
        group, rows: [n] int64; entries of group G are left out.   score, activation: [n] fp32, scores >= 0.
        batch: tokens, positions [B] int64, sequences [B] int64 or None, contexts [B, C] int32.
        store: score, activation, token, position, sequence, step [G, k] and context [G, k, C], contiguous.

    Returns: how many of the samples are new.
    """
    group, score, activation, rows = (part.contiguous() for part in (group, score, activation, rows))
    tokens, positions, sequences, contexts = (None if part is None else part.contiguous() for part in batch)
    new: int = torch.ops.transcoder_cpp.offer_samples(
        group, score, activation, rows, tokens, positions, sequences, contexts, step, window, *store
    )
    return new
