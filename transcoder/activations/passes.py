"""From one pass's activations to rows: sinks dropped, positions sampled, contexts attached, all counted."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from transcoder.activations.batch import ActivationBatch
from transcoder.activations.buffer import batch_of
from transcoder.activations.documents import DataError
from transcoder.activations.masking import SinkMasker, context_anchor, context_windows
from transcoder.activations.vocabulary import Vocabulary


class PositionSample(Protocol):
    """keep [S, L] bool and weights [S, L] fp32."""

    @property
    def keep(self) -> Tensor: ...
    @property
    def weights(self) -> Tensor: ...


class PositionChoice(Protocol):
    """Chooses the positions of a pass that train; free of state, so that resuming is exact."""

    def sample_positions(self, batch_tokens: Tensor, step: int = 0) -> PositionSample: ...


@dataclass(frozen=True, eq=False)
class Pass:
    """T tokens' activations, in the order of the text.

    Fields:
        source [T, d_in], target [T, d_out]; tokens, positions, sequences [T] int64; valid [T] bool, False on
        padding.
        shape: (S, L) where the tokens are S whole sequences of length L.
        where: what an error calls this pass.
    """

    source: Tensor
    target: Tensor
    tokens: Tensor
    positions: Tensor
    sequences: Tensor
    valid: Tensor
    shape: tuple[int, int] | None
    where: str


@dataclass(frozen=True, eq=False)
class Chunk:
    """The rows that one pass gives to training, and the cursor from which the next pass follows."""

    rows: ActivationBatch
    cursor: dict[str, Any]


class ActivationSource(Protocol):
    """What a stream draws from: a language model over text, or cached shards.

    `produce` gives the next pass's rows; `cursor` and `seek` save and restore the place; `heldout_passes`
    yields (rows, sinks) over the held-out data from its start, whatever the cursor; `holds_out` says if there
    are such data.
    """

    d_in: int
    d_out: int
    vocabulary: Vocabulary
    sequence_length: int
    identity: dict[str, Any]
    holds_out: bool

    def produce(self) -> Chunk: ...
    def cursor(self) -> dict[str, Any]: ...
    def seek(self, cursor: dict[str, Any]) -> None: ...
    def counters(self, cursor: dict[str, Any]) -> dict[str, float]: ...
    def heldout_passes(self) -> Iterator[tuple[ActivationBatch, ActivationBatch]]: ...


class RowMaker:
    """Turns passes into rows; one for training, one for evaluation, each with its own totals.

    Args:
        masker: finds the sinks.
        context_tokens: width of the context windows; 0 attaches none.
        sampler: chooses positions; None keeps all of them.
    """

    def __init__(self, masker: SinkMasker, context_tokens: int, sampler: PositionChoice | None) -> None:
        self._masker, self._width, self._sampler = masker, context_tokens, sampler
        self.totals: dict[str, float] = dict.fromkeys(
            (
                "passes",
                "tokens",
                "masked_by_id",
                "masked_by_norm",
                "masked_by_position",
                "left_by_sampler",
                "sink_ratio_sum",
            ),
            0.0,
        )
        self.totals["sink_ratio_max"] = 0.0

    def make(
        self, found: Pass, allowed: Tensor | None = None, step: int = 0
    ) -> tuple[ActivationBatch, ActivationBatch]:
        """(rows for training, sink rows) of a pass. `allowed` [T] bool leaves tokens out of both. Reads the
        device.

        Raises:
            DataError: a NaN or an infinity among the activations.
        """
        sinks = self._masker.find(found.source, found.tokens, found.positions, found.valid)
        usable = found.valid if allowed is None else found.valid & allowed
        sink = sinks.any & usable
        keep = usable & ~sink
        kept_before = keep
        weights = None
        if self._sampler is not None:
            weights, chosen = self._sample(found, step)
            keep = keep & chosen
        finite = torch.isfinite(found.source).all() & torch.isfinite(found.target).all()
        ratios = torch.where(sink & sinks.norm_ratio.isfinite(), sinks.norm_ratio, 0.0)
        # One read a pass; the producer's thread waits for it, the trainer does not.
        by_id, by_norm, by_position, tokens, left, total, largest, ok = torch.stack(
            [
                *((m & usable).sum().double() for m in (sinks.by_id, sinks.by_norm, sinks.by_position)),
                usable.sum().double(),
                (kept_before & ~keep).sum().double(),
                ratios.sum().double(),
                ratios.max().double(),
                finite.double(),
            ]
        ).tolist()
        if not ok:
            raise DataError(
                f"{found.where}: NaN or infinity among the activations; float16 overflows on some models "
                "(Gemma-2 is one): set model.dtype to bfloat16 or float32"
            )
        self._count(by_id, by_norm, by_position, tokens, left, total, largest)
        return self._rows(found, keep, weights), self._rows(found, sink, None)

    def _sample(self, found: Pass, step: int) -> tuple[Tensor, Tensor]:
        assert self._sampler is not None
        if found.shape is None:
            raise DataError(
                f"{found.where}: positions can only be sampled from whole sequences; set antidup.positions.enabled to "
                "false, or cache whole sequences in order"
            )
        sample = self._sampler.sample_positions(found.tokens.view(found.shape), step=step)
        return sample.weights.reshape(-1).float(), sample.keep.reshape(-1)

    def _rows(self, found: Pass, keep: Tensor, weights: Tensor | None) -> ActivationBatch:
        index = keep.nonzero().squeeze(1)
        every = {
            "source": found.source,
            "target": found.target,
            "tokens": found.tokens,
            "positions": found.positions,
            "sequences": found.sequences,
        }
        columns = {name: value[index] for name, value in every.items()}
        if weights is not None:
            columns["weights"] = weights[index]
        anchor = 0
        if self._width:
            shown = found.tokens.masked_fill(~found.valid, -1)
            columns["contexts"] = context_windows(shown, found.positions, found.sequences, index, self._width)
            anchor = context_anchor(self._width)
        return batch_of(columns, anchor)

    def _count(
        self,
        by_id: float,
        by_norm: float,
        by_position: float,
        tokens: float,
        left: float,
        total: float,
        largest: float,
    ) -> None:
        add = {
            "passes": 1.0,
            "tokens": tokens,
            "masked_by_id": by_id,
            "masked_by_norm": by_norm,
            "masked_by_position": by_position,
            "left_by_sampler": left,
            "sink_ratio_sum": total,
        }
        for name, value in add.items():
            self.totals[name] += value
        self.totals["sink_ratio_max"] = max(self.totals["sink_ratio_max"], largest)


def counters_of(totals: dict[str, float], counts: dict[str, int]) -> dict[str, float]:
    """A cursor's totals under the names that `ActivationStream.counters` gives."""
    sinks = totals["masked_by_id"] + totals["masked_by_norm"] + totals["masked_by_position"]
    return {
        **{name: float(value) for name, value in counts.items()},
        "passes": totals["passes"],
        "tokens_seen": totals["tokens"],
        "masked_by_id": totals["masked_by_id"],
        "masked_by_norm": totals["masked_by_norm"],
        "masked_by_position": totals["masked_by_position"],
        "left_by_sampler": totals["left_by_sampler"],
        "sink_norm_ratio": totals["sink_ratio_sum"] / sinks if sinks else 0.0,
        "sink_norm_ratio_max": totals["sink_ratio_max"],
    }


def grid(sequences: int, length: int, first: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """(positions, sequence ids), each [sequences * length] int64, of whole sequences from number `first`."""
    positions = torch.arange(length, device=device).repeat(sequences)
    numbers = torch.arange(first, first + sequences, device=device).repeat_interleave(length)
    return positions, numbers
