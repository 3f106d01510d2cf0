"""Which signs a sketch holds, as ranges of update numbers. A sign that serves two tokens makes them look alike, so sketches
that share one must not be added; blocks of one stream and streams of different ranks share none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class SignRange(NamedTuple):
    """The signs of (seed, rank, n) for first <= n < stop; the seed is that of the whole sketch."""

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
