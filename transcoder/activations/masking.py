"""Which tokens are sinks, and the windows of token ids around the others."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from transcoder.config import ActivationsSection

UNFOUND_MULTIPLE = 10.0
"""What `auto` masks by where no group stands apart: a token that is rarer than the tokens looked at can still be one."""
FIT_TOKENS = 8192
"""Fewest tokens that sinks are looked for in: of a group of 0.5 % these hold about 40."""
_MOST_SINKS, _FEWEST_SINKS = 0.1, 8
_LEAST_HELD, _LEAST_TIMES = 0.02, 4.0
_LARGE, _MUCH = 3.0, 0.1
"""`heavy_tokens` are those above this multiple of the median norm, where they hold this much of the squared norms."""


@dataclass(frozen=True)
class Sinks:
    """A group of tokens whose norms stand apart from those of the others.

    Fields:
        multiple: norm that separates them, over the median norm.
        share: of the tokens.
        held: share of the summed squared norms.
        tokens: number of tokens looked at.
        largest: largest norm over the median.
    """

    multiple: float
    share: float
    held: float
    tokens: int
    largest: float

    def __str__(self) -> str:
        return (
            f"{100 * self.share:.2g} % of {self.tokens} tokens have more than {self.multiple:.3g} times the median norm (at "
            f"most {self.largest:.3g} times) and hold {100 * self.held:.2g} % of the squared norms"
        )


def find_sinks(norms: Tensor) -> Sinks | None:
    """The sinks among tokens with these norms [T], fp32; None where none stand apart. Reads the device.

    The tail of ordinary tokens thins out: of those above a norm, a larger share is lost with each further step in log-norm, or
    at least the same. Where it thins at a third of that rate or less, over a step that would take away most of it, another
    group begins. The rate is that between the 70th and the 85th percentile, which a few per cent of sinks hardly move. A group
    counts where it is at most a tenth of the tokens, holds at least 2 % of the squared norms, and 4 times its share. The norm
    that separates it lies half-way, in log-norm, between the end of the ordinary tokens and the group's own 5th percentile.
    """
    squares = norms[torch.isfinite(norms) & (norms > 0)].double().square().sort().values.cpu()
    count = len(squares)
    if count < 8 * _FEWEST_SINKS:
        return None
    log = squares.log() / 2
    median, lower, upper = (float(log[round(q * (count - 1))]) for q in (0.5, 0.7, 0.85))
    rate = math.log(2) / max(upper - lower, 1e-3)
    step = min(max(1 / rate, 0.1), 0.5)
    first = count - max(1, int(_MOST_SINKS * count))
    above = count - 1 - torch.arange(first, count, device="cpu")
    beyond = count - torch.searchsorted(log, log[first:] + step, right=True)
    stays = math.exp(-max(1.0, rate * step) / 3)
    apart = (beyond >= _FEWEST_SINKS) & (beyond >= stays * above) & (log[first:] > median + step)
    for start in apart.nonzero().flatten().tolist():
        group = int(beyond[start])
        share, held = group / count, float(squares[-group:].sum() / squares.sum())
        if held >= max(_LEAST_HELD, _LEAST_TIMES * share):
            ends = float(log[first + start])
            begins = max(float(log[count - group + group // 20]), ends + step)
            border = (ends + begins) / 2
            share = float((log > border).double().mean())
            held = float(squares[log > border].sum() / squares.sum())
            return Sinks(math.exp(border - median), share, held, count, math.exp(float(log[-1]) - median))
    return None


def heavy_tokens(norms: Tensor) -> str:
    """In words, which of the tokens with these norms [T] hold far more of the squared norms than their share; empty where none
    do. Reads the device."""
    sinks = find_sinks(norms)
    if sinks is not None:
        return str(sinks)
    squares = norms.double().square()
    large = norms > _LARGE * norms.median()
    held = float(squares[large].sum() / squares.sum().clamp(min=1e-30))
    if held < _MUCH:
        return ""
    share, most = float(large.double().mean()), float(norms.max() / norms.median())
    return str(Sinks(_LARGE, share, held, len(norms), most))


@dataclass(frozen=True, eq=False)
class SinkMask:
    """Per token of one forward pass, each [T]; no token is True in two of the first three.

    Fields:
        by_id: a special token.
        by_position: position 0, not masked by id.
        by_norm: a source norm above the multiple of the median, not masked otherwise.
        norm_ratio: fp32 source norm over the median norm of the pass's non-pad tokens.
    """

    by_id: Tensor
    by_position: Tensor
    by_norm: Tensor
    norm_ratio: Tensor

    @property
    def any(self) -> Tensor:
        return self.by_id | self.by_position | self.by_norm


class SinkMasker:
    """Finds sinks by token id, by norm and, if asked, by position.

    Sink tokens carry a nearly constant input of large norm, so every latent that fires on them is collinear
    with every other: they make duplicates and spend the dictionary on one vector. They are dropped from the
    data, and so from every loss and statistic behind it.
    """

    def __init__(
        self,
        section: ActivationsSection,
        special_ids: Sequence[int],
        vocabulary_size: int,
        pad_id: int | None,
        device: torch.device,
    ) -> None:
        self._section = section
        self._pad_id = pad_id
        special = torch.zeros(vocabulary_size, dtype=torch.bool, device="cpu")
        special[list(special_ids)] = True
        self._special = special.to(device)
        multiple = section.mask_norm_multiple
        self.multiple = UNFOUND_MULTIPLE if multiple == "auto" else multiple
        """Norms above this multiple of the median are masked; None: none are. `fit` sets it."""

    def find(self, source: Tensor, tokens: Tensor, positions: Tensor, valid: Tensor) -> SinkMask:
        """The sinks among T tokens of one pass. No host sync.

        Args:
            source: [T, d_in] activations, any floating dtype.
            tokens: [T] int64 ids; positions: [T] int64.
            valid: [T] bool, False on padding, which is neither a sink nor part of the median.
        """
        norms = torch.linalg.vector_norm(source, dim=-1, dtype=torch.float32)
        counted = valid if self._pad_id is None else valid & (tokens != self._pad_id)
        median = norms.masked_fill(~counted, float("nan")).nanmedian()
        ratio = norms / median
        nothing = torch.zeros_like(valid)
        by_id = self._special[tokens] & valid if self._section.mask_bos else nothing
        by_position = (positions == 0) & valid & ~by_id if self._section.mask_position_zero else nothing
        by_norm = nothing
        if self.multiple is not None:
            by_norm = (ratio > self.multiple) & valid & ~by_id & ~by_position
        return SinkMask(by_id, by_position, by_norm, ratio)

    def candidates(self, source: Tensor, tokens: Tensor, positions: Tensor, valid: Tensor) -> dict[str, Tensor]:
        """{ratios, tokens, positions}, each [n]: what `fit` looks at of a pass, the tokens that no id and no position masks."""
        mask = self.find(source, tokens, positions, valid)
        kept = valid & ~mask.by_id & ~mask.by_position
        return {"ratios": mask.norm_ratio[kept], "tokens": tokens[kept], "positions": positions[kept]}

    def fit(self, ratios: Tensor, tokens: Tensor, positions: Tensor) -> dict[str, Any]:
        """Set `multiple` from the norms of ordinary tokens, each [n], see `candidates`. Reads the device.

        Returns: JSON values: the multiple and, where a group was found, the fields of `Sinks`, the share of the group at
        position 0, and its most frequent token ids with their shares of it.
        """
        sinks = find_sinks(ratios)
        self.multiple = UNFOUND_MULTIPLE if sinks is None else round(sinks.multiple, 3)
        if sinks is None:
            return {"multiple": self.multiple, "tokens": len(ratios), "share": 0.0, "held": 0.0}
        inside = ratios > self.multiple
        ids, counts = tokens[inside].unique(return_counts=True)
        most = counts.argsort(descending=True, stable=True)[:5]
        return {
            **vars(sinks),
            "multiple": self.multiple,
            "at_position_0": float((positions[inside] == 0).double().mean()),
            "ids": ids[most].tolist(),
            "id_shares": [count / int(inside.sum()) for count in counts[most].tolist()],
        }


def context_anchor(width: int) -> int:
    """The column of a context window that holds the token itself: three quarters of the rest go before."""
    return 3 * (width - 1) // 4


def context_windows(tokens: Tensor, positions: Tensor, sequences: Tensor, index: Tensor, width: int) -> Tensor:
    """[n, width] int32: the token ids around each of `index` in its own sequence, -1 where there is none.

    Args:
        tokens, positions, sequences: [T] int64, in stream order.
        index: [n] int64, which of the T tokens.
        width: columns; column `context_anchor(width)` is the token itself.

    Equivalent to: `tokens[index[:, None] + offsets]` where sequence and distance agree, else -1.
    """
    offsets = torch.arange(width, device=tokens.device) - context_anchor(width)
    at = index[:, None] + offsets
    inside = at.clamp(0, tokens.numel() - 1)
    same = (sequences[inside] == sequences[index][:, None]) & (positions[inside] - positions[index][:, None] == offsets)
    return torch.where(same & (at == inside), tokens[inside], -1).to(torch.int32)
