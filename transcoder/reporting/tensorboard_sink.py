"""TensorBoard, in a thread of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transcoder.reporting.background import BackgroundFeed

CLOSE_SECONDS = 10.0


class TensorboardSink:
    """Writes scalars to `run_dir/tensorboard` by `torch.utils.tensorboard`; not installed, it costs one
    warning.

    Args:
        resume_step: Scalars of an earlier session beyond this step are purged; None starts anew.
    """

    def __init__(self, run_dir: Path, resume_step: int | None = None) -> None:
        self._folder = Path(run_dir) / "tensorboard"
        self._resume_step = resume_step
        self._writer: Any = None
        self._feed: BackgroundFeed[tuple[int, dict[str, float]]] = BackgroundFeed(
            "TensorBoard", self._send, self._finish
        )

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._feed.offer((step, metrics))

    def flush(self) -> None:
        if self._writer is not None:
            self._feed.offer((-1, {}))

    def close(self) -> None:
        if not self._feed.close(CLOSE_SECONDS):
            self._feed.fail(f"not finished {CLOSE_SECONDS:g} s after the run's end, left as it is")

    def _send(self, item: tuple[int, dict[str, float]]) -> None:
        step, metrics = item
        if not metrics:
            self._writer.flush()
            return
        if self._writer is None:
            self._writer = self._open()
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def _open(self) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise RuntimeError(
                f"not installed ({error}); pip install tensorboard, or set logging.tensorboard to false"
            ) from None
        purge = None if self._resume_step is None else self._resume_step + 1
        return SummaryWriter(str(self._folder), purge_step=purge)

    def _finish(self) -> None:
        if self._writer is not None:
            self._writer.close()
