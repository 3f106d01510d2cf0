"""Recycling: pairs whose fold costs nothing are folded, and the freed latents are reset."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from transcoder.antidup import CorrelationMonitor
from transcoder.antidup.merge_cost import MergeResult
from transcoder.config import RecycleSection
from transcoder.files import replace_lines
from transcoder.kernels.correlation.counter_rng import key_state
from transcoder.model import Transcoder

LEAST_LENGTH = 0.1
"""Of a folded decoder row; below it the two rows cancel, and one latent cannot stand for them."""


class Recycler:
    """Rounds of recycling, each after a correlation report with a merge test, each pair of it logged to `recycled.jsonl`.

    Args:
        section: how often and how many.
        seed: with the step it keys the rows of the freed latents: no state, no global generator.
        out_dir: folder of `recycled.jsonl`.
    """

    def __init__(self, section: RecycleSection, seed: int, out_dir: Path) -> None:
        self.section, self._seed = section, seed
        self.path = out_dir / "recycled.jsonl"
        self.total = 0
        """Latents recycled so far in the run."""

    def act(
        self,
        step: int,
        transcoder: Transcoder,
        optimizer: torch.optim.Optimizer,
        monitor: CorrelationMonitor,
        heldout_fvu: Callable[[], float],
    ) -> list[dict[str, int | float]]:
        """Recycle what the report of this step found foldable. Reads the device.

        Returns: one line a pair, for `log`, each with the held-out FVU before and after the whole round. These count what
        the fold changes in the selection; the merge test does not.
        """
        found = _disjoint(monitor.foldable(), transcoder.W_dec, self.section.max_per_round)
        if found.kept.numel() == 0:
            return []
        before = heldout_fvu()
        transcoder.recycle(found.kept, found.dropped, found.scale, seed=key_state(self._seed, step) & (2**63 - 1))
        # The moments of the freed latent's gradients say nothing about those of the reset one.
        for parameter in transcoder.latent_parameters:
            state = optimizer.state.get(parameter, {})
            for name in ("exp_avg", "exp_avg_sq"):
                if name in state:
                    state[name].index_fill_(0, found.dropped, 0)
        transcoder.refresh_dead()
        # Both have changed: the kept one is larger and fires more often.
        monitor.forget(torch.cat([found.kept, found.dropped]))
        round_fvu = {"round_fvu_before": before, "round_fvu_after": heldout_fvu()}
        self.total += found.kept.numel()
        columns = (found.kept, found.dropped, found.scale, found.cost_share, found.fvu_change)
        names = ("kept", "dropped", "scale", "merge_share", "merge_fvu_change")
        rows = zip(*(column.tolist() for column in columns), strict=True)
        return [{"step": step, **dict(zip(names, row, strict=True)), **round_fvu} for row in rows]

    def log(self, step: int, lines: list[dict[str, int | float]]) -> None:
        """Append them to the file. Raises: OSError."""
        replace_lines(self.path, step, lines)

    def state_dict(self) -> dict[str, int]:
        return {"total": self.total}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.total = int(state["total"])


def _disjoint(found: MergeResult, W_dec: Tensor, most: int) -> MergeResult:
    """The first pairs, in order, whose rows do not cancel and that share no latent: a group of copies is folded one a round."""
    folded = W_dec.detach()[found.kept] + found.scale.to(W_dec.dtype)[:, None] * W_dec.detach()[found.dropped]
    lengths = folded.norm(dim=1).tolist()
    used: set[int] = set()
    chosen: list[int] = []
    for n, pair in enumerate(zip(found.kept.tolist(), found.dropped.tolist(), strict=True)):
        if len(chosen) < most and lengths[n] > LEAST_LENGTH and not used.intersection(pair):
            used.update(pair)
            chosen.append(n)
    index = torch.tensor(chosen, dtype=torch.int64, device=found.kept.device)
    return MergeResult(*(getattr(found, name)[index] for name in MergeResult.__dataclass_fields__))
