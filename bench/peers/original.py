"""The original project's step, reimplemented from its description (its code is not here): BatchTopK over dense codes, each
Matryoshka prefix decoded by its own dense product, and its monitor: every step's dense codes [B, N] copied to the host and
100 of them kept, and every 100 steps a Python loop over all pairs of latents.

Faults in the description that would change the mathematics are not repeated: the prefixes enter the loss here.
"""

from __future__ import annotations

import itertools
import time
from collections import deque

import torch
from torch import Tensor

from bench.cases import BETAS, LEARNING_RATE, WEIGHTS, Case, Probe, answers
from bench.interleaved_timing import Variant
from bench.peers.eager import encoded, finish

KEPT = 100
"""Batches that its monitor keeps; the same number of steps lies between two of its reports."""
HELD_BYTES = 512 << 20
"""Bytes of batches that are kept here; the memory of all of them is computed instead."""
PAIRS = 200
"""Number of pairs of its loop that are timed."""


def missing() -> str | None:
    return None


def step(case: Case) -> list[Variant]:
    if len(case.widths) == 1 or case.activation == "topk":
        return []
    return [_step(case, monitored) for monitored in (False, True)]


def _step(case: Case, monitored: bool) -> Variant:
    size = case.size
    weights = {name: case.leaf(name) for name in WEIGHTS}
    adam = torch.optim.Adam(weights.values(), lr=LEARNING_RATE, betas=BETAS)
    kept: deque[Tensor] = deque(maxlen=max(2, min(KEPT, HELD_BYTES // (4 * size.rows * size.d_sae))))

    def loss(x: Tensor) -> tuple[Tensor, Tensor]:
        z = encoded(x, weights["W_enc"], weights["b_enc"], size.k, batch=True)
        parts = [((z[:, :w] @ weights["W_dec"][:w] + weights["b_dec"] - x) ** 2).mean() for w in case.widths]
        return torch.stack(parts).sum() * size.d, z

    def forward(i: int) -> None:
        value, z = loss(case.x(i))
        value.backward()
        finish(weights, adam)
        if monitored:
            kept.append(z.detach().cpu().clone())

    def answer(probe: Probe) -> dict[str, Tensor]:
        value, _ = loss(probe.x)
        value.backward()
        return {"loss": value, **answers(WEIGHTS, *weights.values())}

    note = "dense codes and prefixes, each from its first latent on; Adam as PyTorch does it by default"
    if monitored:
        note += (
            f"; a dense copy [B, N] a step to the host, {KEPT * 4 * size.rows * size.d_sae / 1e9:.1f} GB when full; "
        )
        loop = pair_loop_seconds(case, KEPT * size.rows)
        note += f"not in this time: its loop over all pairs every {KEPT} steps, {loop:,.0f} s by {PAIRS} pairs timed and scaled"
    return Variant(
        f"original project{', monitor on' if monitored else ''}",
        forward,
        None,
        lambda: adam.zero_grad(set_to_none=True),
        answer,
        note=note,
    )


def pair_loop_seconds(case: Case, tokens: int) -> float:
    """Seconds that one of its reports would take: a Python loop over the N (N - 1) / 2 pairs, a correlation each from
    `tokens` kept tokens. Timed over PAIRS pairs and scaled."""
    z = case.draw(tokens, min(case.size.d_sae, 32)).cpu().relu()
    start = time.perf_counter()
    found = 0
    for i, j in itertools.islice(itertools.combinations(range(z.shape[1]), 2), PAIRS):
        if float(torch.corrcoef(torch.stack([z[:, i], z[:, j]]))[0, 1]) > 0.8:
            found += 1
    each = (time.perf_counter() - start) / PAIRS
    return each * case.size.d_sae * (case.size.d_sae - 1) / 2
