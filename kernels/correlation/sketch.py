"""Correlation of very wide dictionaries: a random-sign sketch proposes pairs and exact counts decide. The counts are those of a
ring of recent codes or, for watched pairs, also of all tokens since watching began.

S_i = sum_t w_t z_ti r_t with r_t in {+1, -1}^m from a counter keyed by (seed, rank, step, token), so that no two tokens share a
sign and sketches of different ranks or blocks can be added. Inner products of rows of S are unbiased for those of the latents
(Alon, Matias, Szegedy 1996; Achlioptas 2003). Subtracting mean_i * S_0 with S_0 = sum_t w_t r_t centres the latents. Divided by
the sketch's own norms, an estimated correlation c has standard deviation (1 - c^2) / sqrt(m).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend, implementation
from transcoder.kernels.checks import FLOATS
from transcoder.kernels.correlation import cpp_backend
from transcoder.kernels.correlation.checks import NAME, check_fields, check_tensor, refuse
from transcoder.kernels.correlation.counter_rng import signs
from transcoder.kernels.correlation.statistics import (
    Moments,
    PairStatistics,
    PairSums,
    Survey,
    kept,
    sorted_pairs,
    statistics_of,
)
from transcoder.kernels.correlation.torch_backend import Entries, add_at, entries_of
from transcoder.kernels.correlation.tracked_pairs import MAX_WATCHED, PairIndex, Watched, check_watched, latents_alone
from transcoder.kernels.sparse_codes import SparseCodes

TILE_ROWS = 2048
"""Rows of S multiplied with all others at a time: a [2048, d_sae] fp32 tile is 8 GiB at 2^20 latents, so
columns tile too."""
TILE_COLUMNS = 8192
MAX_CANDIDATES = 1_000_000
"""Most pairs that are checked by exact counts: those of the highest estimates."""
ESTIMATED_TOGETHER = 1 << 16
"""Number of pairs whose sketches are gathered at a time."""


class SignRange(NamedTuple):
    """Signs that a sketch holds: those of (seed, rank, n) for first <= n < stop; the seed is that of the whole sketch.

    Two tokens that share a sign appear correlated, so sketches that share signs must not be added. Blocks of one stream and
    streams of different ranks share none.
    """

    rank: int
    first: int
    stop: int


def union(*parts: Iterable[SignRange]) -> list[SignRange]:
    """Sorted, with touching ranges joined."""
    joined: list[SignRange] = []
    for new in sorted(one for part in parts for one in part):
        if joined and joined[-1].rank == new.rank and new.first <= joined[-1].stop:
            joined[-1] = joined[-1]._replace(stop=max(joined[-1].stop, new.stop))
        else:
            joined.append(new)
    return joined


def shared(left: Iterable[SignRange], right: Iterable[SignRange]) -> SignRange | None:
    """The first range that is in both, if there is one."""
    theirs = list(right)
    for a in left:
        for b in theirs:
            first, stop = max(a.first, b.first), min(a.stop, b.stop)
            if a.rank == b.rank and first < stop:
                return SignRange(a.rank, first, stop)
    return None


def to_tensor(ranges: Iterable[SignRange]) -> Tensor:
    """[n, 3] int64."""
    return torch.tensor(list(ranges), dtype=torch.int64, device="cpu").view(-1, 3)


def from_tensor(rows: Tensor) -> list[SignRange]:
    return [SignRange(*row) for row in rows.tolist()]


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
    """S [d_sae, m] fp32, the ring of recent codes and the watched pairs."""

    def __init__(self, d_sae: int, dim: int, ring_tokens: int, device: torch.device) -> None:
        self.d_sae, self.dim, self.ring_tokens = d_sae, dim, ring_tokens
        self.rows = torch.zeros(d_sae, dim, dtype=torch.float32, device=device)
        self.ones = torch.zeros(dim, dtype=torch.float32, device=device)
        """The sketch of the constant 1."""
        self.signs: list[SignRange] = []
        """The signs in the sums."""
        self.ring: deque[_Recent] = deque()
        self.watched = Watched.none(d_sae, device)

    def add(
        self, entries: Entries, codes: SparseCodes, scaled: Tensor | None, plain: Tensor | None, *keys: int
    ) -> None:
        """`scaled` [B] are the weights that the entries carry (decay included), `plain` [B] those without
        decay."""
        if active_backend(codes.device, "correlation") == "cpp":
            cpp_backend.sketch_add(self.rows, self.ones, entries, scaled, codes.shape[0], *keys)
        else:
            r = signs(codes.shape[0], self.dim, codes.device, *keys)
            add_at(self.rows, entries.latent, entries.weighted.float()[:, None] * r[entries.row])
            self.ones += r.sum(0) if scaled is None else scaled.float() @ r
        self.remember(codes, plain)

    def remember(self, codes: SparseCodes, plain: Tensor | None) -> None:
        """Add the codes to the ring; the oldest leave it."""
        # Copies: a caller may overwrite its buffers.
        weight = None if plain is None else plain.clone()
        recent = _Recent(codes.indices.int(), codes.values.detach().clone(), codes.row_ptr.clone(), weight)
        self.ring.append(recent)
        self._trim()

    def draw(self, rank: int, update: int) -> None:
        """Record that the signs of (rank, update) are in the sums."""
        self.signs = union(self.signs, [SignRange(rank, update, update + 1)])

    def _trim(self) -> None:
        held = sum(part.tokens for part in self.ring)
        while len(self.ring) > 1 and held - self.ring[0].tokens >= self.ring_tokens:
            held -= self.ring.popleft().tokens

    def forget(self, latents: Tensor) -> None:
        """Remove all firings of these latents from the rows and from the ring."""
        self.rows.index_fill_(0, latents, 0)
        gone = torch.zeros(self.d_sae, dtype=torch.bool, device=self.rows.device)
        gone.index_fill_(0, latents, True)
        for part in self.ring:
            part.value.masked_fill_(gone[part.latent], 0)
        self.watched.forget(latents)

    def watch(self, moments: Moments, i: Tensor, j: Tensor) -> None:
        """Watch exactly these pairs i != j. A pair that was watched before keeps its counts, a new one begins with the ring.
        `moments` are those of this sketch, here and below."""
        i, j = self._most_alike(moments, *_ascending(i, j, self.d_sae))
        self.watched = Watched(self.d_sae, i, j, self._since(moments, i, j))

    def _most_alike(self, moments: Moments, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """The MAX_WATCHED pairs with the highest estimates, in their order."""
        if i.numel() <= MAX_WATCHED:
            return i, j
        parts = zip(i.split(ESTIMATED_TOGETHER), j.split(ESTIMATED_TOGETHER), strict=True)
        estimate = torch.cat([estimated_correlation(self, moments, a, b) for a, b in parts])
        chosen = estimate.sort(descending=True, stable=True).indices[:MAX_WATCHED].sort().values
        return i[chosen], j[chosen]

    def sums(self, moments: Moments, i: Tensor, j: Tensor) -> PairSums:
        """Exact sums of any pairs i <= j, in their order: each over the tokens since it began to be watched, or else over
        those in the ring."""
        place, new = self._known(i, j)
        known = self.watched.sums(moments, place[~new])
        return _in_order(new, known, self._ring_sums(moments, i[new], j[new]))

    def _since(self, moments: Moments, i: Tensor, j: Tensor) -> PairSums:
        """`Watched.since` of any pairs i < j; for pairs that are not watched, as if watching began with the ring."""
        place, new = self._known(i, j)
        begun = self._ring_sums(moments, i[new], j[new]).minus(latents_alone(moments, i[new], j[new]))
        return _in_order(new, self.watched.since.at(place[~new]), begun)

    def _known(self, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        """(places among the watched pairs, whether a pair is not watched)."""
        place = self.watched.places(i, j)
        return place, place < 0

    def _ring_sums(self, moments: Moments, i: Tensor, j: Tensor) -> PairSums:
        """Over the tokens in the ring."""
        device = i.device
        if i.numel() == 0:
            return PairSums.zeros(0, device)
        latents, compact = torch.unique(torch.cat([i, j]), return_inverse=True)
        number = latents.numel()
        slot = torch.full((self.d_sae,), -1, device=device).index_copy_(0, latents, torch.arange(number, device=device))
        ci, cj = compact[: i.numel()], compact[i.numel() :]
        index = PairIndex(number, ci, cj, moments.count[latents])
        product = torch.zeros(i.numel(), dtype=torch.float64, device=device)
        joint = torch.zeros(i.numel(), dtype=torch.int64, device=device)
        ring = Moments.zeros(number, device, decayed=False)
        for part in self.ring:
            kept = slot[part.latent] >= 0
            before = torch.zeros(kept.numel() + 1, dtype=torch.int64, device=device)
            torch.cumsum(kept, 0, out=before[1:])
            codes = SparseCodes.trusted(
                part.value[kept], slot[part.latent[kept]], before[part.row_ptr], (part.tokens, number)
            )
            entries = entries_of(codes, part.weight, None, torch.int64, compact=True)
            ring.add(entries, part.tokens, part.weight)
            index.add(entries, None, product, joint)
        return PairSums.of(ring, ci, cj, product, joint)

    def scale(self, factor: float) -> None:
        self.rows *= factor
        self.ones *= factor

    def merge(self, other: Sketch, scale: float, moments: Moments, others: Moments) -> None:
        """`moments` of this sketch and `others` of the other one, neither merged yet."""
        device = self.rows.device
        self._merge_watched(other, moments, others)
        self.signs = union(self.signs, other.signs)
        self.rows += other.rows.to(device) * scale
        self.ones += other.ones.to(device) * scale
        for part in list(other.ring):
            weight = None if part.weight is None else part.weight.to(device)
            self.ring.append(_Recent(part.latent.to(device), part.value.to(device), part.row_ptr.to(device), weight))
        self._trim()

    def _merge_watched(self, other: Sketch, moments: Moments, others: Moments) -> None:
        """Watch the pairs of both, with the counts of both; a sketch that does not watch a pair contributes its ring."""
        mine, theirs = self.watched, other.watched
        if len(mine) or len(theirs):
            i, j = (torch.cat(parts) for parts in ((mine.i, theirs.i.to(mine.i)), (mine.j, theirs.j.to(mine.j))))
            i, j = _ascending(i, j, self.d_sae)
            since = other._since(others, i.to(theirs.i), j.to(theirs.j)).to(i.device)
            self.watched = Watched(self.d_sae, i, j, self._since(moments, i, j).plus(since))

    def state_dict(self) -> dict[str, Any]:
        ring = {}
        for n, part in enumerate(self.ring):
            ring[f"{n:06d}"] = {"latent": part.latent, "value": part.value, "row_ptr": part.row_ptr}
            if part.weight is not None:
                ring[f"{n:06d}"]["weight"] = part.weight
        state = {"rows": self.rows.clone(), "ones": self.ones.clone(), "ring": ring, "signs": to_tensor(self.signs)}
        return {**state, "watched": self.watched.state_dict()} if len(self.watched) else state

    def check_state(self, state: object) -> None:
        """`state` fits this sketch, or a ValueError that names the field."""
        check_fields("pairs", state, ("rows", "ones", "ring", "signs"), ("watched",))
        assert isinstance(state, Mapping)
        check_tensor("pairs.rows", state["rows"], tuple(self.rows.shape), torch.float32)
        check_tensor("pairs.ones", state["ones"], tuple(self.ones.shape), torch.float32)
        check_tensor("pairs.signs", state["signs"], (None, 3), torch.int64)
        check_fields("pairs.ring", state["ring"], (), state["ring"])
        for name, part in state["ring"].items():
            _check_recent(f"pairs.ring.{name}", part, self.d_sae)
        if "watched" in state:
            check_watched("pairs.watched", state["watched"], self.d_sae)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """After `check_state`, into a sketch that has seen nothing."""
        device = self.rows.device
        self.signs = from_tensor(state["signs"])
        self.rows.copy_(state["rows"])
        self.ones.copy_(state["ones"])
        if "watched" in state:
            self.watched = Watched.from_state(self.d_sae, device, state["watched"])
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
    similar = cpp_backend.similar_rows if active_backend(unit.device, "correlation") == "cpp" else _similar_rows
    best = (live[:0], live[:0], unit.new_empty(0))
    for a in range(0, live.numel(), TILE_ROWS):
        for b in range(a, live.numel(), TILE_COLUMNS):
            if best[2].numel() == MAX_CANDIDATES:
                # Of equal estimates the earlier stays: only higher ones can still enter.
                above = max(above, float(best[2].min()))
            row, column, estimate = similar(unit[a : a + TILE_ROWS], unit[b : b + TILE_COLUMNS], above, a - b)
            best = _best(best, (live[row + a], live[column + b], estimate))
    return best[0], best[1]


def _similar_rows(left: Tensor, right: Tensor, above: float, apart: int) -> tuple[Tensor, Tensor, Tensor]:
    """(i, j, left_i . right_j), each [P], of the pairs whose product exceeds `above` and j > i + apart."""
    tile = left @ right.T
    row, column = (tile > above).nonzero(as_tuple=True)
    upper = column > row + apart
    row, column = row[upper], column[upper]
    return row, column, tile[row, column]


def _best(old: tuple[Tensor, ...], new: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    i, j, estimate = (torch.cat(parts) for parts in zip(old, new, strict=True))
    return best_candidates(i, j, estimate)


def best_candidates(i: Tensor, j: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The MAX_CANDIDATES highest estimates; all of them, in their order, where there are no more."""
    if estimate.numel() > MAX_CANDIDATES:
        kept = estimate.sort(descending=True, stable=True).indices[:MAX_CANDIDATES]
        i, j, estimate = i[kept], j[kept], estimate[kept]
    return i, j, estimate


def survey_sketches(
    parts: list[tuple[Sketch, Moments]],
    moments: Moments,
    above: float,
    min_correlation: float,
    min_support: int,
    most: int | None = None,
) -> Survey:
    """`FeatureCorrelation.survey`: pairs whose estimate exceeds `above`, decided exactly. `moments` are those of all parts."""
    device = moments.total.device
    on_triton = active_backend(device, "correlation") == "triton"
    propose = implementation("correlation", device).similar if on_triton else candidates
    i, j = propose([sketch for sketch, _ in parts], moments, above)
    decided = kept(confirm(parts, i, j), min_correlation, min_support)
    pairs = sorted_pairs([decided], moments.total.numel(), device, most)
    return Survey(pairs, decided.i.numel(), None, None, (i, j))


def check_signs(where: str, parts: list[tuple[int, Sketch]]) -> None:
    """Sketches, each with its seed, are of one seed and share no sign: only then do inner products of their sums mean
    anything."""
    held: list[SignRange] = []
    for seed, sketch in parts:
        if seed != parts[0][0]:
            raise ValueError(f"{where}: expected equal seed, got {parts[0][0]} and {seed}")
        twice = shared(held, sketch.signs)
        if twice is not None:
            raise ValueError(
                f"{where}: the random signs of seed {seed}, rank {twice.rank}, updates {twice.first} .. "
                f"{twice.stop - 1} are in both sketches, so different tokens would appear correlated: give each replica "
                "its own rank (blocks of one stream share a rank and go on counting `updates`)"
            )
        held = union(held, sketch.signs)


def confirm(parts: list[tuple[Sketch, Moments]], i: Tensor, j: Tensor) -> PairStatistics:
    """Exact statistics of any pairs (i, j), in their order, over the tokens counted in all sketches (`Sketch.sums`)."""
    low, high = torch.minimum(i, j), torch.maximum(i, j)
    total, *more = (sketch.sums(moments, low, high) for sketch, moments in parts)
    for sums in more:
        total = total.plus(sums)
    return statistics_of(i, j, total)


def _ascending(i: Tensor, j: Tensor, d_sae: int) -> tuple[Tensor, Tensor]:
    """The pairs i != j as i < j, ascending, each once."""
    key = torch.unique(torch.minimum(i, j) * d_sae + torch.maximum(i, j))
    return key // d_sae, key % d_sae


def _in_order(last: Tensor, first: PairSums, others: PairSums) -> PairSums:
    """[P] sums, of which `first` are those where `last` is False and `others` those where it is True."""
    order = last.sort(stable=True).indices
    place = torch.empty_like(order).index_copy_(0, order, torch.arange(order.numel(), device=order.device))
    return first.followed_by(others).at(place)
