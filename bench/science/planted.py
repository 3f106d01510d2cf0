"""S0's stream: pairs of latents with a known correlation and support, written down token by token.

Each pair fires on `support` tokens of a block (at least one of the two), in one of two ways:

- `overlap`: both have the same amplitude where both fire, and fire together on the share rho of each one's tokens. With
  means that are small against the firing amplitude, the Pearson correlation over all tokens is rho.
- `amplitude`: both fire on the same tokens with amplitudes that are the same with probability s and independent otherwise:
  E z_i z_j / E z^2 = s + (1 - s) q with q = (E z)^2 / E z^2, and s is chosen so that this is rho.

Amplitudes are exponential (q = 1/2) or, with `heavy`, exp(N(0, 1)), whose tail is far heavier (q = 1/e).

Both have mean zero bias up to support / (2 tokens), which is below 0.004 at the shipped sizes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from transcoder.kernels import SparseCodes

RHOS = (0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 1.0)
SUPPORTS = (30, 100, 300, 1000)
SEQUENCE = 64
"""Tokens of one sequence: the planted firings fall on random tokens, so on nearly as many sequences."""
BACKGROUND = 128
ALWAYS_ON = 1
"""One latent that always fires (mean 35, sd 0.15): one-pass variances in fp32 come out negative on it."""


@dataclass(frozen=True)
class Stream:
    """`blocks` blocks of `tokens` tokens; latents 2p and 2p + 1 are pair p, then the background, then the always-on latent."""

    replicas: int
    tokens: int
    blocks: int
    seed: int
    heavy: bool = False

    def amplitudes(self, shape: tuple[int, ...], g: torch.Generator) -> Tensor:
        if self.heavy:
            return torch.randn(shape, generator=g).exp()
        return torch.empty(shape).exponential_(generator=g)

    @property
    def pairs(self) -> int:
        return len(RHOS) * len(SUPPORTS) * 2 * self.replicas

    @property
    def d_sae(self) -> int:
        return 2 * self.pairs + BACKGROUND + ALWAYS_ON

    def truth(self) -> tuple[Tensor, Tensor, Tensor]:
        """(rho [P], support [P], overlap [P] bool) of the pairs."""
        cells = [(rho, support, mode) for rho in RHOS for support in SUPPORTS for mode in (True, False)]
        rho, support, mode = (
            torch.tensor(column).repeat_interleave(self.replicas) for column in zip(*cells, strict=True)
        )
        return rho, support, mode.bool()

    def block(self, index: int) -> SparseCodes:
        """One block's codes, (tokens, d_sae)."""
        g = torch.Generator().manual_seed(self.seed * 1000 + index)
        rho, support, overlap = self.truth()
        most = max(SUPPORTS)
        used = torch.arange(most) < support[:, None]
        token = distinct(self.pairs, most, self.tokens, g)
        size, own = self.amplitudes((self.pairs, most), g), self.amplitudes((self.pairs, most), g)
        draw = torch.rand(self.pairs, most, generator=g)
        q = 1 / math.e if self.heavy else 0.5
        same = draw < ((rho - q) / (1 - q))[:, None]
        # Of a union, the share s / (2 - s) is joint when each one's joint share is s; the rest falls to either.
        joint = draw < (rho / (2 - rho))[:, None]
        first = torch.rand(self.pairs, most, generator=g) < 0.5
        in_i = used & (~overlap[:, None] | joint | first)
        in_j = used & (~overlap[:, None] | joint | ~first)
        z_j = torch.where(overlap[:, None] | same, size, own)
        pair = torch.arange(self.pairs)[:, None].expand(self.pairs, most)
        parts = [
            (token[in_i], 2 * pair[in_i], size[in_i]),
            (token[in_j], 2 * pair[in_j] + 1, z_j[in_j]),
            *self._background(g),
        ]
        row, latent, value = (torch.cat(column) for column in zip(*parts, strict=True))
        order = (row * self.d_sae + latent).argsort()
        row_ptr = torch.zeros(self.tokens + 1, dtype=torch.int64)
        torch.cumsum(torch.bincount(row, minlength=self.tokens), 0, out=row_ptr[1:])
        return SparseCodes(value[order].float(), latent[order], row_ptr, (self.tokens, self.d_sae))

    def _background(self, g: torch.Generator) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for n in range(BACKGROUND):
            rate = 10 ** float(torch.empty(()).uniform_(-3.5, -1.5, generator=g))
            row = (torch.rand(self.tokens, generator=g) < rate).nonzero().flatten()
            yield row, torch.full_like(row, 2 * self.pairs + n), torch.empty(row.numel()).exponential_(generator=g)
        every = torch.arange(self.tokens)
        always = 35 + 0.15 * torch.randn(self.tokens, generator=g)
        yield every, torch.full_like(every, self.d_sae - 1), always

    def sequences(self, index: int) -> Tensor:
        """[tokens] int64 sequence ids of a block, none of which another block has."""
        return (index * self.tokens + torch.arange(self.tokens)) // SEQUENCE


def distinct(rows: int, columns: int, below: int, generator: torch.Generator) -> Tensor:
    """[rows, columns] int64 in [0, below), no number twice in a row: uniform draws, of which repetitions are drawn again."""
    drawn = torch.randint(below, (rows, columns), generator=generator)
    while True:
        ordered, order = drawn.sort(dim=1, stable=True)
        again = torch.zeros_like(drawn, dtype=torch.bool)
        again[:, 1:] = ordered[:, 1:] == ordered[:, :-1]
        repeated = torch.zeros_like(again).scatter_(1, order, again)
        if not bool(repeated.any()):
            return drawn
        drawn[repeated] = torch.randint(below, (int(repeated.sum()),), generator=generator)


def batches(codes: SparseCodes, size: int) -> Iterator[tuple[int, SparseCodes]]:
    """(first row, codes of up to `size` rows), in order."""
    for a in range(0, codes.shape[0], size):
        b = min(a + size, codes.shape[0])
        first, last = int(codes.row_ptr[a]), int(codes.row_ptr[b])
        yield (
            a,
            SparseCodes(
                codes.values[first:last],
                codes.indices[first:last],
                codes.row_ptr[a : b + 1] - first,
                (b - a, codes.shape[1]),
            ),
        )
