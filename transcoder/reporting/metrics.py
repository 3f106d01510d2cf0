"""MetricsWriter: one call a logging interval, one line of metrics.jsonl; W&B and TensorBoard follow the file."""

from __future__ import annotations

import logging
import math
import numbers
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from transcoder.config import RunConfig
from transcoder.reporting.follow_metrics import FILE_NAME, RESERVED, UPLOAD_EVENT
from transcoder.reporting.follower import Follower
from transcoder.reporting.jsonl import JsonlFile, drop_after

logger = logging.getLogger(__name__)


class MetricsWriter:
    """Writes a run's metrics to `run_dir/metrics.jsonl`. Where the config asks for W&B or TensorBoard, a process of its own
    follows the file (`Follower`).

    A line is a strict JSON object: {"step": int, "time": seconds of training since the run's start, name: number, ...}. A value
    that is NaN or infinite is null, and "nonfinite" says which it was: {"nonfinite": {"losses/overall_loss": "nan"}}. An event
    is {"event": kind, "step", "time", "payload": {...}}.

    Args:
        run_dir: The run's folder; made if absent.
        config: Read for `name` and `logging`.
        resume_step: The step that the run continues from: later lines are dropped (atomically) and `time` goes on from the last
            line kept. None begins a new file; an old one is renamed to metrics.jsonl.1 (2, ...), never overwritten.

    A write is one `write(2)`; nothing here waits for a network.
    """

    def __init__(self, run_dir: Path, config: RunConfig, resume_step: int | None = None) -> None:
        if resume_step is not None and (not isinstance(resume_step, int) or resume_step < 0):
            raise ValueError(f"MetricsWriter: resume_step: expected null or a step of at least 0, got {resume_step!r}")
        self.run_dir = Path(run_dir)
        self.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run_dir / FILE_NAME
        dropped, last = 0, None
        if resume_step is None:
            _set_aside(path)
        else:
            dropped, last = drop_after(path, resume_step)
        at = last.get("time") if last else None
        earlier = float(at) if isinstance(at, (int, float)) else 0.0
        self._start = time.monotonic() - earlier
        self._step = resume_step or 0
        self._file = JsonlFile(path, config.logging.max_megabytes << 20)
        self._uploads = config.logging.wandb_upload_checkpoints
        self._follower: Follower | None = None
        if config.logging.wandb != "off" or config.logging.tensorboard:
            place = {"offset": path.stat().st_size, "since": earlier if last else None}
            purge = {"purge_step": None if resume_step is None else resume_step + 1}
            self._follower = Follower(self.run_dir, config, {**place, **purge})
        if resume_step is not None:
            self.write_event("resume", {"from_step": resume_step, "lines_dropped": dropped})

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self.close(exit_code=0 if kind is None else 1)

    @property
    def wandb_url(self) -> str | None:
        """The address of the W&B run, once it is known."""
        return None if self._follower is None else self._follower.url

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the metrics of one step.

        Values are numbers on the host; a 0-dim tensor is read (which waits for its device).

        Raises:
            TypeError: a value is no number.
            ValueError: a name that the line itself uses ("step", "time", "event", "nonfinite").
        """
        values = {name: _as_float(name, value) for name, value in metrics.items()}
        self._step = int(step)
        record: dict[str, Any] = {"step": self._step, "time": self._elapsed()}
        odd = {name: _spell(value) for name, value in values.items() if not math.isfinite(value)}
        record.update({name: None if name in odd else value for name, value in values.items()})
        if odd:
            record["nonfinite"] = odd
        self._file.append(record)

    def write_event(self, kind: str, payload: Mapping[str, Any] | None = None, step: int | None = None) -> None:
        """Write a line about something that happened ("checkpoint", "resume").

        `payload` is what JSON holds; other objects are written as their text. `step` None is the step last written.
        """
        record = {
            "step": self._step if step is None else step,
            "time": self._elapsed(),
            "event": kind,
            "payload": _plain(payload or {}),
        }
        self._file.append(record)

    def upload_checkpoint(self, folder: Path, step: int) -> None:
        """Have a checkpoint uploaded to W&B, where `logging.wandb_upload_checkpoints` is set: an event names it to the
        follower."""
        if self._uploads:
            self.write_event(UPLOAD_EVENT, {"folder": str(Path(folder).absolute())}, step)

    def flush(self) -> None:
        """Bring metrics.jsonl to the disk; a checkpoint's lines should be there before the checkpoint is."""
        self._file.flush()

    def close(self, exit_code: int = 0) -> None:
        """Close the file; W&B and TensorBoard get a few seconds for the rest of it and no more. Safe to call twice."""
        self._file.close()
        if self._follower is not None:
            self._follower.close(exit_code)

    def _elapsed(self) -> float:
        return round(time.monotonic() - self._start, 3)


def _as_float(name: str, value: object) -> float:
    if name in RESERVED:
        raise ValueError(f"metrics: the name {name!r} is the line's own; choose another, such as 'details/{name}'")
    if isinstance(value, Tensor) and value.numel() == 1:
        return float(value.item())
    if isinstance(value, numbers.Real):
        # Whole numbers stay whole: a count of 2048 reads better than 2048.0.
        return int(value) if isinstance(value, numbers.Integral) else float(value)
    raise TypeError(f"metrics: {name}: expected a number, got {type(value).__name__}")


def _spell(value: float) -> str:
    return "nan" if math.isnan(value) else ("inf" if value > 0 else "-inf")


def _plain(value: Any) -> Any:
    """`value` as strict JSON holds it."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else _spell(value)
    if isinstance(value, Tensor) and value.numel() == 1:
        return _plain(value.item())
    return str(value)


def _set_aside(path: Path) -> None:
    if not path.exists() or path.stat().st_size == 0:
        return
    number = 1
    while (old := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    path.rename(old)
    logger.warning("%s: a new run begins in a folder that has one; its metrics are now in %s", path, old.name)
