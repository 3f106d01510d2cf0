"""What is known of every latent of a run, as columns; each is read when it is first asked for."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from transcoder.reporting.run_errors import RunPartMissingError, missing_part
from transcoder.reporting.sample_table import SampleTable

if TYPE_CHECKING:
    from transcoder.reporting.run import Run


class LatentColumns:
    """Columns [d_sae] of one run."""

    def __init__(self, run: Run) -> None:
        self.run = run

    @cached_property
    def d_sae(self) -> int:
        folder = self.run.folder
        size = folder.setting("transcoder.d_sae")
        if not isinstance(size, int):
            size = folder.correlation.get("d_sae")
        if not isinstance(size, int):
            raise missing_part(folder, "latents (how many there are is unknown)", "config.yaml")
        return size

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Cumulative prefix widths; one, the whole dictionary, where there are no nested prefixes."""
        listed = self.run.folder.setting("transcoder.widths")
        widths = [w for w in listed if isinstance(w, int)] if isinstance(listed, list) else []
        return tuple(widths) or (self.d_sae,)

    @cached_property
    def prefix(self) -> NDArray[np.int64]:
        """The narrowest prefix that each latent is in, 0 for the first."""
        return np.searchsorted(np.asarray(self.widths), np.arange(self.d_sae), side="right").astype(np.int64)

    @property
    def firings(self) -> NDArray[np.int64]:
        return self.run.checkpoint.firings.counts

    @property
    def density(self) -> NDArray[np.float64]:
        """Share of tokens on which each latent fires, over the monitor's last block or two before the checkpoint."""
        found = self.run.checkpoint.firings
        return found.counts / found.tokens

    @cached_property
    def samples(self) -> SampleTable:
        found = self.run.folder.samples
        if found is None:
            raise missing_part(self.run.folder, "contexts", "activation samples")
        return found

    @cached_property
    def max_activation(self) -> NDArray[np.float64]:
        """The strongest activation that was kept as a sample; NaN for a latent without samples."""
        peaks = np.full(self.d_sae, np.nan)
        inside = self.samples.latent < self.d_sae
        np.fmax.at(peaks, self.samples.latent[inside], self.samples.activation[inside])
        return peaks

    @cached_property
    def group(self) -> NDArray[np.int64]:
        """The number of each latent's group in `duplicates.groups`, -1 for none."""
        numbers = np.full(self.d_sae, -1, dtype=np.int64)
        for n, group in enumerate(self.run.duplicates.groups):
            numbers[group] = n
        return numbers

    def rows(self, latent: int) -> NDArray[np.int64]:
        """The rows of a latent's samples, the strongest first."""
        order, sorted_latents = self._by_latent
        begin, end = np.searchsorted(sorted_latents, [latent, latent + 1])
        return order[begin:end]

    def neighbours(self, latent: int, count: int) -> list[tuple[int, float]]:
        """The latents whose decoder rows point most nearly the same way, as (id, cosine), nearest first."""
        unit = self._unit_decoder
        cosine = unit @ unit[latent]
        cosine[latent] = -np.inf
        count = max(0, min(count, len(cosine) - 1))
        best = np.argpartition(-cosine, count - 1)[:count] if count else np.empty(0, dtype=np.int64)
        return [(int(n), float(cosine[n])) for n in best[np.argsort(-cosine[best], kind="stable")]]

    def known(self, column: str) -> NDArray[np.generic] | None:
        """A column, or None where the run lacks what it is made of."""
        try:
            found: NDArray[np.generic] = getattr(self, column)
        except RunPartMissingError:
            return None
        return found

    @cached_property
    def _by_latent(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        order = np.lexsort((-self.samples.activation, self.samples.latent))
        return order, self.samples.latent[order]

    @cached_property
    def _unit_decoder(self) -> NDArray[np.float32]:
        rows = self.run.checkpoint.decoder
        length = np.linalg.norm(rows, axis=1, keepdims=True)
        unit: NDArray[np.float32] = rows / np.maximum(length, np.finfo(np.float32).tiny)
        return unit
