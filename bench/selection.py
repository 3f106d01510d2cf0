"""Inputs whose selection does not depend on rounding: every right implementation selects the same entries."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

MARGIN = 1e-6
"""Of the largest activation, between the last that is selected and the first that is not: fp32 sums of d products are off by a
tenth of it and less."""
TRIES = 100


def clear(x: Tensor, W: Tensor, k: int, batch: bool, draw: Callable[..., Tensor]) -> Tensor:
    """x [rows, d] with those rows drawn again whose activations relu(x @ W.T) leave less than MARGIN between the last that is
    selected and the next. Raises RuntimeError after TRIES draws."""
    x = x.clone()
    for _ in range(TRIES):
        rows = _unclear(x, W, k, batch)
        if not len(rows):
            return x
        x[rows] = draw(len(rows), x.shape[1])
    raise RuntimeError(f"bench: no clear selection of {k} of {W.shape[0]} latents in {TRIES} draws")


def _unclear(x: Tensor, W: Tensor, k: int, batch: bool) -> Tensor:
    acts = (x.double() @ W.double().T).relu_()
    per_row = acts.shape[1]
    if batch:
        acts = acts.view(1, -1)
        k *= len(x)
    if k >= acts.shape[1]:
        return torch.empty(0, dtype=torch.long, device=x.device)
    top = acts.topk(k + 1, dim=1)
    last, following = top.values[:, k - 1], top.values[:, k]
    # Where nothing positive is left to select, both are 0 and so is what is selected.
    close = (last - following < MARGIN * top.values[:, 0]) & (last > 0)
    rows = close.nonzero().flatten()
    return top.indices[rows, k - 1] // per_row if batch else rows
