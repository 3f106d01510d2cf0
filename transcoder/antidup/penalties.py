"""The penalties, each as (value, gradient) of compressed codes or of the decoder.

Gradients are written out instead of left to autograd: nothing of size [P, B] or [B, d_sae] is kept for a backward pass, the
gradient's norm can be reported without a second backward pass, and sums at repeated indices run in a fixed order. Tests compare
each with autograd in float64 on the dense definition.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from transcoder.antidup.row_cosines import nearest_rows
from transcoder.antidup.running_mass import MIN_FIRINGS, POSITION_BINS, PositionMass, SinkMass
from transcoder.kernels import SparseCodes, counts_cpp, nearest_cpp
from transcoder.kernels.correlation.torch_backend import add_at

TILE_NUMBERS = 1 << 22
"""Numbers in the largest temporary (16 MiB of fp32)."""


class Penalty(NamedTuple):
    value: Tensor
    """0-dim."""
    gradient: Tensor
    """With respect to codes.values [nnz] (0 at entries that do not fire) or to the decoder [d_sae, d_out]."""
    rows: Tensor | None = None
    """[n] int64, each once: `gradient` [n, d_out] are rows of the decoder's gradient, whose other rows are 0. None: `gradient`
    has all rows."""


def _wide(x: Tensor) -> Tensor:
    x = x.detach()
    return x if x.dtype == torch.float64 else x.float()


def pair_penalty(codes: SparseCodes, i: Tensor, j: Tensor, margin: float, weights: Tensor | None = None) -> Penalty:
    """mean over pairs of relu(c_ij - margin)^2, c_ij the uncentred cosine of the two latents over this batch.

    Equivalent to: `z = codes.to_dense(); u = z[:, i]; v = z[:, j];
    (((u * v).sum(0) / (u.norm(dim=0) * v.norm(dim=0)) - margin).relu() ** 2).mean()`; a latent that fires
    nowhere in the batch has c = 0. O(B P) work in tiles; `weights` [B] weigh the tokens.

    Args:
        i, j: [P] int64, P >= 1.
    """
    if counts_cpp.runs(codes):
        value, at_entries = counts_cpp.pair_penalty(codes, i, j, margin, weights)
        return Penalty(_wide(codes.values).new_tensor(value), at_entries)
    values = _wide(codes.values)
    batch, pairs = codes.shape[0], i.numel()
    x, slot = _columns(codes, torch.cat([i, j]), values)
    w = torch.ones(batch, dtype=values.dtype, device=values.device) if weights is None else weights.to(values.dtype)
    si, sj = slot[i], slot[j]
    squared = (x.square() * w).sum(1)
    inverse = torch.where(squared > 0, squared, 1).rsqrt() * (squared > 0)
    gradient = torch.zeros_like(x)
    own = torch.zeros_like(squared)
    total = values.new_zeros(())
    step = max(1, TILE_NUMBERS // max(1, batch))
    for a in range(0, pairs, step):
        ti, tj = si[a : a + step], sj[a : a + step]
        left, right = x[ti], x[tj]
        scale = inverse[ti] * inverse[tj]
        cosine = (left * right * w).sum(1) * scale
        excess = (cosine - margin).relu()
        total = total + excess.square().sum()
        slope = 2 * excess / pairs
        add_at(gradient, ti, (slope * scale)[:, None] * right)
        add_at(gradient, tj, (slope * scale)[:, None] * left)
        add_at(own, ti, slope * cosine * inverse[ti].square())
        add_at(own, tj, slope * cosine * inverse[tj].square())
    gradient -= own[:, None] * x
    at_entries = gradient[slot[codes.indices], codes.rows()] * w[codes.rows()]
    return Penalty(total / pairs, torch.where(values > 0, at_entries, 0))


def _columns(codes: SparseCodes, latents: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """(x [n + 1, B], slot [d_sae]): the chosen latents' activations, feature-major; the last row, of all
    others, is 0."""
    n = latents.numel()
    slot = torch.full((codes.shape[1],), n, dtype=torch.int64, device=values.device)
    # Repeated latents share their first place: a minimum does not depend on the order of writes.
    slot.scatter_reduce_(0, latents, torch.arange(n, device=values.device), "amin")
    x = values.new_zeros(n + 1, codes.shape[0])
    entry = slot[codes.indices]
    x[entry, codes.rows()] = torch.where(entry < n, values, 0)
    return x, slot


def decoder_penalty(decoder: Tensor, rows: Tensor, threshold: float) -> Penalty:
    """mean over `rows` of relu(max_{j != i} cos(w_i, w_j) - threshold)^2, against the whole decoder.

    Equivalent to: `u = F.normalize(W, dim=1); c = u[rows] @ u.T; c[arange, rows] = -1;
    ((c.max(1).values - threshold).relu() ** 2).mean()`. The hinge keeps antipodal pairs and the ordinary crowding of N > d
    directions; the mean of cos^2 would not detect duplicates: its Welch floor (N - d) / (d (N - 1)) is met exactly by an
    orthonormal basis copied N / d times.

    Args:
        decoder: [d_sae, d_out].
        rows: [R] int64, distinct.

    Returns: where backend `cpp` finds the neighbours, a gradient of only the `rows` of it that are not 0.
    """
    w = _wide(decoder)
    found = nearest_cpp.nearest_above(w, rows, threshold) if nearest_cpp.runs(w) and threshold >= 0 else None
    if found is None:
        return _decoder_penalty(w, rows, threshold)
    best, partner, length = found
    value = (best - threshold).relu().square().mean()
    near = (partner >= 0).nonzero().flatten()
    best, own, other = best[near, None], rows[near], partner[near]
    mine, theirs = (w[side] / length[side, None] for side in (own, other))
    slope = 2 * (best - threshold) / rows.numel()
    at_rows = slope * (theirs - best * mine) / length[own, None]
    at_partners = slope * (mine - best * theirs) / length[other, None]
    places, slot = torch.cat([own, other]).unique(return_inverse=True)
    gradient = w.new_zeros(places.numel(), w.shape[1])
    add_at(gradient, slot, torch.cat([at_rows, at_partners]))
    return Penalty(value, gradient, places)


def _decoder_penalty(w: Tensor, rows: Tensor, threshold: float) -> Penalty:
    length = w.norm(dim=1).clamp(min=torch.finfo(w.dtype).tiny)
    unit = w / length[:, None]
    if w.shape[0] < 2:
        return Penalty(w.new_zeros(()), torch.zeros_like(w))
    mine = unit[rows]
    best, partner = nearest_rows(unit, rows, max(1, TILE_NUMBERS // rows.numel()))
    excess = (best - threshold).relu()
    slope = (2 * excess / rows.numel())[:, None]
    other = unit[partner]
    gradient = torch.zeros_like(w)
    add_at(gradient, rows, slope * (other - best[:, None] * mine) / length[rows, None])
    add_at(gradient, partner, slope * (mine - best[:, None] * other) / length[partner, None])
    return Penalty(excess.square().mean(), gradient)


def all_pairs_penalty(codes: SparseCodes) -> Penalty:
    """Mean of r_ij^2 over all ordered pairs of latents that vary in this batch.

    Equivalent to: `r = torch.corrcoef(z.T)` of the varying columns, `(r.square().sum() - n) / (n * (n - 1))`.
    By sum_ij r_ij^2 = ||Z Z^T||_F^2 over centred unit columns Z, a [B, B] matrix, built from tiles of
    columns. Every independent pair contributes 1 / (B - 1): that floor hides a thousand duplicates among
    18432 latents, so this is off by default.
    """
    values = _wide(codes.values)
    batch, d_sae = codes.shape
    ones = torch.zeros(d_sae, dtype=values.dtype, device=values.device)
    total, square = ones.clone(), ones.clone()
    add_at(total, codes.indices, values)
    add_at(square, codes.indices, values.square())
    mean = total / max(1, batch)
    spread = square - batch * mean.square()
    live = spread > 1e-6 * square
    inverse = torch.where(live, spread, 1).rsqrt() * live
    number = live.sum().to(values.dtype)
    count = (number * (number - 1)).clamp(min=1)
    scaled = values * inverse[codes.indices]
    shift = mean * inverse
    gram = values.new_zeros(batch, batch)
    step = max(1, TILE_NUMBERS // max(1, batch))
    for a in range(0, d_sae, step):
        tile = _tile(codes, scaled, a, step)
        gram += tile @ tile.T
    # Centring the columns is centring the Gram matrix over tokens, on both sides.
    gram -= gram.mean(0, keepdim=True)
    gram -= gram.mean(1, keepdim=True)
    value = ((gram.square().sum() - number) / count).clamp(min=0)
    slope = torch.zeros_like(values)
    for a in range(0, d_sae, step):
        inside = (codes.indices >= a) & (codes.indices < a + step)
        product = gram @ _tile(codes, scaled, a, step)
        slope += torch.where(inside, product[codes.rows(), torch.where(inside, codes.indices - a, 0)], 0)
    slope *= 4 / count
    along = torch.zeros_like(total)
    add_at(along, codes.indices, slope * scaled)
    gradient = (slope - along[codes.indices] * (scaled - shift[codes.indices])) * inverse[codes.indices]
    return Penalty(value, torch.where(values > 0, gradient, 0))


def _tile(codes: SparseCodes, values: Tensor, first: int, width: int) -> Tensor:
    """[B, w] dense columns first .. first + width."""
    width = min(width, codes.shape[1] - first)
    column = codes.indices - first
    inside = (column >= 0) & (column < width)
    # Entries of other tiles are sent to one unused column.
    tile = values.new_zeros(codes.shape[0], width + 1)
    tile[codes.rows(), torch.where(inside, column, width)] = torch.where(inside, values, 0)
    return tile[:, :width]


def sink_penalty(codes: SparseCodes, sink: Tensor, running: SinkMass, allowed: float) -> Penalty:
    """mean over judged latents of relu(b_i - allowed)^2, b_i the share of latent i's recent activation that falls on sinks.

    As in `position_penalty`, a latent is judged from `MIN_FIRINGS` remembered firings on, and the gradient goes through this
    batch's part of the numerator: db_i/dz = 1 / (activation on all tokens) at sinks, 0 elsewhere, that sum held constant.

    Where sinks are masked out of training there is nothing to penalise.

    Args:
        sink: [B] bool.
        running: with the batch added.
        allowed: in [0, 1).
    """
    values = _wide(codes.values)
    at_sinks, whole, firings = running.sums
    judged = (firings >= MIN_FIRINGS) & (whole > 0)
    whole = torch.where(judged, whole, 1)
    excess = (at_sinks / whole - allowed).relu() * judged
    number = judged.sum().clamp(min=1)
    slope = (2 * excess / (whole * number)).to(values.dtype)
    gradient = torch.where(sink[codes.rows()] & (values > 0), slope[codes.indices], 0)
    return Penalty(excess.square().sum() / number, gradient)


def position_penalty(codes: SparseCodes, bin_of: Tensor, running: PositionMass, floor: float) -> Penalty:
    """mean over judged latents of relu(floor - H_i), H_i the entropy of latent i's recent mass over position
    bins, in [0, 1].

    With M_ip the decayed mass of latent i in bin p and O_p the tokens that the bin offered (`running`, this
    batch included): q_ip = (M_ip / O_p) / sum_p (M_ip / O_p), H_i = -sum_p q log q / log(bins offered). Divided
    by what each bin offered, a latent that fires everywhere is flat whatever positions the batches held. One
    batch cannot tell a rare latent from a positional one (a single firing has H = 0), so a latent is judged
    from `MIN_FIRINGS` remembered firings on.

    The gradient goes through this batch's part of M: dH_i/dz_bi = -(log q_ip + 1) / (O_p sum_p' (M_ip' /
    O_p')), the denominators held constant: a latent on a single bin would otherwise sit at a stationary point.
    A batch is about a hundredth of the remembered mass and moves H by as much.

    Args:
        bin_of: [B] int64, the tokens' bins as `running.add(codes, positions)` gave them.
        running: with the batch added.
        floor: in [0, 1).
    """
    values = _wide(codes.values)
    entropy, judged, log_share, slope = running.shares()
    excess = (floor - entropy).relu() * judged
    number = judged.sum().clamp(min=1)
    slope = (log_share + 1) * slope * (excess > 0)[:, None] / number
    gradient = slope.view(-1)[codes.indices * POSITION_BINS + bin_of[codes.rows()]].to(values.dtype)
    return Penalty(excess.sum() / number, torch.where(values > 0, gradient, 0))
