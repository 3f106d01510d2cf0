"""What the tests of streams share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from transcoder.activations import ActivationBatch, ActivationStream
from transcoder.activations.batch import columns_of
from transcoder.activations.local_files import local_data
from transcoder.activations.packing import sequence_ids
from transcoder.activations.record_sources import FileRecords


def files(path: Path, text_column: str, tokens_column: str | None) -> FileRecords:
    """The records of a local path in one of the formats that are read here."""
    return FileRecords(local_data(path, None, "train"), text_column, tokens_column)


def same(a: ActivationBatch, b: ActivationBatch) -> bool:
    """Whether all columns are equal, bit for bit."""
    x, y = columns_of(a), columns_of(b)
    return x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) and a.context_anchor == b.context_anchor


def ids_of(tokens: Tensor) -> list[int]:
    return [int(i) for i in sequence_ids(tokens.numpy())]


def drain(stream: ActivationStream, batches: int) -> None:
    for _ in range(batches):
        next(stream)


@dataclass
class EveryOther:
    """Keeps positions whose (pass + row + column) is even, weighted by the column."""

    steps: list[int]

    def sample_positions(self, batch_tokens: Tensor, step: int = 0) -> Any:
        self.steps.append(step)
        rows, columns = (torch.arange(n) for n in batch_tokens.shape)
        keep = (rows[:, None] + columns + step) % 2 == 0
        weights = columns.expand(batch_tokens.shape) / 8.0

        @dataclass
        class Sample:
            keep: Tensor
            weights: Tensor

        return Sample(keep, weights)
