"""Exact counts of given pairs; the cost grows with the firings of each pair's rarer latent, not with all pairs of a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.correlation.checks import check_fields, check_tensor, refuse
from transcoder.kernels.correlation.statistics import Moments, PairSums
from transcoder.kernels.correlation.torch_backend import Entries, add_at, pair_pages, pair_products

MAX_WATCHED = 1_000_000
"""Pairs counted along with a sketch, 88 bytes each."""


class PairIndex:
    """Finds the tokens on which both latents of a pair fire.

    Each pair belongs to its rarer latent. For each entry of that latent the pair's other latent is searched for in the same
    row, so a pair costs one look-up per firing of its rarer latent. Built without reading the device.
    """

    def __init__(self, d_sae: int, i: Tensor, j: Tensor, count: Tensor) -> None:
        """
        Args:
            i, j: [P] latents.
            count: [d_sae] firings, to tell the rarer latent.
        """
        self.d_sae = d_sae
        rare = torch.where(count[i] <= count[j], i, j)
        rare, self.pair = rare.sort(stable=True)
        self.partner = (i + j)[self.pair] - rare
        self.degree = torch.zeros(d_sae, dtype=torch.int64, device=i.device)
        """[d_sae]: pairs that belong to a latent."""
        self.degree.index_add_(0, rare, torch.ones_like(rare))
        self.first = self.degree.cumsum(0) - self.degree
        self.member = torch.zeros(d_sae, dtype=torch.bool, device=i.device)
        for side in (i, j):
            self.member.index_fill_(0, side, True)

    def look_ups(self, latent: Tensor) -> Tensor:
        """0-dim int64 on the device: number of look-ups in `add` for entries of these latents."""
        return self.degree[latent].sum()

    def add(self, entries: Entries, total: int | None, product: Tensor, joint: Tensor) -> None:
        """Add these entries' products and joint firings to the pairs' [P].

        Args:
            total: `look_ups` of all entries, if the host knows it: then nothing is read from the device. None reads.
        """
        latent, row = entries.latent, entries.row
        chosen = None
        if total is None:
            chosen = self.member[latent].nonzero().flatten()
            latent, row = latent[chosen], row[chosen]
        # Ascends: entries are in the order of their rows, and of their latents within a row.
        key = row * self.d_sae + latent
        base, first, degree = key - latent, self.first[latent], self.degree[latent]
        for before, at in pair_pages(degree, total):
            slot = first[at] + (before - at + degree[at])
            wanted = base[at] + self.partner[slot]
            place = torch.searchsorted(key, wanted).clamp_(max=key.numel() - 1)
            hit = key[place] == wanted
            pair = self.pair[slot]
            if chosen is not None:
                pair, at, place = pair[hit], chosen[at[hit]], chosen[place[hit]]
            # The smaller latent is the earlier entry: the product does not depend on which of the two is rarer.
            weighted, tally = pair_products(entries, torch.minimum(at, place), torch.maximum(at, place))
            if chosen is None:
                weighted, tally = torch.where(hit, weighted, 0.0), torch.where(hit, tally, 0)
            add_at(product, pair, weighted)
            add_at(joint, pair, tally)


class Watched:
    """Watched pairs, each counted since it began to be watched.

    A pair stores `since`: its sums minus the sums of its two latents over all tokens at that time. Adding the current sums of
    the latents gives the sums over the tokens since then.
    """

    def __init__(self, d_sae: int, i: Tensor, j: Tensor, since: PairSums) -> None:
        """`i` < `j` [P] ascend by (i, j), each pair once."""
        self.d_sae, self.i, self.j, self.since = d_sae, i, j, since
        self._key = i * d_sae + j
        self._index: PairIndex | None = None

    @classmethod
    def none(cls, d_sae: int, device: torch.device) -> Watched:
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        return cls(d_sae, nothing, nothing, PairSums.zeros(0, device))

    def __len__(self) -> int:
        return self.i.numel()

    def index(self, count: Tensor) -> PairIndex:
        """Made at the first call, with the firing counts of that call."""
        if self._index is None:
            self._index = PairIndex(self.d_sae, self.i, self.j, count)
        return self._index

    def add(self, entries: Entries, total: int | None, count: Tensor) -> None:
        """Count these entries; `total` as in `PairIndex.add`."""
        self.index(count).add(entries, total, self.since.product, self.since.joint)

    def places(self, i: Tensor, j: Tensor) -> Tensor:
        """[Q] int64: index of each pair (in any order), -1 if it is not watched."""
        if len(self) == 0:
            return torch.full_like(i, -1)
        key = torch.minimum(i, j) * self.d_sae + torch.maximum(i, j)
        place = torch.searchsorted(self._key, key).clamp_(max=len(self) - 1)
        return torch.where(self._key[place] == key, place, -1)

    def sums(self, moments: Moments, place: Tensor) -> PairSums:
        """Over the tokens since each pair began; `moments` are those of all tokens until now."""
        return latents_alone(moments, self.i[place], self.j[place]).plus(self.since.at(place))

    def forget(self, latents: Tensor) -> None:
        """Remove all firings of these latents."""
        gone = torch.zeros(self.d_sae, dtype=torch.bool, device=self.i.device)
        gone.index_fill_(0, latents, True)
        each = torch.stack([gone[self.i], gone[self.j]])
        for part in (self.since.total, self.since.square, self.since.fired):
            part.masked_fill_(each, 0)
        for part in (self.since.product, self.since.joint):
            part.masked_fill_(each.any(0), 0)

    def state_dict(self) -> dict[str, Tensor]:
        since = {name: part.clone() for name, part in self.since._asdict().items()}
        return {"i": self.i.clone(), "j": self.j.clone(), **since}

    @classmethod
    def from_state(cls, d_sae: int, device: torch.device, state: Mapping[str, Tensor]) -> Watched:
        """After `check_watched`."""
        i, j, *since = (state[name].to(device, copy=True) for name in ("i", "j", *PairSums._fields))
        return cls(d_sae, i, j, PairSums(*since))


def latents_alone(moments: Moments, i: Tensor, j: Tensor) -> PairSums:
    """The sums of pairs i != j over all tokens, with product and joint count 0."""
    nothing = torch.zeros(i.numel(), dtype=torch.int64, device=i.device)
    return PairSums.of(moments, i, j, nothing.double(), nothing)


def check_watched(name: str, state: object, d_sae: int) -> None:
    """`state` is what `Watched.state_dict` gives at this width, or a ValueError that names the field."""
    like: dict[str, Any] = PairSums.zeros(0, torch.device("cpu"))._asdict()
    check_fields(name, state, ("i", "j", *like))
    assert isinstance(state, Mapping)
    i, j = state["i"], state["j"]
    check_tensor(f"{name}.i", i, (None,), torch.int64)
    check_tensor(f"{name}.j", j, (i.numel(),), torch.int64)
    for field, part in like.items():
        check_tensor(f"{name}.{field}", state[field], (*part.shape[:-1], i.numel()), part.dtype)
    if i.numel() and (int(i.min()) < 0 or int(j.max()) >= d_sae or bool((i >= j).any())):
        raise refuse(f"{name}.i, j", f"0 <= i < j < {d_sae}", f"{int(i.min())} .. {int(j.max())}")
    if bool(((i * d_sae + j).diff() <= 0).any()):
        raise refuse(f"{name}.i, j", "pairs that ascend, each once", "others")
