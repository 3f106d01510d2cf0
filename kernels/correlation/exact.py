"""Exact sums over every pair of latents, as a packed strict triangle.

Pair (i, j), i < j, lives at key j (j - 1) / 2 + i. Half a matrix in float64 takes what a whole one takes in
fp32 (1.27 GiB at d_sae = 18432; 4 GiB at 32768) and needs no flushing of blocks: float64 keeps the
correlation of a nearly always-on latent to ten digits over 1e10 tokens. Counts of joint firing are int32
(half of that again) and become int64 before they can overflow, or float64 where a half-life decays them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend
from transcoder.kernels.correlation import cpp_backend
from transcoder.kernels.correlation.checks import check_fields, check_tensor, refuse
from transcoder.kernels.correlation.cpp_backend import WaitingPairs
from transcoder.kernels.correlation.statistics import (
    Moments,
    StrongestPairs,
    Survey,
    kept,
    pair_statistics,
)
from transcoder.kernels.correlation.torch_backend import Entries, add_at, pair_pages, pair_products
from transcoder.kernels.sparse_codes import SparseCodes

TILE_PAIRS = 1 << 20
"""Pairs processed at a time when mining; measured over 2M pairs that fired together: 2^20 takes 0.18 s, 2^22 0.27 s, 2^17
no less."""


def pair_key(i: Tensor, j: Tensor) -> Tensor:
    """Place of the pair in the packed triangle; the order of i and j does not matter, i != j."""
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    return (high * (high - 1) >> 1) + low


def pair_of_key(key: Tensor) -> tuple[Tensor, Tensor]:
    """(i, j), i < j, of a key. The square root is exact enough below 2^52; the two corrections settle its
    rounding."""
    j = ((key.double() * 8 + 1).sqrt().add_(1) * 0.5).floor().long()
    j -= ((j * (j - 1) >> 1) > key).long()
    j += ((j * (j + 1) >> 1) <= key).long()
    return key - (j * (j - 1) >> 1), j


class PackedTriangle:
    """sum w z_i z_j (float64) and joint firing counts of all pairs."""

    def __init__(self, d_sae: int, device: torch.device, decayed: bool) -> None:
        self.d_sae = d_sae
        self.pairs = d_sae * (d_sae - 1) // 2
        # A single latent has no pair; one unused place spares the look-ups of the diagonal a special case.
        room = max(1, self.pairs)
        self._product = torch.zeros(room, dtype=torch.float64, device=device)
        self._joint = torch.zeros(room, dtype=torch.float64 if decayed else torch.int32, device=device)
        self._waiting = WaitingPairs(d_sae)
        self.unit: Tensor | None = None
        """[d_sae] float64, powers of two (0: not settled): backend `triton` rounds products to multiples of them."""

    @property
    def product(self) -> Tensor:
        self._settle()
        return self._product

    @product.setter
    def product(self, value: Tensor) -> None:
        self._settle()
        self._product = value

    @property
    def joint(self) -> Tensor:
        self._settle()
        return self._joint

    @joint.setter
    def joint(self, value: Tensor) -> None:
        self._settle()
        self._joint = value

    def _settle(self) -> None:
        """Add buffered entries, so that the sums contain every update."""
        self._waiting.settle(self._product, self._joint)

    def make_room(self, tokens: int) -> None:
        """Widen int32 counts before `tokens` tokens in all could overflow one."""
        if self._joint.dtype == torch.int32 and tokens > torch.iinfo(torch.int32).max:
            self.joint = self.joint.long()

    def keep(self, codes: SparseCodes, weight: Tensor | None, tally: Tensor | None, moments: Moments) -> None:
        """Backend `cpp`: add codes to the sums of their latents now, and their pairs to the triangle when it is worth it.
        `weight` and `tally` [B] float64 as in `torch_backend.entries_of`."""
        if not self._waiting.takes(codes, weight, tally):
            self._settle()
        if self._waiting.add(codes, weight, tally, moments):
            self._settle()

    def add(self, entries: Entries, total: int | None) -> None:
        base = entries.latent * (entries.latent - 1) >> 1
        for earlier, later in pair_pages(entries.local, total):
            # Latents ascend within a row, so the earlier entry is the smaller one.
            key = base.index_select(0, later)
            key += entries.latent.index_select(0, earlier)
            product, tally = pair_products(entries, earlier, later)
            add_at(self.product, key, product)
            add_at(self.joint, key, tally.to(self.joint.dtype))

    def forget(self, latents: Tensor) -> None:
        """As if these latents had never fired: their rows and columns are cleared, d_sae places each."""
        every = torch.arange(self.d_sae, device=self.product.device)
        for latent in latents.tolist():
            key = pair_key(torch.full_like(every[1:], latent), every[every != latent])
            self.product.index_fill_(0, key, 0)
            self.joint.index_fill_(0, key, 0)
        if self.unit is not None:
            self.unit.index_fill_(0, latents, 0)

    def scale(self, factor: float) -> None:
        self.product *= factor
        self.joint *= factor

    def merge(self, other: PackedTriangle, scale: float) -> None:
        if other.joint.dtype == torch.int64 and self.joint.dtype == torch.int32:
            self.joint = self.joint.long()
        for mine, theirs in ((self.product, other.product), (self.joint, other.joint)):
            # In slices: the other triangle may live on another device and be gigabytes long.
            for a in range(0, mine.numel(), TILE_PAIRS):
                part = theirs[a : a + TILE_PAIRS].to(mine.device)
                mine[a : a + TILE_PAIRS] += part if scale == 1 else part * scale

    def state_dict(self) -> dict[str, Tensor]:
        """The sums; only the pairs that fired together are listed where that is smaller (early in a run, sparse
        dictionaries)."""
        key = torch.cat([t + a for a, t in self._fired_tiles()])
        whole = key.numel() * (8 + self.product.element_size() + self.joint.element_size()) >= self.joint.numel() * (
            self.product.element_size() + self.joint.element_size()
        )
        unit = {} if self.unit is None else {"unit": self.unit.clone()}
        if whole:
            return {"product": self.product.clone(), "joint": self.joint.clone(), **unit}
        return {"key": key, "product": self.product[key], "joint": self.joint[key], **unit}

    def check_state(self, state: object) -> None:
        """`state` fits this triangle, or a ValueError that names the field."""
        check_fields("pairs", state, ("product", "joint"), ("key", "unit"))
        assert isinstance(state, Mapping)
        room = self.product.numel()
        counts = (torch.float64,) if self.joint.dtype.is_floating_point else (torch.int32, torch.int64)
        if "key" in state:
            key = state["key"]
            check_tensor("pairs.key", key, (None,), torch.int64)
            if key.numel() and (int(key[0]) < 0 or int(key[-1]) >= room or bool((key.diff() <= 0).any())):
                raise refuse(
                    "pairs.key", f"ascending, unique keys in [0, {room})", f"{int(key.min())} .. {int(key.max())}"
                )
            room = key.numel()
        check_tensor("pairs.product", state["product"], (room,), torch.float64)
        check_tensor("pairs.joint", state["joint"], (room,), *counts)
        if "unit" in state:
            check_tensor("pairs.unit", state["unit"], (self.d_sae,), torch.float64)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """After `check_state`."""
        device = self.product.device
        self.joint = torch.zeros_like(self.joint, dtype=state["joint"].dtype)
        self.product.zero_()
        self.unit = state["unit"].to(device, copy=True) if "unit" in state else None
        if "key" in state:
            key = state["key"].to(device)
            self.product[key] = state["product"].to(device)
            self.joint[key] = state["joint"].to(device)
        else:
            self.product.copy_(state["product"])
            self.joint.copy_(state["joint"])

    def _fired_tiles(self) -> Iterator[tuple[int, Tensor]]:
        for a in range(0, self.joint.numel(), TILE_PAIRS):
            yield a, self.joint[a : a + TILE_PAIRS].nonzero().flatten()


def summed_at(triangles: Sequence[PackedTriangle], key: Tensor) -> tuple[Tensor, Tensor]:
    """(product, joint) at some keys, summed over triangles of disjoint parts of a stream."""
    product, joint = triangles[0].product[key], triangles[0].joint[key].to(_wide(triangles[0].joint))
    for t in triangles[1:]:
        product = product + t.product[key]
        joint = joint + t.joint[key]
    return product, joint


def fired_tiles(triangles: Sequence[PackedTriangle], everything: bool) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(key, product, joint) of the pairs that fired together at least once (of all pairs if `everything`), in
    tiles."""
    first = triangles[0]
    for a in range(0, first.pairs, TILE_PAIRS):
        tile = slice(a, min(a + TILE_PAIRS, first.pairs))
        if everything:
            key = torch.arange(tile.start, tile.stop, device=first.joint.device)
        else:
            fired = first.joint[tile] > 0
            for t in triangles[1:]:
                fired |= t.joint[tile] > 0
            key = fired.nonzero().flatten().add_(a)
        yield key, *summed_at(triangles, key)


def survey_exact(
    triangles: Sequence[PackedTriangle],
    moments: Moments,
    min_correlation: float,
    min_support: int,
    edges: Tensor | None,
    unit: float,
    most: int | None = None,
) -> Survey:
    """`FeatureCorrelation.survey` over triangles of disjoint parts of a stream; `moments` are those of all of it."""
    mean, inverse = moments.centred()
    # r_ij = C_ij / W / (sd_i sd_j) - t_i t_j with t = mean / sd. A pair that never fires together has C_ij = 0, so only the
    # others are visited, and the sum over all is corrected for them.
    t = mean * inverse
    inverse = inverse / moments.weight.clamp(min=1e-300).sqrt()
    squared = ((t.square().sum().square() - t.pow(4).sum()) / 2).clamp(min=0)
    d_sae, device = t.numel(), t.device
    # The other statistics are computed only for the few pairs that may pass; the slack covers rounding.
    least = min_correlation - 1e-6
    found = StrongestPairs(d_sae, device, most)
    if min_correlation > 0 and active_backend(device, "correlation") == "cpp":
        parts = [part.product for part in triangles], [part.joint for part in triangles]
        limit = triangles[0].pairs if most is None else most
        mined = cpp_backend.mine(*parts, t, inverse, moments.count, least, min_support * unit, max(1, limit), edges)
        stats = pair_statistics(moments, mined.i, mined.j, mined.product, mined.joint, unit)
        found.add(kept(stats, min_correlation, min_support))
        total = found.total if mined.total == mined.i.numel() else mined.total
        return Survey(found.pairs(), total, None if edges is None else mined.histogram, float(squared + mined.squared))
    histogram = None if edges is None else torch.zeros(edges.numel() - 1, dtype=torch.int64, device=device)
    for key, product, joint in fired_tiles(triangles, everything=min_correlation <= 0):
        i, j = pair_of_key(key)
        apart = t[i] * t[j]
        correlation = product * inverse[i] * inverse[j] - apart
        squared += (correlation.square() - apart.square()).sum()
        if histogram is not None and edges is not None:
            together = correlation if min_correlation > 0 else correlation[joint > 0]
            place = torch.searchsorted(edges, together, right=True) - 1
            histogram += torch.bincount(place.clamp(0, histogram.numel() - 1), minlength=histogram.numel())
        near = (correlation >= least).nonzero().flatten()
        stats = pair_statistics(moments, i[near], j[near], product[near], joint[near], unit)
        found.add(kept(stats, min_correlation, min_support))
    return Survey(found.pairs(), found.total, histogram, float(squared))


def _wide(counts: Tensor) -> torch.dtype:
    return torch.float64 if counts.dtype.is_floating_point else torch.int64
