"""Which latents a rank owns."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Lanes:
    """Latent i lies on lane i mod `lanes`; rank r of `ranks` owns the lanes_per_rank consecutive lanes from r * lanes_per_rank.

    With W [d_sae, d] viewed as [d_sae / lanes, lanes, d], a rank's rows are a slice of dimension 1, so any number of ranks that
    divides `lanes` can read what another number has written; and each prefix of the dictionary is spread evenly over ranks.

    Raises: ValueError where `lanes` does not divide d_sae or `ranks` does not divide `lanes`.
    """

    d_sae: int
    lanes: int
    ranks: int
    rank: int

    def __post_init__(self) -> None:
        for name, whole, part in (("d_sae", self.d_sae, self.lanes), ("lanes", self.lanes, self.ranks)):
            if part < 1 or whole % part:
                other = "lanes" if name == "d_sae" else "ranks that share the latents"
                raise ValueError(f"{name}: expected a multiple of the number of {other}, {part}, got {whole}")
        if not 0 <= self.rank < self.ranks:
            raise ValueError(f"rank: expected one of 0 .. {self.ranks - 1}, got {self.rank}")

    @property
    def lanes_per_rank(self) -> int:
        return self.lanes // self.ranks

    @property
    def local(self) -> int:
        """Latents of a rank."""
        return self.d_sae // self.ranks

    def ids(self, local: Tensor) -> Tensor:
        """Global ids of local ones, int64. Ascending local ids give ascending global ids."""
        per = self.lanes_per_rank
        block = torch.div(local, per, rounding_mode="floor")
        return block * self.lanes + self.rank * per + (local - block * per)

    def width(self, width: int) -> int:
        """How many of the dictionary's first `width` latents are the rank's."""
        full, rest = divmod(width, self.lanes)
        return full * self.lanes_per_rank + min(max(rest - self.rank * self.lanes_per_rank, 0), self.lanes_per_rank)

    def take(self, whole: Tensor) -> Tensor:
        """The rank's rows of whole [d_sae, ...], contiguous."""
        per = self.lanes_per_rank
        split = whole.unflatten(0, (-1, self.lanes))
        return split[:, self.rank * per : (self.rank + 1) * per].flatten(0, 1).contiguous()

    def join(self, parts: list[Tensor]) -> Tensor:
        """The whole [d_sae, ...] of every rank's rows, in the order of ranks."""
        return torch.cat([part.unflatten(0, (-1, self.lanes_per_rank)) for part in parts], 1).flatten(0, 1)
