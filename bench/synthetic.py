"""Activations that need no language model: sparse sums of planted directions, a linear map of their coefficients as target.

Batches are made once and reused, together more than the cache holds, so a run does not spend time on making them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch

from bench.interleaved_timing import pool_size
from transcoder.activations import ActivationBatch

SEQUENCE = 64
ACTIVE = 8


def batches(
    rows: int, d: int, features: int, device: torch.device, count: int | None = None, seed: int = 0
) -> list[ActivationBatch]:
    """`count` batches (default: more than the cache holds) of `rows` tokens in sequences of SEQUENCE."""
    g = torch.Generator().manual_seed(seed)
    read, write = (torch.nn.functional.normalize(torch.randn(features, d, generator=g), dim=1) for _ in range(2))
    made = []
    for number in range(pool_size(8 * rows * d) if count is None else count):
        ids = torch.randint(features, (rows, ACTIVE), generator=g)
        size = torch.rand(rows, ACTIVE, generator=g) + 0.5
        bags = {"per_sample_weights": size, "mode": "sum"}
        source = torch.nn.functional.embedding_bag(ids, read, **bags) + 0.05 * torch.randn(rows, d, generator=g)
        target = torch.nn.functional.embedding_bag(ids, write, **bags)
        place = torch.arange(rows)
        made.append(
            ActivationBatch(
                source.to(device),
                target.to(device),
                tokens=torch.randint(50_000, (rows,), generator=g).to(device),
                positions=(place % SEQUENCE).to(device),
                sequences=(number * rows + place // SEQUENCE).to(device),
            )
        )
    return made


def endless(made: list[ActivationBatch]) -> Iterator[ActivationBatch]:
    return itertools.cycle(made)
