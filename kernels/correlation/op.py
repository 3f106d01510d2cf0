"""FeatureCorrelation: streaming Pearson correlation between latents, from compressed codes."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transcoder.kernels.backend import active_backend, implementation
from transcoder.kernels.checks import check_mode
from transcoder.kernels.correlation.async_scalar import DeferredSize
from transcoder.kernels.correlation.checks import EXACT_LIMIT as EXACT_LIMIT
from transcoder.kernels.correlation.checks import NAME, check_settings, check_state_fields, check_update, latent_ids
from transcoder.kernels.correlation.exact import PackedTriangle, pair_key, summed_at, survey_exact
from transcoder.kernels.correlation.sketch import Sketch, check_signs, confirm, estimated_correlation, survey_sketches
from transcoder.kernels.correlation.statistics import CorrelatedPairs, Moments, PairStatistics, Survey, pair_statistics
from transcoder.kernels.correlation.torch_backend import Entries, entries_of, pair_total
from transcoder.kernels.sparse_codes import SparseCodes

RENORMALISE_AT = 20.0
"""Half-lives after which growing increments are brought back to 1 by an exact power of two."""
_SIGN_KEYS = ("seed", "rank")
PENDING_LIMIT = 4
"""Updates that may wait for their size on a GPU; the host reads a size that is this many steps old."""


class FeatureCorrelation:
    """Streaming Pearson correlation between the latents of SparseCodes.

    Equivalent to: `torch.corrcoef(z.T)` of all tokens' `codes.to_dense()` stacked into z [T, d_sae]
    (population formula, weighted where a mask is given), without the stack. A constant latent has correlation
    0.

    Exact mode keeps sums of products and joint counts of all pairs in float64 and integers (packed triangle,
    O(B k^2) adds an update); sketch mode keeps `sketch_dim` fp32 numbers a latent, a ring of recent codes and the exact sums of
    the watched pairs.
    Neither builds [B, d_sae]. Everything stays on `device`; `update` never makes the host wait for a GPU;
    results are bitwise reproducible. (Up to rounding if backend `triton` and another backend update or merge the same
    statistics: `triton` rounds products to a fixed grid.)

    Args:
        d_sae: latents.
        sketch_dim: None counts exactly (d_sae <= 32768). A number m >= 8 sketches: `correlation` returns an
            estimate with standard deviation (1 - r^2) / sqrt(m); `pairs` proposes by estimate and decides
            exactly, over the ring or, of pairs that are watched (`watch`), over all that was counted since.
        halflife: tokens after which a token's weight has halved; None never forgets. Every row counts as
            time, masked or not. Counts decay too, and `support` is then the decayed count rounded down.
        device: where the codes live.
        seed, rank: key the sketch's signs. Sketches of one seed can be merged if no sign is in both: give each replica its
            own rank. Exact counts have no signs and do not look at either.
        ring_tokens: recent tokens kept for the decision of sketched pairs (8 bytes an entry).
        sketch_margin: pairs whose estimate exceeds min_correlation - sketch_margin are decided exactly. 0.2
            is six standard deviations at r = 0.8 and m = 128.
        checks: 'full' also refuses NaN, Inf and out-of-order indices (reads the device); 'fast' does not
            look.

    Raises:
        ValueError: an argument out of range, or codes that do not fit; the message gives the expected value.
    """

    def __init__(
        self,
        d_sae: int,
        sketch_dim: int | None = None,
        halflife: float | None = None,
        *,
        device: torch.device | str = "cpu",
        seed: int = 0,
        rank: int = 0,
        ring_tokens: int = 262_144,
        sketch_margin: float = 0.2,
        checks: str = "fast",
    ) -> None:
        check_mode(NAME, checks)
        check_settings(d_sae, sketch_dim, halflife, seed, rank, ring_tokens, sketch_margin)
        self.d_sae, self.sketch_dim, self.halflife = d_sae, sketch_dim, halflife
        self.device = torch.empty(0, device=device).device
        self.seed, self.rank, self.checks = seed, rank, checks
        self.ring_tokens, self.sketch_margin = ring_tokens, sketch_margin
        self.updates = 0
        """Number of updates; keys the sketch's signs, so `reset` does not set it to 0."""
        self.reset()

    def reset(self) -> None:
        """Forget all tokens and watched pairs. The sketch's signs are not repeated, so that blocks of one stream can be
        merged."""
        self._moments = Moments.zeros(self.d_sae, self.device, self.halflife is not None)
        self._exact: PackedTriangle | None = None
        self._sketch: Sketch | None = None
        if self.sketch_dim is None:
            self._exact = PackedTriangle(self.d_sae, self.device, self.halflife is not None)
        else:
            self._sketch = Sketch(self.d_sae, self.sketch_dim, self.ring_tokens, self.device)
        self._pending: deque[tuple[Entries, DeferredSize]] = deque()
        """Updates whose pairs (of a sketch: watched pairs) are not counted yet."""
        self.tokens_offered = 0
        """Rows seen, masked ones included (a number the host knows)."""
        self._origin = 0.0
        """The token time at which an increment is 1 (half-life only)."""

    def update(self, codes: SparseCodes, mask: Tensor | None = None) -> None:
        """Add the tokens of `codes`.

        Args:
            codes: shape (B, d_sae) on this object's device; entries of value 0 do not count as firing.
            mask: [B] bool (False: the token does not count) or floating weights >= 0 (0: does not count).
                None counts all.
        """
        check_update(codes, mask, self.d_sae, self.device, self.checks == "full")
        backend = active_backend(codes.device, "correlation")
        batch = codes.shape[0]
        if batch == 0:
            return
        plain = None if mask is None else mask.detach().double()
        weight, tally = plain, None
        if self.halflife is not None:
            decay = self._growth(batch)
            weight = decay if plain is None else decay * plain
            tally = decay
        if self._exact is not None:
            self._exact.make_room(self.tokens_offered + batch)
        if backend == "triton" and self.halflife is None:
            self._update_triton(codes, plain)
            return
        if backend == "cpp" and self._exact is not None:
            self._exact.keep(codes, weight, tally, self._moments)
            # After all checks: refused codes change nothing.
            self._moments.add_tokens(batch, weight)
            self._count_update(batch)
            return
        count_dtype = torch.float64 if self.halflife is not None else torch.int64
        on_cpu = self.device.type == "cpu"  # where reading a size is free
        if backend == "cpp":
            entries = implementation("correlation", codes.device).firing_entries(codes, weight, tally, count_dtype)
        else:
            entries = entries_of(codes, weight, tally, count_dtype, compact=on_cpu)
        self._moments.add(entries, batch, weight)
        if self._exact is not None:
            if on_cpu:
                self._exact.add(entries, None)
            else:
                # A copy: the caller may overwrite the buffer of its codes before these pairs are counted.
                entries = entries._replace(latent=entries.latent.clone())
                self._pending.append((entries, DeferredSize(pair_total(codes))))
                self._drain(PENDING_LIMIT)
        else:
            assert self._sketch is not None
            self._sketch.add(entries, codes, weight, plain, self.seed, self.rank, self.updates)
            self._count_watched(entries)
        self._count_update(batch)

    def _update_triton(self, codes: SparseCodes, plain: Tensor | None) -> None:
        triton = implementation("correlation", codes.device)
        triton.add_moments(codes, plain, self._moments, self._exact)
        if self._exact is not None:
            triton.add_pairs(codes, plain, self._exact)
        else:
            assert self._sketch is not None
            triton.add_to_sketch(codes, plain, self._sketch, self.seed, self.rank, self.updates)
            self._sketch.remember(codes, plain)
            if len(self._sketch.watched):
                self._count_watched(entries_of(codes, plain, None, torch.int64, compact=self.device.type == "cpu"))
        self._count_update(codes.shape[0])

    def _count_watched(self, entries: Entries) -> None:
        """Add to the watched pairs the entries of codes that are already in the moments."""
        assert self._sketch is not None
        watched = self._sketch.watched
        if len(watched) == 0:
            return
        if self.device.type == "cpu":
            watched.add(entries, None, self._moments.count)
        else:
            size = watched.index(self._moments.count).look_ups(entries.latent)
            # A copy, as for exact counts.
            self._pending.append((entries._replace(latent=entries.latent.clone()), DeferredSize(size)))
            self._drain(PENDING_LIMIT)

    def _count_update(self, batch: int) -> None:
        if self._sketch is not None:
            self._sketch.draw(self.rank, self.updates)
        self.tokens_offered += batch
        self.updates += 1

    def _drain(self, keep: int) -> None:
        """Count the pairs of pending updates, in order: those whose size has arrived, and all but the newest `keep`."""
        while self._pending and (len(self._pending) > keep or self._pending[0][1].arrived()):
            entries, size = self._pending.popleft()
            if self._exact is not None:
                self._exact.add(entries, size.read())
            if self._sketch is not None:
                self._sketch.watched.add(entries, size.read(), self._moments.count)

    def _growth(self, batch: int) -> Tensor:
        """[B] float64: 2^(age of the origin / half-life). New tokens get larger weights instead of old ones smaller."""
        assert self.halflife is not None
        if batch > 500 * self.halflife:
            raise ValueError(
                f"{NAME}.update: a batch of {batch} tokens spans more than 500 half-lives of "
                f"{self.halflife} tokens; use a longer half-life or smaller batches"
            )
        age = (self.tokens_offered - self._origin) / self.halflife
        if age > RENORMALISE_AT:
            self._drain(0)
            whole = math.floor(age)
            self._scale(2.0**-whole)
            self._origin += whole * self.halflife
            age = (self.tokens_offered - self._origin) / self.halflife
        steps = torch.arange(batch, dtype=torch.float64, device=self.device) / self.halflife
        return torch.exp2(steps + age)

    def _scale(self, factor: float) -> None:
        self._moments.scale(factor)
        for part in (self._exact, self._sketch):
            if part is not None:
                part.scale(factor)

    def correlation(self, i: int | Tensor, j: int | Tensor) -> Tensor:
        """Pearson correlation of latents i and j, float64, of the broadcast shape of i and j. May wait for
        the device.

        Exact mode: exact. Sketch mode: the estimate over all tokens, standard deviation (1 - r^2) /
        sqrt(sketch_dim).

        Args:
            i, j: ints or integer tensors in [0, d_sae) whose shapes broadcast.

        Raises: TypeError or ValueError naming i or j.
        """
        left, right = latent_ids("i", i, self.d_sae, self.device), latent_ids("j", j, self.d_sae, self.device)
        try:
            left, right = torch.broadcast_tensors(left, right)
        except RuntimeError:
            raise ValueError(
                f"{NAME}.correlation: i, j: expected shapes that broadcast, got {list(left.shape)} and {list(right.shape)}"
            ) from None
        shape, left, right = left.shape, left.reshape(-1), right.reshape(-1)
        if self._sketch is None:
            return self.statistics(left, right).correlation.view(shape)
        return estimated_correlation(self._sketch, self._moments, left, right).view(shape)

    def statistics(self, i: Tensor, j: Tensor, *, beside: Sequence[FeatureCorrelation] = ()) -> PairStatistics:
        """Correlation, cosine, Jaccard and support of given pairs, each [P]. May wait for the device.

        Exact mode: over all tokens. Sketch mode: exact too, over fewer tokens. For a watched pair these are the tokens in the
        ring when watching began and all later ones; for any other pair, those in the ring. With `beside`, the tokens of all
        parts. They are always the newest ones; `weight` is their number.

        Args:
            i, j: [P] integers in [0, d_sae), any pairs: the answer has their order, is the same with i and j exchanged,
                and of a latent with itself it is the diagonal (correlation 1 unless the latent is constant).
            beside: statistics of other, disjoint parts of the stream, counted in without being merged.

        Raises: TypeError or ValueError naming i, j or `beside`.
        """
        parts = self._parts(beside)
        i, j = self._pair_ids("statistics", i, j)
        sketches = _sketches(parts)
        if sketches:
            return confirm(sketches, i, j)
        # A latent with itself has no place in the strict triangle; the value read at place 0 is not used.
        key = torch.where(i == j, 0, pair_key(i, j))
        return pair_statistics(_summed_moments(parts), i, j, *summed_at(_triangles(parts), key), self._unit())

    def watch(self, i: Tensor, j: Tensor) -> None:
        """Count these pairs exactly from now on, instead of those watched so far. Waits for the device.

        Sketch mode: a pair that was watched before keeps its counts, a new one begins with the tokens in the ring, so a pair
        that is too rare for the ring gathers support while it is watched. Pass the `candidates` of `survey` after every search.
        The cost of an `update` grows with the firings of each pair's rarer latent. Exact mode counts all pairs already: this
        does nothing.

        Args:
            i, j: [P] integers in [0, d_sae). Order and repetitions do not matter, a latent with itself is left out. Of more
                than 1,000,000 pairs those with the highest estimates are watched.

        Raises:
            TypeError or ValueError naming i or j.
            ValueError: a sketch with a half-life.
        """
        i, j = self._pair_ids("watch", i, j)
        if self._sketch is None:
            return
        if self.halflife is not None:
            raise ValueError(
                f"{NAME}.watch: expected statistics without a half-life, got {self.halflife!r}: watched counts do not "
                "fade. Watch in statistics that are reset from time to time"
            )
        self._drain(0)
        self._sketch.watch(self._moments, i[i != j], j[i != j])

    def _pair_ids(self, where: str, i: Tensor, j: Tensor) -> tuple[Tensor, Tensor]:
        i, j = latent_ids("i", i, self.d_sae, self.device), latent_ids("j", j, self.d_sae, self.device)
        if i.dim() != 1 or i.shape != j.shape:
            raise ValueError(
                f"{NAME}.{where}: i, j: expected two of one length [P], got {list(i.shape)} and {list(j.shape)}"
            )
        return i, j

    def pairs(
        self, min_correlation: float, min_support: int = 1, *, beside: Sequence[FeatureCorrelation] = ()
    ) -> CorrelatedPairs:
        """All pairs with correlation >= min_correlation and support >= min_support. Waits for the device;
        works in tiles.

        Args:
            min_correlation: in [-1, 1]; at 0 or below every pair is examined, not only those that fire together.
            min_support: tokens on which at least one of the two fires.
            beside: as in `statistics`.
        """
        return self.survey(min_correlation, min_support, beside=beside).pairs

    def survey(
        self,
        min_correlation: float,
        min_support: int = 1,
        edges: Tensor | None = None,
        *,
        beside: Sequence[FeatureCorrelation] = (),
        most: int | None = None,
    ) -> Survey:
        """`pairs` (with `most`, so many of the strongest, in bounded memory), and in the same pass the histogram over `edges`
        [bins + 1] (float64, ascending; the last bin includes its upper edge) of the pairs that fired together, and the sum of
        squared correlations over all pairs. In sketch mode instead of these two the pairs that it proposed, for `watch`."""
        if not -1 <= min_correlation <= 1:
            raise ValueError(f"{NAME}.pairs: min_correlation: expected in [-1, 1], got {min_correlation!r}")
        if min_support < 0:
            raise ValueError(f"{NAME}.pairs: min_support: expected at least 0, got {min_support!r}")
        parts = self._parts(beside)
        sketches, moments = _sketches(parts), _summed_moments(parts)
        if sketches:
            above = min_correlation - self.sketch_margin
            return survey_sketches(sketches, moments, above, min_correlation, min_support, most)
        return survey_exact(_triangles(parts), moments, min_correlation, min_support, edges, self._unit(), most)

    def counts(self, *, beside: Sequence[FeatureCorrelation] = ()) -> Tensor:
        """[d_sae] tokens on which each latent fired: int64, float64 (decayed) with a half-life."""
        count = _summed_moments(self._parts(beside)).count
        return count.clone() if self.halflife is None else count / self._unit()

    def effective_tokens(self, *, beside: Sequence[FeatureCorrelation] = ()) -> float:
        """(sum w)^2 / sum w^2: the noise of a correlation between independent latents has variance 1 over
        this."""
        return float(_summed_moments(self._parts(beside)).effective_tokens())

    def merge(self, other: FeatureCorrelation) -> None:
        """Add the statistics of a disjoint part of the stream (another rank, another block) to these, in
        place. Pairs watched in either are watched from now on, with the counts of both parts.

        With a half-life the two streams are parallel: both end now, at their own newest token.

        Raises:
            TypeError: `other` is no FeatureCorrelation.
            ValueError: another d_sae, sketch_dim or half-life; of sketches another seed, or a sign that is in both (two
                replicas of one rank).
        """
        if not isinstance(other, FeatureCorrelation):
            raise TypeError(f"{NAME}.merge: expected a {NAME}, got {type(other).__name__}")
        if other is self:
            raise ValueError(f"{NAME}.merge: expected a disjoint part of the stream, got these statistics themselves")
        for name in ("d_sae", "sketch_dim", "halflife"):
            if getattr(self, name) != getattr(other, name):
                raise ValueError(
                    f"{NAME}.merge: expected equal {name}, got {getattr(self, name)!r} and {getattr(other, name)!r}"
                )
        check_signs(f"{NAME}.merge", _seeded([self, other]))
        self._drain(0)
        other._drain(0)
        scale = self._unit() / other._unit()
        if self._exact is not None and other._exact is not None:
            self._exact.make_room(self.tokens_offered + other.tokens_offered)
            self._exact.merge(other._exact, scale)
        if self._sketch is not None and other._sketch is not None:
            self._sketch.merge(other._sketch, scale, self._moments, other._moments)
            # Later signs must differ from all in the sums: the other part may be a later block of this stream.
            self.updates = max([self.updates, *(r.stop for r in self._sketch.signs if r.rank == self.rank)])
        self._moments.merge(other._moments, scale)
        if self._sketch is not None:
            # Limited to MAX_WATCHED pairs, chosen by the counts of both.
            self._sketch.watch(self._moments, self._sketch.watched.i, self._sketch.watched.j)
        if self.halflife is None:
            self.tokens_offered += other.tokens_offered

    def forget(self, latents: Tensor) -> None:
        """Remove all firings of these latents from the statistics, for latents that were reset (recycled). Waits for the
        device; d_sae places a latent.

        Args:
            latents: [n] integers in [0, d_sae).

        Raises: TypeError or ValueError naming latents.
        """
        ids = latent_ids("latents", latents, self.d_sae, self.device).reshape(-1)
        self._drain(0)
        self._moments.forget(ids)
        self._pair_sums().forget(ids)

    def state_dict(self) -> dict[str, Any]:
        """The whole state, as nested dicts of tensors and numbers; a resumed stream gives the same bits as an uninterrupted
        one."""
        self._drain(0)
        state: dict[str, Any] = {
            "d_sae": self.d_sae,
            "sketch_dim": self.sketch_dim,
            "halflife": self.halflife,
            "updates": self.updates,
            "tokens_offered": self.tokens_offered,
            "origin": self._origin,
            "moments": {name: part.clone() for name, part in self._moments.tensors().items()},
        }
        state["pairs"] = self._pair_sums().state_dict()
        if self._sketch is not None:
            state.update({name: getattr(self, name) for name in _SIGN_KEYS})
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the state by one of `state_dict`.

        Raises: ValueError naming the field that is missing, unknown, of another shape or dtype, or from statistics with other
            arguments (d_sae, sketch_dim, halflife; seed and rank of a sketch). The state is unchanged then.
        """
        built = {name: getattr(self, name) for name in ("d_sae", "sketch_dim", "halflife")}
        built |= {name: getattr(self, name) for name in _SIGN_KEYS if self._sketch is not None}
        check_state_fields(state, built)
        self._moments.check_state(state["moments"])
        self._pair_sums().check_state(state["pairs"])
        self.reset()
        self.updates, self.tokens_offered = state["updates"], state["tokens_offered"]
        self._origin = float(state["origin"])
        self._moments.load_state_dict(state["moments"])
        self._pair_sums().load_state_dict(state["pairs"])

    def _pair_sums(self) -> PackedTriangle | Sketch:
        part = self._exact if self._exact is not None else self._sketch
        assert part is not None
        return part

    def _unit(self) -> float:
        """The weight of a token of the current time in the sums."""
        return 1.0 if self.halflife is None else 2.0 ** ((self.tokens_offered - self._origin) / self.halflife)

    def _parts(self, beside: Sequence[FeatureCorrelation]) -> list[FeatureCorrelation]:
        parts = [self, *beside]
        for part in parts:
            part._drain(0)
        for other in parts[1:]:
            if self.halflife is not None or other.halflife is not None:
                raise ValueError(f"{NAME}: beside: expected statistics without a half-life; merge them instead")
            if (other.d_sae, other.sketch_dim, other.device) != (self.d_sae, self.sketch_dim, self.device):
                raise ValueError(
                    f"{NAME}: beside: expected d_sae {self.d_sae}, sketch_dim {self.sketch_dim}, device "
                    f"{self.device}, got {other.d_sae}, {other.sketch_dim}, {other.device}"
                )
        check_signs(f"{NAME}.beside", _seeded(parts))
        return parts


def _sketches(parts: list[FeatureCorrelation]) -> list[tuple[Sketch, Moments]]:
    return [(p._sketch, p._moments) for p in parts if p._sketch is not None]


def _seeded(parts: list[FeatureCorrelation]) -> list[tuple[int, Sketch]]:
    return [(p.seed, p._sketch) for p in parts if p._sketch is not None]


def _triangles(parts: list[FeatureCorrelation]) -> list[PackedTriangle]:
    return [p._exact for p in parts if p._exact is not None]


def _summed_moments(parts: list[FeatureCorrelation]) -> Moments:
    if len(parts) == 1:
        return parts[0]._moments
    total = Moments.zeros(parts[0].d_sae, parts[0].device, decayed=False)
    for part in parts:
        total.merge(part._moments, 1.0)
    return total
