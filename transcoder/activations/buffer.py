"""The shuffle buffer: rows of many sequences on the device, drawn without replacement, refilled in part."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch, batch_of, columns_of, take_rows


def to_device(host: Tensor, device: torch.device) -> Tensor:
    """A host tensor on `device`, without waiting for what the device is doing.

    A copy from pageable memory makes the host wait until the device reaches it; from pinned memory it is queued.
    """
    if device.type == "cuda":
        host = host.pin_memory()
    return host.to(device, non_blocking=True)


def permutation(length: int, *key: int | str) -> Tensor:
    """[length] int64 on the CPU: a random permutation that depends on the key alone, on any machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
    return torch.randperm(length, generator=generator, device="cpu")


class ShuffleBuffer:
    """`capacity` rows in a fixed allocation; batches are drawn without replacement in a random order.

    When `refill_fraction` of the rows have been drawn, new ones take their slots and all rows, old and new,
    are shuffled again: each batch mixes sequences that entered at different times. Every row is delivered
    exactly once. The order depends on (seed, number of the refill) and on the rows' history, not on where
    they lie: a buffer saved and loaded goes on bitwise.
    """

    def __init__(self, capacity: int, batch_size: int, refill_fraction: float, seed: int) -> None:
        self._capacity, self._batch_size, self._seed = capacity, batch_size, seed
        self._refill_at = max(1, math.ceil(refill_fraction * capacity))
        self._columns: dict[str, Tensor] = {}
        self._anchor = 0
        self._order = torch.empty(0, dtype=torch.int64, device="cpu")
        self._drawn = capacity
        self._refills = 0

    @property
    def refill_rows(self) -> int:
        """The most rows that a refill takes, the first one aside, which takes `capacity`."""
        whole = -(-self._refill_at // self._batch_size) * self._batch_size
        return min(whole, self._capacity // self._batch_size * self._batch_size)

    @property
    def room(self) -> int:
        """Rows drawn so far, so free slots; all of them at the start."""
        return self._drawn

    @property
    def needs_refill(self) -> bool:
        return self._drawn >= self._refill_at or self._capacity - self._drawn < self._batch_size

    def refill(self, batches: Sequence[ActivationBatch]) -> list[ActivationBatch]:
        """Put the first `room` rows of the batches into the free slots and shuffle everything.

        Returns:
            The rows that found no room, as views.
        """
        rows = sum(map(len, batches))
        if rows < self.room:
            raise ValueError(f"ShuffleBuffer.refill: expected at least {self.room} rows, got {rows}")
        self._allocate(batches[0])
        free, kept = self._order[: self._drawn], self._order[self._drawn :]
        begin = 0
        rest: list[ActivationBatch] = []
        for batch in batches:
            slots = free[begin : begin + len(batch)]
            for name, value in columns_of(batch).items():
                self._columns[name][slots] = value[: len(slots)]
            begin += len(slots)
            if len(slots) < len(batch):
                rest.append(take_rows(batch, slice(len(slots), None)))
        shuffle = permutation(self._capacity, "refill", self._seed, self._refills)
        self._order = torch.cat([kept, free])[to_device(shuffle, free.device)]
        self._drawn = 0
        self._refills += 1
        return rest

    def draw(self) -> ActivationBatch:
        """The next batch: fresh tensors, in random order."""
        rows = self._order[self._drawn : self._drawn + self._batch_size]
        batch = batch_of({name: value[rows] for name, value in self._columns.items()}, self._anchor)
        self._drawn += self._batch_size
        return batch

    def _allocate(self, like: ActivationBatch) -> None:
        if self._columns:
            return
        for name, value in columns_of(like).items():
            self._columns[name] = value.new_empty((self._capacity, *value.shape[1:]))
        self._anchor = like.context_anchor
        self._order = torch.arange(self._capacity, device=like.source.device)

    def state_dict(self) -> dict[str, Any]:
        """The rows not drawn yet, in the order in which they are due, and the number of refills."""
        due = self._order[self._drawn :]
        rows = {name: value[due] for name, value in self._columns.items()}
        return {"rows": rows, "refills": self._refills, "anchor": self._anchor}

    def load_state_dict(self, state: dict[str, Any], device: torch.device) -> None:
        rows: dict[str, Tensor] = state["rows"]
        self._columns, self._refills, self._drawn = {}, int(state["refills"]), self._capacity
        if not rows:
            return
        held = rows["source"].shape[0]
        if held > self._capacity:
            raise ValueError(
                f"activations.buffer_tokens: the saved buffer holds {held} tokens and this one has room for "
                f"{self._capacity}; resume with the setting that the run was started with"
            )
        moved = {name: value.to(device) for name, value in rows.items()}
        self._allocate(batch_of(moved, int(state["anchor"])))
        self._drawn = self._capacity - held
        for name, value in moved.items():
            self._columns[name][self._drawn :] = value
