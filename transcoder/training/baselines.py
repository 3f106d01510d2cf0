"""What a transcoder must beat: predicting the mean, and the least-squares linear map from source to target."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class LinearBaseline:
    """Streaming least squares y ~ A x + c by its normal equations, fp64 sums, until `limit` tokens were seen.

    Memory: (d_in + 1) * (d_in + 1 + d_out) doubles. No host sync in `update`.
    """

    RIDGE = 1e-9
    """Share of the mean diagonal added before solving: only keeps collinear inputs solvable."""

    def __init__(self, d_in: int, d_out: int, limit: int, device: torch.device | str = "cpu") -> None:
        self.limit = limit
        self.tokens = 0
        self.gram = torch.zeros(d_in + 1, d_in + 1, dtype=torch.float64, device=device)
        self.cross = torch.zeros(d_in + 1, d_out, dtype=torch.float64, device=device)

    def update(self, source: Tensor, target: Tensor) -> None:
        """Add source [B, d_in] and target [B, d_out]."""
        if self.tokens >= self.limit:
            return
        # fp64 throughout: a few huge coordinates (a language model's norms) must not drown the small ones.
        x = _with_one(source.double())
        self.gram += x.T @ x
        self.cross += x.T @ target.double()
        self.tokens += source.shape[0]

    def mean(self) -> Tensor:
        """[d_out] fp32: the mean target."""
        return (self.cross[-1] / max(1, self.tokens)).float()

    def solve(self) -> Tensor:
        """[d_in + 1, d_out] fp32: the map, its last row the constant."""
        ridge = self.RIDGE * self.gram.diagonal().mean()
        regularised = self.gram + ridge * torch.eye(self.gram.shape[0], dtype=torch.float64, device=self.gram.device)
        return torch.linalg.solve(regularised, self.cross).float()

    @staticmethod
    def predict(solution: Tensor, source: Tensor) -> Tensor:
        """[B, d_out] from source [B, d_in]."""
        return _with_one(source.float()) @ solution

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self.tokens, "gram": self.gram, "cross": self.cross}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """All of it or, with a ValueError, nothing."""
        tokens = int(state["tokens"])
        for name, mine in (("gram", self.gram), ("cross", self.cross)):
            # copy_ would broadcast a smaller one.
            if state[name].shape != mine.shape:
                raise ValueError(
                    f"LinearBaseline.load_state_dict: {name}: expected shape {list(mine.shape)}, got {list(state[name].shape)}"
                )
        self.tokens = tokens
        self.gram.copy_(state["gram"])
        self.cross.copy_(state["cross"])


def _with_one(x: Tensor) -> Tensor:
    return torch.cat([x, x.new_ones(x.shape[0], 1)], dim=1)
