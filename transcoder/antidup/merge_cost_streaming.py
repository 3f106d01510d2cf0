"""Merge verdicts for latents that are too rare for held-out tokens, from training batches before each step's update.

The weights of a batch's forward pass were not trained on that batch, so in the first epoch its residual is equivalent to a
held-out one. This needs no extra forward pass, and training has millions of tokens where the held-out set has thousands.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, NamedTuple

import torch
from torch import Tensor

from transcoder.antidup.merge_cost import MIN_FIRINGS, MergeResult, PairTotals, cheaper_fold
from transcoder.antidup.pair_errors import places_of
from transcoder.kernels import SparseCodes
from transcoder.kernels.correlation.torch_backend import add_at

MOST_PAIRS = 1024
"""Most pairs followed at a time: residuals are multiplied by the decoder rows of both latents."""
MOST_FIRINGS = 4096
"""Most firings of followed pairs that are used of a micro-batch on a GPU: this bounds the cost, and the host need not read
their number. 3 rows of d_out numbers each, about 0.35 GB moved at d_out 2304, a tenth of a millisecond at 3 TB/s. Of a batch
with more, only the first tokens that fit are used. That is rare: latents that held-out tokens had no verdict for fire on fewer
than 10 of thousands of tokens."""
EVERY_STEP = 64
"""Most pairs that are looked at in every step: looking for firings takes longer than the few that there are."""
MOST_READ = 512
"""The same on a CPU, where it is half a millisecond at d_out 512."""
SUMS = ("square_i", "square_j", "along_i", "along_j", "cross_i", "cross_j", "product", "target")
DOTS_AT_A_TIME = 4096
ENOUGH = 4 * MIN_FIRINGS
"""From this many firings on, a pair's sums are halved at every `settle`, because the weights keep changing."""


class Measured(NamedTuple):
    """The sums of a micro-batch, not added yet: its step may turn out to be non-finite."""

    round: int
    """Counter of changes of the followed pairs; `add` ignores sums that are from before the last change."""
    sums: Tensor
    """[8, P] float64, in the order of `SUMS`."""
    fired: Tensor
    """[2, P] int64."""


class MergeEvidence:
    """For some pairs (i, j) the sums of the merge test, over the training tokens since each pair began to be followed.

    `measure` and `add` never wait for a device.
    """

    def __init__(self, d_sae: int, device: torch.device) -> None:
        self.d_sae, self.device = d_sae, device
        # On the CPU, reading the number of entries is free, and rare latents have few.
        self._reads = device.type == "cpu"
        self._round = 0
        self._wanted: list[Tensor] = []
        self._begin(torch.zeros(2, 0, dtype=torch.int64, device=device))

    def _begin(self, pairs: Tensor) -> None:
        count = pairs.shape[1]
        self._pairs = pairs
        self._sums = torch.zeros(len(SUMS), count, dtype=torch.float64, device=self.device)
        self._fired = torch.zeros(2, count, dtype=torch.int64, device=self.device)

    def __len__(self) -> int:
        return self._pairs.shape[1]

    @torch.no_grad()
    def measure(
        self,
        codes: SparseCodes,
        residual: Tensor,
        target: Tensor,
        W_dec: Tensor,
        weights: Tensor | None = None,
        step: int = 0,
    ) -> Measured | None:
        """The sums of the pairs over B training tokens; None without pairs, and of more than `EVERY_STEP` pairs in three of
        four steps.

        Args:
            codes: (B, d_sae) of the forward pass.
            residual, target: [B, d_out] reconstruction minus target, and the target.
            W_dec: [d_sae, d_out] in the same units, with rows of unit norm, as the forward pass used it.
            weights: [B] importance weights; None weighs every token 1.
            step: the training step.
        """
        if len(self) == 0 or (len(self) > EVERY_STEP and step % 4):
            return None
        w = None if weights is None else weights.detach().double()
        residual, W_dec = residual.detach().float(), W_dec.detach()
        measure = self._measure_firings if self._reads else self._measure_some
        sums, fired, looked_at = measure(codes, residual, W_dec, w)
        w = looked_at.double() if w is None else w * looked_at
        target = target.detach().float()
        spread = (target - target.mean(0)).square().sum(1).double()
        spread = spread.sum() if w is None else (w * spread).sum()
        return Measured(self._round, torch.cat([sums, spread.expand(1, len(self))]), fired)

    def _measure_firings(
        self, codes: SparseCodes, residual: Tensor, W_dec: Tensor, w: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(sums without the target's [7, P], fired [2, P], tokens that were looked at [B] bool), at the cost of the firings of
        the pairs' latents, of which only the first tokens' are used that have at most `MOST_READ`."""
        count = len(self)
        latents, order = self._pairs.flatten().sort()
        fires = torch.zeros(self.d_sae, dtype=torch.bool, device=self.device).index_fill_(0, latents, True)[
            codes.indices
        ]
        fires &= codes.values.detach() > 0
        latent, row, value = codes.indices[fires], codes.rows()[fires], codes.values.detach()[fires].double()
        first = torch.searchsorted(latents, latent)
        degree = torch.searchsorted(latents, latent, right=True) - first
        looked_at = torch.ones(codes.shape[0], dtype=torch.bool, device=self.device)
        beyond = (degree.cumsum(0) > MOST_READ).nonzero().flatten()
        if beyond.numel():
            last = int(row[beyond[0]])
            looked_at[last:] = False
            few = int((row < last).sum())
            latent, row, value, first, degree = (part[:few] for part in (latent, row, value, first, degree))
        # One place for each firing of a latent in one of its pairs.
        entry = torch.repeat_interleave(torch.arange(latent.numel(), device=self.device), degree)
        nth = torch.arange(entry.numel(), device=self.device) - (degree.cumsum(0) - degree)[entry]
        place = order[first[entry] + nth]
        pair, side = place % count, place // count
        partner = self._pairs.flatten()[(place + count) % (2 * count)]
        weight = torch.ones_like(value) if w is None else w[row]
        z, weight = value[entry], weight[entry]
        own, other = (_dots(residual, row[entry], W_dec, which) for which in (latent[entry], partner))
        sums = torch.zeros(len(SUMS) - 1, count, dtype=torch.float64, device=self.device)
        fired = torch.zeros(2, count, dtype=torch.int64, device=self.device)
        # z_i (r . w_j) is `cross_j`: it is named by the row, not by the firing.
        for here, names in (
            (side == 0, ("square_i", "along_i", "cross_j")),
            (side == 1, ("square_j", "along_j", "cross_i")),
        ):
            for name, column in zip(names, (z * z, z * own, z * other), strict=True):
                sums[SUMS.index(name)].index_add_(0, pair[here], (weight * column)[here])
        fired.view(-1).index_add_(0, place, (weight > 0).long())
        key, wanted = row * self.d_sae + latent, row[entry] * self.d_sae + partner
        if key.numel():
            at = torch.searchsorted(key, wanted).clamp_(max=key.numel() - 1)
            joint = torch.where((key[at] == wanted) & (side == 0), weight * z * value[at], 0.0)
            sums[SUMS.index("product")].index_add_(0, pair, joint)
        return sums, fired, looked_at

    def _measure_some(
        self, codes: SparseCodes, residual: Tensor, W_dec: Tensor, w: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The same of the tokens [B] bool, the third answer, whose firings are among the first `MOST_FIRINGS`: nothing is read
        from the device, and the work is of one size."""
        count, nnz = len(self), codes.nnz
        if nnz == 0:
            nothing = torch.zeros(len(SUMS) - 1, count, dtype=torch.float64, device=self.device)
            every = torch.ones(codes.shape[0], dtype=torch.bool, device=self.device)
            return nothing, torch.zeros(2, count, dtype=torch.int64, device=self.device), every
        latents, order = self._pairs.flatten().sort()
        rows, values = codes.rows(), codes.values.detach().double()
        first = torch.searchsorted(latents, codes.indices)
        degree = torch.searchsorted(latents, codes.indices, right=True) - first
        degree = torch.where(values > 0, degree, 0)
        closed = degree.cumsum(0)
        ends = codes.row_ptr[1:] - 1
        before = torch.where(ends >= 0, closed[ends.clamp(min=0)], 0)
        looked_at = before <= MOST_FIRINGS
        # One place for each firing of a latent in one of its pairs, and places that stay empty.
        nth = torch.arange(MOST_FIRINGS, device=self.device)
        entry = torch.searchsorted(closed, nth, right=True)
        there = entry < nnz
        entry = entry.clamp(max=nnz - 1)
        row = rows[entry]
        there &= looked_at[row]
        slot = (first[entry] + (nth - (closed[entry] - degree[entry]))).clamp(0, 2 * count - 1)
        place = order[slot]
        partner = self._pairs.flatten()[(place + count) % (2 * count)]
        z = values[entry]
        weight = there.double() if w is None else w[row] * there
        own, other = (_dots(residual, row, W_dec, which) for which in (codes.indices[entry], partner))
        wanted = row * self.d_sae + partner
        key = rows * self.d_sae + codes.indices
        at = torch.searchsorted(key, wanted).clamp_(max=nnz - 1)
        partners = torch.where(key[at] == wanted, values[at].clamp(min=0), 0.0)
        columns = [z * z, z * own, z * other, z * partners, torch.ones_like(z)]
        # NaN times 0 is NaN: empty places are masked, not multiplied by 0.
        counted = (weight > 0)[:, None]
        found = torch.where(counted, torch.stack(columns, 1) * weight[:, None], 0.0)
        found[:, -1] = counted[:, 0]
        table = torch.zeros(2 * count, len(columns), dtype=torch.float64, device=self.device)
        add_at(table, place, found)
        square, along, cross, product, fired = table.view(2, count, len(columns)).unbind(2)
        # z_i (r . w_j) is `cross_j`: it is named by the row, not by the firing. Both sides see every joint firing.
        sums = torch.stack([*square, *along, *cross.flip(0), product[0]])
        return sums, fired.long(), looked_at

    def add(self, measured: Measured | None) -> None:
        """Add the sums of a micro-batch; None adds nothing."""
        if measured is not None and measured.round == self._round:
            self._sums += measured.sums
            self._fired += measured.fired

    def completed(self, found: MergeResult, W_dec: Tensor, widths: Sequence[int] | None) -> MergeResult:
        """`found` with verdicts from training tokens where it has none. Pairs without a verdict in `found` are followed from
        the next `settle` on."""
        missing = (~found.known).nonzero().flatten()
        low, high = torch.minimum(found.kept, found.dropped)[missing], torch.maximum(found.kept, found.dropped)[missing]
        self._wanted.append(torch.stack([low, high]))
        place = places_of(low, high, (self._pairs[0], self._pairs[1]), self.d_sae)
        at = missing[place >= 0]
        if at.numel() == 0:
            return found
        place = place[place >= 0]
        i, j = self._pairs[:, place]
        sums = dict(zip(SUMS, self._sums[:, place], strict=True))
        length = W_dec.detach().double().square().sum(1)
        into = {
            "i": PairTotals(
                sums["square_i"], sums["square_j"], sums["along_j"], sums["product"], sums["cross_j"], length[j]
            ),
            "j": PairTotals(
                sums["square_j"], sums["square_i"], sums["along_i"], sums["product"], sums["cross_i"], length[i]
            ),
        }
        total = sums["target"].clamp(min=1e-30)
        mine = cheaper_fold(
            into["i"].fold(i, j, self._fired[1, place], total),
            into["j"].fold(j, i, self._fired[0, place], total),
            widths,
        )
        better = mine.known
        columns = {field.name: getattr(found, field.name).clone() for field in fields(MergeResult)}
        for name, column in columns.items():
            column[at[better]] = getattr(mine, name)[better]
        return MergeResult(**columns)

    def settle(self) -> None:
        """After a search for pairs: follow the pairs without a held-out verdict in `completed`. A pair that was followed before
        keeps its sums, halved from `ENOUGH` firings on."""
        pairs = torch.cat([torch.zeros(2, 0, dtype=torch.int64, device=self.device), *self._wanted], 1)[:, :MOST_PAIRS]
        self._wanted = []
        place = places_of(pairs[0], pairs[1], (self._pairs[0], self._pairs[1]), self.d_sae)
        old, sums, fired = place >= 0, self._sums, self._fired
        self._begin(pairs)
        self._round += 1
        if sums.shape[1]:
            keep = old.double()
            fired = fired[:, place.clamp(min=0)]
            keep = torch.where(fired.amin(0) >= ENOUGH, keep / 2, keep)
            self._sums = sums[:, place.clamp(min=0)] * keep
            self._fired = (fired * keep).long()

    def forget(self, latents: Tensor) -> None:
        """Stop following pairs that contain one of these latents."""
        keep = ~torch.isin(self._pairs, latents).any(0)
        self._pairs, self._sums, self._fired = self._pairs[:, keep], self._sums[:, keep], self._fired[:, keep]
        self._round += 1

    @staticmethod
    def state_bytes_at_most() -> int:
        return MOST_PAIRS * 8 * (2 + len(SUMS) + 2)

    def state_dict(self) -> dict[str, Any]:
        """Call it only when every `completed` was followed by its `settle`."""
        return {"pairs": self._pairs.clone(), "sums": self._sums.clone(), "fired": self._fired.clone()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        pairs, sums, fired = (state[name] for name in ("pairs", "sums", "fired"))
        count = pairs.shape[-1]
        if pairs.shape != (2, count) or sums.shape != (len(SUMS), count) or fired.shape != (2, count):
            raise ValueError(
                f"MergeEvidence.load_state_dict: expected pairs [2, P], sums [{len(SUMS)}, P] and fired [2, P], got "
                f"{list(pairs.shape)}, {list(sums.shape)} and {list(fired.shape)}"
            )
        self._begin(pairs.to(self.device, torch.int64, copy=True))
        self._sums.copy_(sums)
        self._fired.copy_(fired)
        self._round += 1


def _dots(residual: Tensor, row: Tensor, W_dec: Tensor, latent: Tensor) -> Tensor:
    """[E] float64: residual[row] . W_dec[latent], in tiles."""
    parts = [
        (residual[r] * W_dec[n].float()).sum(1, dtype=torch.float64)
        for r, n in zip(row.split(DOTS_AT_A_TIME), latent.split(DOTS_AT_A_TIME), strict=True)
    ]
    return torch.cat(parts)
