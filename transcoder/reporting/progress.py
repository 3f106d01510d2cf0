"""ProgressBar: a live bar on a terminal, one readable line every few seconds in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from transcoder.reporting.format import clock, thousands

PLAIN_SECONDS = 10.0


class ProgressBar:
    """Shows loss, FVU, L0, dead share, duplicates, tokens/s and the time left.

    Args:
        total: Steps of the whole run.
        initial: Steps already done (a resumed run).
        enabled: False shows nothing.
        stream: Where to; None is stderr. A stream that is no terminal gets plain lines, so that CI logs stay
            readable.
        plain_seconds: The least time between two plain lines; the first and the last update always get one.
    """

    def __init__(
        self,
        total: int,
        initial: int = 0,
        enabled: bool = True,
        *,
        stream: TextIO | None = None,
        plain_seconds: float = PLAIN_SECONDS,
    ) -> None:
        self._total, self._initial, self._enabled = total, initial, enabled
        self._stream = sys.stderr if stream is None else stream
        self._plain_seconds = plain_seconds
        self._start = time.monotonic()
        self._step = initial
        self._seen: dict[str, float] = {}
        self._shown_step: int | None = None
        self._shown_at = -math.inf
        self._bar: Any = None
        if enabled and self._stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=total,
                initial=initial,
                file=self._stream,
                unit="step",
                dynamic_ncols=True,
                # A narrow bar, so that the metrics fit into 120 columns.
                bar_format="{percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}]{postfix}",
            )

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Show the metrics at `step` (steps done). A name that is not among them keeps its last value."""
        self._step = step
        self._seen.update(metrics)
        if self._bar is not None:
            self._bar.set_postfix_str(metrics_text(self._seen), refresh=False)
            self._bar.update(step - self._bar.n)
        elif self._enabled and (step >= self._total or time.monotonic() - self._shown_at >= self._plain_seconds):
            self._line()

    @property
    def latest(self) -> dict[str, float]:
        """The newest value of every metric."""
        return dict(self._seen)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
        elif self._enabled and self._shown_step != self._step and self._seen:
            self._line()

    def _line(self) -> None:
        self._shown_step, self._shown_at = self._step, time.monotonic()
        elapsed = self._shown_at - self._start
        done = self._step - self._initial
        left = clock(elapsed / done * (self._total - self._step)) if done > 0 else "?"
        share = 100 * self._step / self._total if self._total else 100.0
        head = f"step {self._step}/{self._total} ({share:.0f}%)"
        print(
            f"{head}  {metrics_text(self._seen)}  elapsed {clock(elapsed)}  left {left}",
            file=self._stream,
            flush=True,
        )


def metrics_text(metrics: Mapping[str, float]) -> str:
    """The metrics as one line; what is not known yet is left out.

    >>> metrics_text({"losses/overall_loss": 0.5312, "sparsity/dead_share": 0.021})
    'loss 0.531  dead 2.1%'
    """
    parts = []
    for name, label in (("losses/overall_loss", "loss"), ("metrics/fvu", "FVU"), ("metrics/l0", "L0")):
        if name in metrics:
            parts.append(f"{label} {metrics[name]:.3g}")
    if "sparsity/dead_share" in metrics:
        parts.append(f"dead {100 * metrics['sparsity/dead_share']:.1f}%")
    if "duplicates/pairs" in metrics:
        flagged = metrics.get("duplicates/flagged")
        parts.append(
            f"duplicates {metrics['duplicates/pairs']:.0f}" + ("" if flagged is None else f" ({flagged:.0f} flagged)")
        )
    if "metrics/tokens_per_second" in metrics:
        parts.append(f"{thousands(metrics['metrics/tokens_per_second'])} tok/s")
    return "  ".join(parts)
