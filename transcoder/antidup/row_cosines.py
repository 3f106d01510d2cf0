"""Cosines of a dictionary's rows with their nearest other row: the search, its quantiles, and those of random rows."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from transcoder.kernels import nearest_cpp

TILE_ROWS = 1024
MOST_ROWS = 8192
"""Rows whose nearest neighbour is searched for, evenly spread over the dictionary: all pairs of 131,072 rows would take longer
than the steps between two reports."""
QUANTILES = {"median": 0.5, "p99": 0.99, "p999": 0.999}


@torch.no_grad()
def cosine_tail(rows: Tensor) -> dict[str, float] | None:
    """Median, 99th and 99.9th percentile over latents of max_{j != i} cos(w_i, w_j), in tiles; beyond `MOST_ROWS` latents over
    so many of them, each against all others. None below two latents.

    Equivalent to: `u = F.normalize(W, dim=1); c = u @ u.T; c.fill_diagonal_(-1);
    c.max(1).values.quantile(...)`.

    Args:
        rows: [d_sae, d], a latent's direction each: the decoder, or the encoder.
    """
    if rows.shape[0] < 2:
        return None
    unit = torch.nn.functional.normalize(rows.detach().float(), dim=1)
    total = unit.shape[0]
    some = torch.arange(min(total, MOST_ROWS), device=unit.device) * total // min(total, MOST_ROWS)
    best = nearest_cpp.nearest(unit, some)
    if best is None:
        best = torch.cat([nearest_rows(unit, part, TILE_ROWS)[0] for part in some.split(TILE_ROWS)])
    ordered = best.sort().values

    # torch.quantile refuses more than 16M values; the nearest rank needs no interpolation.
    return {name: float(ordered[round(q * (ordered.numel() - 1))]) for name, q in QUANTILES.items()}


def cosine_work(rows: Tensor) -> float:
    """Multiply-adds of `cosine_tail`."""
    return float(min(rows.shape[0], MOST_ROWS) * rows.numel())


def random_cosine_tail(count: int, width: int) -> dict[str, float] | None:
    """Expected `cosine_tail` of `count` independent random directions in `width` dimensions, for comparison.
    None below two.

    The angle between two has the density sin(t)^(width - 2); all of count - 1 are beyond the angle t with probability
    (1 - F(t))^(count - 1), which is the quantile q of the largest cosine at t.
    """
    if count < 2:
        return None
    if width == 1:
        return dict.fromkeys(QUANTILES, 1.0)
    angle = torch.linspace(0, math.pi, 1 << 17, dtype=torch.float64, device="cpu")
    # The middle of each interval: at the ends, sin is 0.
    middle = (angle[1:] + angle[:-1]) / 2
    within = torch.exp((width - 2) * middle.sin().log()).cumsum(0)
    within /= within[-1].clone()
    found = {}
    for name, q in QUANTILES.items():
        one = -math.expm1(math.log(q) / (count - 1))
        place = int(torch.searchsorted(within, one))
        found[name] = math.cos(float(angle[min(place + 1, angle.numel() - 1)]))
    return found


def nearest_rows(unit: Tensor, rows: Tensor, tile: int) -> tuple[Tensor, Tensor]:
    """(cosine [R], partner [R] int64): for each of `rows` [R] the largest inner product with another row of `unit` [n, d], and
    the lowest such row. Rows have unit length, n >= 2; `tile` columns of the product are made at a time.

    Equivalent to: `c = unit[rows] @ unit.T; c[arange(R), rows] = -2; c.max(1)`.
    """
    mine = unit[rows]
    best, partner = unit.new_full(rows.shape, -2.0), torch.zeros_like(rows)
    for a in range(0, unit.shape[0], tile):
        cosine = mine @ unit[a : a + tile].T
        inside = (rows >= a) & (rows < a + cosine.shape[1])
        column = torch.where(inside, rows - a, 0)[:, None]
        # A row is not its own neighbour.
        cosine.scatter_(1, column, torch.where(inside[:, None], -2.0, cosine.gather(1, column)))
        top, where = cosine.max(1)
        partner = torch.where(top > best, where + a, partner)
        best = torch.maximum(best, top)
    return best, partner
