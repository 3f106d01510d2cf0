"""Means of a logging interval, kept on the device and read once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


class Meters:
    """`add` accumulates device tensors (0-dim, or vectors under a list of names); `read` transfers all of them at once."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._device = device
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = {}

    @torch.no_grad()
    def add(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            value = value.detach().to(torch.float64, copy=True)
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + 1

    def read(self, also: Mapping[str, Tensor] | None = None) -> dict[str, float]:
        """Means since the last read, and the present values in `also`: one transfer. Starts the next interval."""
        parts = {name: total / self._counts[name] for name, total in self._sums.items()}
        parts.update({name: value.detach().double() for name, value in (also or {}).items()})
        self._sums, self._counts = {}, {}
        if not parts:
            return {}
        return dict(zip(parts, torch.stack(list(parts.values())).tolist(), strict=True))

    def state_dict(self) -> dict[str, Any]:
        return {"sums": dict(self._sums), "counts": dict(self._counts)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        sums, counts = dict(state["sums"]), dict(state["counts"])
        if sums.keys() != counts.keys():
            raise ValueError(
                f"Meters.load_state_dict: expected a count for each sum, got {sorted(sums)} and {sorted(counts)}"
            )
        self._sums, self._counts = {name: value.to(self._device) for name, value in sums.items()}, counts
