"""How close decoder directions stand, for the report."""

from __future__ import annotations

import torch
from torch import Tensor

from transcoder.kernels import nearest_cpp

TILE_ROWS = 1024
MOST_ROWS = 8192
"""Rows whose nearest neighbour is sought, evenly spread over the dictionary: all pairs of 131,072 rows would take longer than
the steps between two reports."""


@torch.no_grad()
def decoder_cosine_tail(decoder: Tensor) -> dict[str, float] | None:
    """Median, 99th and 99.9th percentile over latents of max_{j != i} cos(w_i, w_j), in tiles; beyond `MOST_ROWS` latents over
    so many of them, each against all others. None below two latents.

    Equivalent to: `u = F.normalize(W, dim=1); c = u @ u.T; c.fill_diagonal_(-1);
    c.max(1).values.quantile(...)`.

    Args:
        decoder: [d_sae, d_out].
    """
    if decoder.shape[0] < 2:
        return None
    unit = torch.nn.functional.normalize(decoder.detach().float(), dim=1)
    total = unit.shape[0]
    some = torch.arange(min(total, MOST_ROWS), device=unit.device) * total // min(total, MOST_ROWS)
    best = nearest_cpp.nearest(unit, some)
    if best is None:
        best = _nearest(unit, some)
    ordered = best.sort().values

    def quantile(q: float) -> float:
        # torch.quantile refuses more than 16M values; the nearest rank needs no interpolation.
        return float(ordered[min(ordered.numel() - 1, round(q * (ordered.numel() - 1)))])

    return {"median": quantile(0.5), "p99": quantile(0.99), "p999": quantile(0.999)}


def _nearest(unit: Tensor, some: Tensor) -> Tensor:
    """[R]: the largest cosine of each of the rows `some` [R] with another."""
    best = unit.new_full(some.shape, -1.0)
    for a in range(0, some.numel(), TILE_ROWS):
        mine = some[a : a + TILE_ROWS]
        rows = unit[mine]
        for b in range(0, unit.shape[0], TILE_ROWS):
            cosine = rows @ unit[b : b + TILE_ROWS].T
            own = mine - b
            inside = (own >= 0) & (own < cosine.shape[1])
            column = torch.where(inside, own, 0)[:, None]
            # A row is no neighbour of its own.
            cosine.scatter_(1, column, torch.where(inside[:, None], -1.0, cosine.gather(1, column)))
            best[a : a + TILE_ROWS] = torch.maximum(best[a : a + TILE_ROWS], cosine.max(1).values)
    return best
