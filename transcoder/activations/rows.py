"""From one pass's activations to rows: sinks dropped, positions sampled, contexts attached, all counted."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch, batch_of
from transcoder.activations.documents import DataError
from transcoder.activations.masking import SinkMasker, context_anchor, context_windows
from transcoder.phases import phase

logger = logging.getLogger(__name__)

Substitute = Callable[[Tensor, Tensor], Tensor]
"""(source [T, d_in], target [T, d_out]) -> what a language model goes on with in the place of target."""


Group = tuple[Tensor, Tensor, Callable[[Substitute | None], Tensor]]
"""(tokens [S, L] int64, which of them are neither special nor padding [S, L] bool, the model's logits [S, L, vocabulary] on
them with what is given at the target hook, None for the model as it is)."""


class PositionSample(Protocol):
    """keep [S, L] bool and weights [S, L] fp32."""

    @property
    def keep(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...


class PositionChoice(Protocol):
    """Chooses the positions of a pass that train; free of state, so that resuming is exact.

    One that counts what it did has a second method, `record(sample: PositionSample) -> None`, and takes
    `record=False` in `sample_positions`: the stream then draws without counting, and hands each sample to
    `record` when its pass is taken for training. A pass that was made ahead and dropped at a stop is made
    again after a resume, and is so counted once.
    """

    def sample_positions(self, batch_tokens: Tensor, step: int = 0) -> PositionSample: ...


MakePositionChoice = Callable[[Sequence[int]], PositionChoice]
"""From the ids of special tokens, which the data knows."""


PASS_COLUMNS = ("source", "target", "tokens", "positions", "sequences")


@dataclass(frozen=True, eq=False)
class Pass:
    """T tokens' activations, in the order of the text.

    Fields:
        source [T, d_in], target [T, d_out]; tokens, positions, sequences [T] int64; valid [T] bool, False on
        padding.
        shape: (S, L) where the tokens are S whole sequences of length L.
        where: what an error calls this pass.
        documents: [T] int64, the place of each token's document in its data, -1 on padding; None where that is not known.
    """

    source: Tensor
    target: Tensor
    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    valid: Tensor
    shape: tuple[int, int] | None
    where: str
    documents: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Chunk:
    """The rows that one pass gives to training, the positions sampled for it, and the cursor from which the next
    pass follows."""

    rows: ActivationBatch
    sample: PositionSample | None
    cursor: dict[str, Any]


class Made(NamedTuple):
    """What a `RowMaker` makes of a pass: rows for training, sink rows, and the positions sampled."""

    rows: ActivationBatch
    sinks: ActivationBatch
    sample: PositionSample | None


_MASKED = ("masked_by_id", "masked_by_norm", "masked_by_position")
_TOTALS = ("passes", "tokens", *_MASKED, "left_by_sampler", "sink_ratio_sum", "not_finite", "sink_ratio_max")
MOST_NOT_FINITE = 0.1
"""Share of a pass's tokens that may hold NaN or infinity. A few are a fault of the model at those tokens; many are a wrong
dtype."""


class RowMaker:
    """Turns passes into rows; one for training, one for evaluation, each with its own totals.

    Args:
        masker: finds the sinks.
        context_tokens: width of the context windows; 0 attaches none.
        sampler: chooses positions; None keeps all of them.
    """

    def __init__(self, masker: SinkMasker, context_tokens: int, sampler: PositionChoice | None) -> None:
        self._masker, self._width, self._sampler = masker, context_tokens, sampler
        self._record: Callable[[PositionSample], None] | None = getattr(sampler, "record", None)
        # A sampler without `record` may not know the argument either.
        self._draw_only: dict[str, Any] = {} if self._record is None else {"record": False}
        self.totals = dict.fromkeys(_TOTALS, 0.0)

    def make(self, found: Pass, allowed: Tensor | None = None, step: int = 0) -> Made:
        """The rows and the sinks of a pass. `allowed` [T] bool leaves tokens out of both. Reads the device.

        A token with NaN or an infinity among its activations is in neither, and counted.

        Raises:
            DataError: more than `MOST_NOT_FINITE` of the pass's tokens are such.
        """
        sinks = self._masker.find(found.source, found.tokens, found.positions, found.valid)
        finite = torch.isfinite(found.source).all(1) & torch.isfinite(found.target).all(1)
        allowed = found.valid if allowed is None else found.valid & allowed
        usable = allowed & finite
        sink = sinks.any & usable
        keep = usable & ~sink
        kept_before = keep
        sample = weights = None
        if self._sampler is not None:
            sample = self._sample(self._sampler, found, step)
            weights = sample.weights.reshape(-1).float()
            keep = keep & sample.keep.reshape(-1)
        ratios = torch.where(sink & sinks.norm_ratio.isfinite(), sinks.norm_ratio, 0.0)
        found_here = {
            "tokens": allowed.sum(),
            "masked_by_id": (sinks.by_id & usable).sum(),
            "masked_by_norm": (sinks.by_norm & usable).sum(),
            "masked_by_position": (sinks.by_position & usable).sum(),
            "left_by_sampler": (kept_before & ~keep).sum(),
            "sink_ratio_sum": ratios.sum(),
            "not_finite": (allowed & ~finite).sum(),
            "sink_ratio_max": ratios.max(),
        }
        # One read a pass; the producer's thread waits for it, the trainer does not.
        values = torch.stack([value.double() for value in found_here.values()]).tolist()
        counts = dict(zip(found_here, values, strict=True))
        tokens, bad = counts["tokens"], counts["not_finite"]
        if bad > MOST_NOT_FINITE * tokens:
            raise DataError(
                f"{found.where}: NaN or infinity among the activations of {bad:.0f} of {tokens:.0f} tokens; float16 overflows "
                "on some models (Gemma-2 is one): set model.dtype to bfloat16 or float32"
            )
        if bad:
            logger.warning("%s: %d of %d tokens have NaN or infinity and are left out", found.where, bad, tokens)
        self._count(counts)
        return Made(self._rows(found, keep, weights), self._rows(found, sink, None), sample)

    def record(self, sample: PositionSample | None) -> None:
        """Let the sampler count a sample that `make` gave, if it counts."""
        if sample is not None and self._record is not None:
            self._record(sample)

    def _sample(self, sampler: PositionChoice, found: Pass, step: int) -> PositionSample:
        if found.shape is None:
            raise DataError(
                f"{found.where}: positions can only be sampled from whole sequences; set antidup.positions.train to "
                "false, or cache whole sequences in order"
            )
        with phase("anti-duplication: positions"):
            return sampler.sample_positions(found.tokens.view(found.shape), step=step, **self._draw_only)

    def _rows(self, found: Pass, keep: Tensor, weights: Tensor | None) -> ActivationBatch:
        index = keep.nonzero().squeeze(1)
        columns = {name: getattr(found, name)[index] for name in PASS_COLUMNS}
        if weights is not None:
            columns["weights"] = weights[index]
        anchor = 0
        if self._width:
            shown = found.tokens.masked_fill(~found.valid, -1)
            columns["contexts"] = context_windows(shown, found.positions, found.sequences, index, self._width)
            anchor = context_anchor(self._width)
        return batch_of(columns, anchor)

    def _count(self, counts: dict[str, float]) -> None:
        largest = max(self.totals["sink_ratio_max"], counts["sink_ratio_max"])
        for name, value in {"passes": 1.0, **counts}.items():
            # Totals of a checkpoint from before one of these was counted lack it.
            self.totals[name] = self.totals.get(name, 0.0) + value
        self.totals["sink_ratio_max"] = largest


def counters_of(totals: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    """A cursor's totals under the names that `ActivationStream.counters` gives."""
    sinks = sum(totals[name] for name in _MASKED)
    return {
        **{name: float(value) for name, value in counts.items()},
        "passes": totals["passes"],
        "tokens_seen": totals["tokens"],
        **{name: totals[name] for name in (*_MASKED, "left_by_sampler")},
        "not_finite": totals.get("not_finite", 0.0),
        "sink_norm_ratio": totals["sink_ratio_sum"] / sinks if sinks else 0.0,
        "sink_norm_ratio_max": totals["sink_ratio_max"],
        **{name: value for name, value in totals.items() if name.startswith("sinks_")},
    }


def grid(ids: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """(positions, sequence ids), each [S * length] int64, of whole sequences with these ids [S]."""
    positions = torch.arange(length, device=ids.device).repeat(len(ids))
    return positions, ids[:, None].expand(-1, length).reshape(-1)
