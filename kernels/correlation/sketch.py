"""Correlation of very wide dictionaries: a random-sign sketch proposes pairs, a ring of recent codes decides
them.

S_i = sum_t w_t z_ti r_t with r_t in {+1, -1}^m from a counter keyed by (seed, rank, step, token), so that no
sign serves two tokens and sketches of different ranks or blocks add up. Inner products of rows of S are
unbiased for those of the latents (Alon, Matias, Szegedy 1996; Achlioptas 2003). Subtracting mean_i * S_0 with
S_0 = sum_t w_t r_t centres the latents. Divided by the sketch's own norms, an estimated correlation c has
standard deviation (1 - c^2) / sqrt(m).
"""

from __future__ import annotations

import dataclasses
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.checks import FLOATS
from transcoder.kernels.codes import SparseCodes
from transcoder.kernels.correlation.counter import signs
from transcoder.kernels.correlation.inputs import NAME
from transcoder.kernels.correlation.moments import Moments, PairStatistics, pair_statistics
from transcoder.kernels.correlation.saved import check_fields, check_tensor, refuse
from transcoder.kernels.correlation.sign_ranges import SignRange, from_tensor, to_tensor, union
from transcoder.kernels.correlation.torch_backend import (
    Entries,
    add_at,
    entries_of,
    pair_pages,
    pair_products,
)

TILE_ROWS = 2048
"""Rows of S multiplied with all others at a time: a [2048, d_sae] fp32 tile is 8 GiB at 2^20 latents, so
columns tile too."""
TILE_COLUMNS = 8192
MAX_CANDIDATES = 1_000_000
"""Pairs that the ring is asked to decide; the highest estimates win."""


@dataclass(frozen=True, eq=False)
class _Recent:
    """One update's codes, compact."""

    latent: Tensor
    """[nnz] int32."""
    value: Tensor
    """[nnz], the codes' own dtype."""
    row_ptr: Tensor
    weight: Tensor | None
    """[B] float64 or None."""

    @property
    def tokens(self) -> int:
        return self.row_ptr.numel() - 1


class Sketch:
    """S [d_sae, m] fp32 and the ring of recent codes."""

    def __init__(self, d_sae: int, dim: int, ring_tokens: int, device: torch.device) -> None:
        self.d_sae, self.dim, self.ring_tokens = d_sae, dim, ring_tokens
        self.rows = torch.zeros(d_sae, dim, dtype=torch.float32, device=device)
        self.ones = torch.zeros(dim, dtype=torch.float32, device=device)
        """The sketch of the constant 1."""
        self.signs: list[SignRange] = []
        """Whose signs are in the sums."""
        self.ring: deque[_Recent] = deque()

    def add(
        self, entries: Entries, codes: SparseCodes, scaled: Tensor | None, plain: Tensor | None, *keys: int
    ) -> None:
        """`scaled` [B] are the weights that the entries carry (decay included), `plain` [B] those without
        decay."""
        r = signs(codes.shape[0], self.dim, codes.device, *keys)
        add_at(self.rows, entries.latent, entries.weighted.float()[:, None] * r[entries.row])
        self.ones += r.sum(0) if scaled is None else scaled.float() @ r
        self.remember(codes, plain)

    def remember(self, codes: SparseCodes, plain: Tensor | None) -> None:
        """Add the codes to the ring; the oldest leave it."""
        # Copies: a caller may fill its buffers again.
        weight = None if plain is None else plain.clone()
        recent = _Recent(codes.indices.int(), codes.values.detach().clone(), codes.row_ptr.clone(), weight)
        self.ring.append(recent)
        self._trim()

    def _trim(self) -> None:
        held = sum(part.tokens for part in self.ring)
        while len(self.ring) > 1 and held - self.ring[0].tokens >= self.ring_tokens:
            held -= self.ring.popleft().tokens

    def forget(self, latents: Tensor) -> None:
        """As if these latents had never fired, in the rows and in the ring."""
        self.rows.index_fill_(0, latents, 0)
        gone = torch.zeros(self.d_sae, dtype=torch.bool, device=self.rows.device)
        gone.index_fill_(0, latents, True)
        for part in self.ring:
            part.value.masked_fill_(gone[part.latent], 0)

    def scale(self, factor: float) -> None:
        self.rows *= factor
        self.ones *= factor

    def merge(self, other: Sketch, scale: float) -> None:
        device = self.rows.device
        self.signs = union(self.signs, other.signs)
        self.rows += other.rows.to(device) * scale
        self.ones += other.ones.to(device) * scale
        for part in list(other.ring):
            weight = None if part.weight is None else part.weight.to(device)
            self.ring.append(_Recent(part.latent.to(device), part.value.to(device), part.row_ptr.to(device), weight))
        self._trim()

    def state_dict(self) -> dict[str, Any]:
        ring = {}
        for n, part in enumerate(self.ring):
            ring[f"{n:06d}"] = {"latent": part.latent, "value": part.value, "row_ptr": part.row_ptr}
            if part.weight is not None:
                ring[f"{n:06d}"]["weight"] = part.weight
        return {"rows": self.rows.clone(), "ones": self.ones.clone(), "ring": ring, "signs": to_tensor(self.signs)}

    def check_state(self, state: object) -> None:
        """`state` fits this sketch, or a ValueError that names the field."""
        check_fields("pairs", state, ("rows", "ones", "ring", "signs"))
        assert isinstance(state, Mapping)
        check_tensor("pairs.rows", state["rows"], tuple(self.rows.shape), torch.float32)
        check_tensor("pairs.ones", state["ones"], tuple(self.ones.shape), torch.float32)
        check_tensor("pairs.signs", state["signs"], (None, 3), torch.int64)
        check_fields("pairs.ring", state["ring"], (), state["ring"])
        for name, part in state["ring"].items():
            _check_recent(f"pairs.ring.{name}", part, self.d_sae)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After `check_state`."""
        device = self.rows.device
        self.signs = from_tensor(state["signs"])
        self.rows.copy_(state["rows"])
        self.ones.copy_(state["ones"])
        self.ring.clear()
        for _, part in sorted(state["ring"].items()):
            weight = part["weight"].to(device) if "weight" in part else None
            self.ring.append(
                _Recent(part["latent"].to(device), part["value"].to(device), part["row_ptr"].to(device), weight)
            )


def _check_recent(name: str, part: object, d_sae: int) -> None:
    check_fields(name, part, ("latent", "value", "row_ptr"), ("weight",))
    assert isinstance(part, Mapping)
    check_tensor(f"{name}.latent", part["latent"], (None,), torch.int32)
    check_tensor(f"{name}.value", part["value"], tuple(part["latent"].shape), *FLOATS)
    check_tensor(f"{name}.row_ptr", part["row_ptr"], (None,), torch.int64)
    tokens = part["row_ptr"].numel() - 1
    if tokens < 0:
        raise refuse(f"{name}.row_ptr", "at least one number", "none")
    if "weight" in part:
        check_tensor(f"{name}.weight", part["weight"], (tokens,), torch.float64)
    codes = SparseCodes(part["value"], part["latent"].long(), part["row_ptr"], (tokens, d_sae))
    codes.validate(f"{NAME}.load_state_dict: {name}")


def directions(sketches: list[Sketch], moments: Moments, latents: Tensor) -> Tensor:
    """[len(latents), m] fp32: centred sketches of unit norm (0 for a constant latent)."""
    mean, inverse = moments.centred()
    rows = torch.stack([s.rows[latents] for s in sketches]).sum(0)
    ones = torch.stack([s.ones for s in sketches]).sum(0)
    centred = rows - mean[latents].float()[:, None] * ones
    centred = centred * (inverse[latents] > 0)[:, None]
    return torch.nn.functional.normalize(centred, dim=1)


def estimated_correlation(sketch: Sketch, moments: Moments, i: Tensor, j: Tensor) -> Tensor:
    """[P] float64: the sketch's own estimate, standard deviation (1 - c^2) / sqrt(m)."""
    return (directions([sketch], moments, i) * directions([sketch], moments, j)).sum(1).double().clamp(-1, 1)


def candidates(sketches: list[Sketch], moments: Moments, above: float) -> tuple[Tensor, Tensor]:
    """(i, j), i < j, of the pairs of live latents whose estimated correlation exceeds `above`, by tiles of S
    @ S.T."""
    live = (moments.count > 0).nonzero().flatten()
    unit = directions(sketches, moments, live)
    best = (live[:0], live[:0], unit.new_empty(0))
    for a in range(0, live.numel(), TILE_ROWS):
        for b in range(a, live.numel(), TILE_COLUMNS):
            tile = unit[a : a + TILE_ROWS] @ unit[b : b + TILE_COLUMNS].T
            row, column = (tile > above).nonzero(as_tuple=True)
            upper = column + b > row + a
            row, column = row[upper], column[upper]
            best = _best(best, (live[row + a], live[column + b], tile[row, column]))
    return best[0], best[1]


def _best(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    i, j, estimate = (torch.cat(parts) for parts in zip(old, new, strict=True))
    return best_candidates(i, j, estimate)


def best_candidates(i: Tensor, j: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The MAX_CANDIDATES highest estimates; all of them, in their order, where there are no more."""
    if estimate.numel() > MAX_CANDIDATES:
        kept = estimate.sort(descending=True, stable=True).indices[:MAX_CANDIDATES]
        i, j, estimate = i[kept], j[kept], estimate[kept]
    return i, j, estimate


def confirm(sketches: list[Sketch], i: Tensor, j: Tensor) -> PairStatistics:
    """Exact statistics over the tokens in the rings, of any pairs (i, j) and in their order."""
    d_sae, device = sketches[0].d_sae, i.device
    latents, compact = torch.unique(torch.cat([i, j]), return_inverse=True)
    number = latents.numel()
    slot = torch.full((d_sae,), -1, device=device).index_copy_(0, latents, torch.arange(number, device=device))
    ci, cj = compact[: i.numel()], compact[i.numel() :]
    # A pair is looked for once, the smaller latent first, however it is asked for and how often.
    keys, asked = torch.unique(torch.maximum(ci, cj) * number + torch.minimum(ci, cj), return_inverse=True)
    product = torch.zeros(keys.numel(), dtype=torch.float64, device=device)
    joint = torch.zeros(keys.numel(), dtype=torch.int64, device=device)
    moments = Moments.zeros(number, device, decayed=False)
    for part in (p for s in sketches for p in s.ring):
        kept = slot[part.latent] >= 0
        before = torch.zeros(kept.numel() + 1, dtype=torch.int64, device=device)
        torch.cumsum(kept, 0, out=before[1:])
        codes = SparseCodes.trusted(
            part.value[kept], slot[part.latent[kept]], before[part.row_ptr], (part.tokens, number)
        )
        entries = entries_of(codes, part.weight, None, torch.int64, compact=True)
        moments.add(entries, part.tokens, part.weight)
        for earlier, later in pair_pages(entries.local):
            key = entries.latent[later] * number + entries.latent[earlier]
            place = torch.searchsorted(keys, key).clamp_(max=keys.numel() - 1)
            hit = keys[place] == key
            w_product, tally = pair_products(entries, earlier[hit], later[hit])
            add_at(product, place[hit], w_product)
            add_at(joint, place[hit], tally)
    stats = pair_statistics(moments, ci, cj, product[asked], joint[asked])
    return dataclasses.replace(stats, i=i, j=j)
