"""One reading of a source for all layers of a run: a pass is made once, and each layer takes its rows when it needs them."""

from __future__ import annotations

import itertools
import logging
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from transcoder.activations.activation_source import ActivationSource, LayerSource
from transcoder.activations.batch import ActivationBatch
from transcoder.activations.prefetch import Prefetcher
from transcoder.activations.rows import Chunk, Pass, RowMaker

logger = logging.getLogger(__name__)

KEPT_BYTES = 1 << 30
"""Activations of passes from the start of the data that are kept for other layers."""
Heldout = tuple[list[ActivationBatch], list[ActivationBatch]]
"""Rows and sinks, pass by pass."""


@dataclass
class _Reader:
    """One layer: what waits for it, and the place behind what it has taken."""

    source: LayerSource
    cursor: dict[str, Any]
    refill_rows: int
    most_rows: int
    waiting: deque[Chunk] = field(default_factory=deque)
    left: bool = False
    told: bool = False


class PassFeed:
    """The passes of a source in a thread that runs ahead, made into rows for each layer that has joined.

    Layers take chunks at their own pace: they mask different tokens as sinks, so one may need a pass more than another. A chunk
    waits for each layer that has not come to it; a layer that falls behind by more than its `most_rows` rows loses the
    oldest, with a warning. Layers may also begin at different places (a run that was killed between two checkpoints): the
    source then goes on from the earliest, and passes that a layer has had already are not made into rows for it.
    """

    def __init__(self, source: ActivationSource, prefetch: int) -> None:
        self.source, self._prefetch = source, prefetch
        self._readers: list[_Reader] = []
        self._producer: Prefetcher[list[Chunk | None]] | None = None
        self._made = 0
        """Passes up to the place of the source."""
        self._heldout: dict[tuple[int, int], Heldout] = {}
        self._kept: dict[bool, tuple[Iterator[list[Pass]], list[list[Pass]]]] = {}
        """By whether they are held out: passes from the start of the data, and those made of them so far."""

    def join(self, source: LayerSource, refill_rows: int, most_rows: int) -> int:
        """A layer's number for the other methods. `refill_rows`: what it takes at once."""
        self._readers.append(_Reader(source, source.cursor(self.source.place()), refill_rows, most_rows))
        return len(self._readers) - 1

    def next(self, number: int) -> Chunk:
        """The next chunk of a layer."""
        reader = self._readers[number]
        if reader.left:
            raise RuntimeError("PassFeed.next: this stream was closed; build a new one")
        if self._producer is None:
            self._producer = self._started()
        while not reader.waiting:
            for other, chunk in zip(self._readers, self._producer.next(), strict=True):
                if chunk is not None and not other.left:
                    other.waiting.append(chunk)
            self._drop_surplus()
        chunk = reader.waiting.popleft()
        reader.cursor = chunk.cursor
        return chunk

    def seek(self, number: int, cursor: dict[str, Any]) -> None:
        """A layer goes on from a cursor."""
        # The thread runs ahead from the old place: it must end before the source is moved.
        self._stop()
        reader = self._readers[number]
        reader.cursor, reader.left = cursor, False
        self.source.seek(cursor)
        reader.source.seek(cursor)

    def cursor(self, number: int) -> dict[str, Any]:
        """The place behind what a layer has taken."""
        return self._readers[number].cursor

    def leave(self, number: int) -> None:
        """A layer takes no further chunk; the thread ends when all have left."""
        reader = self._readers[number]
        reader.left = True
        reader.waiting.clear()
        if all(other.left for other in self._readers):
            self._kept.clear()
            self._stop()

    def heldout(self, number: int, wanted: int) -> Heldout:
        """A layer's rows and sinks of the first held-out passes that give it `wanted` rows. The other layers' are made of the
        same passes, and kept until they are asked for."""
        layer = self._readers[number].source
        if (layer.layer, wanted) not in self._heldout:
            self._read_heldout(layer.context_tokens, wanted)
        return self._heldout.pop((layer.layer, wanted))

    def passes(self, number: int, heldout: bool) -> Iterator[ActivationBatch]:
        """A layer's rows of the held-out data, or else of the training data, pass by pass, once from their start whatever the
        cursors; no position sampling. The first passes are kept for the other layers, as far as `KEPT_BYTES` goes."""
        layer = self._readers[number].source
        maker = RowMaker(self.source.maskers[layer.layer], layer.context_tokens, None)
        for passes in self._from_start(heldout):
            trains = self.source.trains(passes[layer.layer])
            made = maker.make(passes[layer.layer], None if trains is None else trains != heldout)
            if len(made.rows):
                yield made.rows

    def _from_start(self, heldout: bool) -> Iterator[list[Pass]]:
        if len(self._readers) == 1:
            yield from self.source.from_start(heldout)
            return
        going, kept = self._kept.setdefault(heldout, (self.source.from_start(heldout), []))
        for number in itertools.count():
            if number == len(kept):
                if (passes := next(going, None)) is None:
                    return
                kept.append(passes)
                if len(kept) * sum(self.source.activation_bytes) * len(passes[0].tokens) > KEPT_BYTES:
                    break
            yield kept[number]
        # More than is kept: from here on each layer has passes of its own.
        behind = kept.pop()
        self._kept[heldout] = (itertools.chain([behind], going), kept)
        yield from self.source.from_start(heldout, skip=len(kept))

    def _read_heldout(self, context_tokens: int, wanted: int) -> None:
        makers = [RowMaker(masker, context_tokens, None) for masker in self.source.maskers]
        found: list[Heldout] = [([], []) for _ in makers]
        have = [0] * len(makers)
        for passes in self.source.from_start(heldout=True):
            trains = self.source.trains(passes[0])
            for place, (rows, sinks) in enumerate(found):
                if have[place] < wanted:
                    made = makers[place].make(passes[place], None if trains is None else ~trains)
                    rows.append(made.rows)
                    sinks.append(made.sinks)
                    have[place] += len(made.rows)
            if min(have) >= wanted:
                break
        self._heldout.update({(place, wanted): part for place, part in enumerate(found)})

    def _started(self) -> Prefetcher[list[Chunk | None]]:
        """A producer from the earliest place that a layer is at."""
        for reader in self._readers:
            reader.waiting.clear()
            reader.source.seek(reader.cursor)
        going = [reader for reader in self._readers if not reader.left]
        earliest = min(going, key=lambda reader: reader.source.passes_made)
        self._made = earliest.source.passes_made
        self.source.seek(earliest.cursor)
        # What one refill takes is made while the rows before it are trained on: a refill then finds it waiting.
        enough = max(reader.refill_rows for reader in going)
        return Prefetcher(self._produce, self._prefetch, enough, _fewest_rows)

    def _produce(self) -> list[Chunk | None]:
        passes = self.source.next_pass()
        trains, place = self.source.trains(passes[0]), self.source.place()
        self._made += 1
        return [
            None
            if reader.left or reader.source.passes_made >= self._made
            else reader.source.chunk(passes[reader.source.layer], trains, place)
            for reader in self._readers
        ]

    def _drop_surplus(self) -> None:
        for reader in self._readers:
            while len(reader.waiting) > 1 and sum(len(chunk.rows) for chunk in reader.waiting) > reader.most_rows:
                reader.waiting.popleft()
                if not reader.told:
                    reader.told = True
                    logger.warning(
                        "%s masks fewer tokens than other layers of the set and is more than %d rows behind them: its oldest "
                        "rows are left out, now and whenever it is so again",
                        reader.source.identity.get("source_hook", f"layer {reader.source.layer}"),
                        reader.most_rows,
                    )

    def _stop(self) -> None:
        if self._producer is not None:
            self._producer.close()
            self._producer = None


def _fewest_rows(chunks: list[Chunk | None]) -> int:
    return min((len(chunk.rows) for chunk in chunks if chunk is not None), default=0)
