"""ProgressBar: a live bar on a terminal, one readable line every few seconds in a log."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TextIO

from transcoder.reporting.format import clock, thousands

PLAIN_SECONDS = 10.0
SHARES = {
    "time/language_model_share": "model",
    "time/transcoder_share": "transcoder",
    "time/antidup_share": "anti-dup",
    "time/files_share": "files",
}


_say: Callable[[str | None], None] | None = None
"""Told of each stage where a command shows them."""


def stage(what: str | None) -> None:
    """Say what is done now, outside the steps of training, where `stages` shows it; None: training, which has its own bar."""
    if _say is not None:
        _say(what)


@contextmanager
def stages(
    enabled: bool, stream: TextIO | None = None, every: float = PLAIN_SECONDS
) -> Iterator[Callable[[str | None], None]]:
    """Shows a line for each `stage` on stderr, at once, and after each `every` seconds of one that it still goes on."""
    global _say
    if not enabled:
        yield stage
        return
    out, began = sys.stderr if stream is None else stream, time.monotonic()
    changed, over = threading.Event(), threading.Event()
    now: list[str | None] = [None]

    def say(what: str | None) -> None:
        now[0] = what
        changed.set()
        if what is not None:
            print(f"[{time.monotonic() - began:5.1f} s] {what}", file=out, flush=True)

    def remind() -> None:
        while not over.is_set():
            if not changed.wait(every) and (what := now[0]) is not None:
                print(f"[{time.monotonic() - began:5.1f} s] ... still {what}", file=out, flush=True)
            changed.clear()

    thread = threading.Thread(target=remind, daemon=True)
    thread.start()
    before, _say = _say, say
    try:
        yield say
    finally:
        _say = before
        over.set()
        changed.set()
        thread.join()


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
        self._first_tokens: tuple[float, float] | None = None
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
        """Show the metrics at `step` (steps done). A name that is not among them keeps its last value; tokens/s is over all of
        this session, since a refill of the buffer makes single intervals fast or slow."""
        stage(None)
        self._step = step
        self._seen.update(metrics)
        tokens, now = metrics.get("details/n_training_samples"), time.monotonic()
        if tokens is not None:
            first, since = self._first_tokens = self._first_tokens or (tokens, now)
            if tokens > first and now > since:
                self._seen["metrics/tokens_per_second"] = (tokens - first) / (now - since)
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
        parts.append(f"candidate pairs {metrics['duplicates/pairs']:.0f}")
    if "metrics/tokens_per_second" in metrics:
        parts.append(f"{thousands(metrics['metrics/tokens_per_second'])} tok/s")
    shares = [(label, metrics[name]) for name, label in SHARES.items() if name in metrics]
    if shares:
        parts.append("time " + ", ".join(f"{label} {100 * share:.0f}%" for label, share in shares))
    return "  ".join(parts)
