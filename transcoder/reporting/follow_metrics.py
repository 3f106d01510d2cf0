"""Follow a run's metrics.jsonl and send what is added to W&B and TensorBoard: a process of its own.

Started by path, so that it imports nothing of this package: whatever W&B does, hangs included, happens only here. stdin holds a
line of settings (`follower.settings_of`) and at the end {"finish": exit code}; an end of input without it means that the run
died. stdout answers in JSON lines, {"sink", "status": "ready" | "warning" | "failed", ...}.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

FILE_NAME = "metrics.jsonl"
RESERVED = ("step", "time", "event", "nonfinite")
"""Names in a line of metrics.jsonl that are no metric."""
UPLOAD_EVENT = "checkpoint_upload"
POLL_SECONDS = 0.2
LINGER_SECONDS = 120
"""When the run has died, W&B may upload what it has for at most this long."""


class MetricsCursor:
    """Reads the records of a JSON-lines file that were added since the last call.

    A file that was replaced (thinned, or made again) is read from its start, without the records whose "time" was read before.

    Args:
        offset, since: the place and the "time" behind which to begin.
    """

    def __init__(self, path: str, offset: int = 0, since: float | None = None) -> None:
        self._path, self._offset, self._time = path, offset, since
        self._skip: float | None = None
        self._inode: int | None = None

    def read(self, ended: bool = True) -> Iterator[dict[str, Any]]:
        """`ended`: nothing will be added, so a last line without its newline counts."""
        try:
            file = open(self._path, "rb")  # noqa: SIM115 - closed below
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if self._inode not in (None, found.st_ino) or found.st_size < self._offset:
                self._offset, self._skip = 0, self._time
            self._inode = found.st_ino
            file.seek(self._offset)
            for line in file:
                if not (line.endswith(b"\n") or ended):
                    return
                self._offset += len(line)
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError):
                    continue
                if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                    continue
                at = record.get("time")
                if isinstance(at, (int, float)):
                    if self._skip is not None and at <= self._skip:
                        continue
                    self._time = at
                yield record


def values_of(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """The metrics of a line by name; what is null there because it was not finite is NaN or infinite again."""
    spelled = record.get("nonfinite")
    spelled = spelled if isinstance(spelled, dict) else {}
    for name, value in record.items():
        if name in RESERVED or isinstance(value, bool):
            continue
        if isinstance(value, (int, float)):
            yield name, value
        elif value is None and spelled.get(name) in ("nan", "inf", "-inf"):
            yield name, float(spelled[name])


def by_step(records: Iterator[dict[str, Any]]) -> Iterator[tuple[int, dict[str, float], dict[str, Any] | None]]:
    """(step, metrics, None) of consecutive lines of one step together, for W&B takes a step once; (step, {}, event)."""
    step, together = -1, dict[str, float]()
    for record in records:
        if "event" in record:
            yield record["step"], {}, record
            continue
        if record["step"] != step and together:
            yield step, together, None
            together = {}
        step = record["step"]
        together.update(values_of(record))
    if together:
        yield step, together, None


class End:
    """When the run is over, and how: `exit_code` 0, 1, or 1 with `died`."""

    def __init__(self) -> None:
        self._over, self.exit_code, self.died = threading.Event(), 1, True
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in iter(sys.stdin.buffer.readline, b""):
            self.exit_code, self.died = json.loads(line)["finish"], False
            break
        self._over.set()

    def wait(self, seconds: float) -> bool:
        return self._over.wait(seconds)


class WandbSink:
    name, advice = "W&B", "pip install wandb, or set logging.wandb to off"

    def __init__(self, settings: dict[str, Any], answer: Callable[..., None]) -> None:
        """wandb.init; an online run that cannot start becomes an offline one (`wandb sync` uploads it later)."""
        self._settings, self._answer = settings, answer
        mode = settings["mode"]
        try:
            self._run = self._init(mode)
        except Exception as error:
            if mode != "online":
                raise
            self._run, mode = self._init("offline"), "offline"
            self._warn(f"W&B cannot be used online ({error}); logging offline instead")
        url = getattr(self._run, "url", None)
        answer(sink=self.name, status="ready", mode=mode, url=url, directory=str(self._run.dir))

    def _init(self, mode: Any) -> Any:
        import wandb

        return wandb.init(
            **{name: self._settings[name] for name in ("project", "name", "id", "config", "dir")},
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, init_timeout=self._settings["init_timeout"]),
        )

    def _warn(self, reason: str) -> None:
        self._answer(sink=self.name, status="warning", reason=reason)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._run.log(metrics, step=step)
        log = os.path.join(self._settings["dir"], "wandb", self._settings["log"])
        # The log is opened for appending: what is printed next begins the emptied file.
        if os.path.exists(log) and os.path.getsize(log) > self._settings["log_bytes"]:
            os.truncate(log, 0)

    def event(self, record: dict[str, Any]) -> None:
        if record["event"] != UPLOAD_EVENT or not self._settings["uploads"]:
            return
        try:
            import wandb

            metadata = {"step": record["step"]}
            artifact = wandb.Artifact(f"{self._run.id}-checkpoint", type="checkpoint", metadata=metadata)
            # No copy into W&B's staging folder or cache: a run once died of the disk space that those took.
            artifact.add_dir(record["payload"]["folder"], policy="immutable", skip_cache=True)
            self._run.log_artifact(artifact)
        except Exception as error:  # a failed upload must not end the logging
            self._warn(f"checkpoint not uploaded: {error}")

    def flush(self) -> None:
        """W&B sends by itself."""

    def finish(self, exit_code: int) -> None:
        self._run.finish(exit_code=exit_code)


class TensorboardSink:
    name, advice = "TensorBoard", "pip install tensorboard, or set logging.tensorboard to false"

    def __init__(self, settings: dict[str, Any], answer: Callable[..., None]) -> None:
        # What torch.utils.tensorboard writes with; without torch it starts in a fraction of a second.
        from tensorboard.compat.proto import event_pb2, summary_pb2
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._event, self._summary = event_pb2, summary_pb2
        folder = os.path.join(settings["dir"], "tensorboard")
        self._open: Callable[[], Any] = lambda: EventFileWriter(folder)
        self._purge_step: int | None = settings["purge_step"]
        self._writer: Any = None

    def _add(self, step: int, **content: Any) -> None:
        if self._writer is None:
            self._writer = self._open()
            if self._purge_step is not None:
                # Scalars of an earlier session from this step on are dropped by TensorBoard.
                start = self._event.SessionLog(status=self._event.SessionLog.START)
                self._add(self._purge_step, file_version="brain.Event:2")
                self._add(self._purge_step, session_log=start)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, **content))

    def log(self, step: int, metrics: dict[str, float]) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        self._add(step, summary=self._summary.Summary(value=values))

    def event(self, record: dict[str, Any]) -> None:
        """TensorBoard gets metrics only."""

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def finish(self, exit_code: int) -> None:
        if self._writer is not None:
            self._writer.close()


def follow(kind: type[WandbSink] | type[TensorboardSink], settings: dict[str, Any], end: End, answer: Any) -> None:
    """Send one sink every line until the run is over; its failure is told and ends nothing else."""
    try:
        sink = kind(settings, answer)
        cursor = MetricsCursor(os.path.join(settings["dir"], FILE_NAME), settings["offset"], settings["since"])
        ended = False
        while not ended:
            # Asked before reading: what was written before the end is then read.
            ended = end.wait(POLL_SECONDS)
            for step, metrics, event in by_step(cursor.read(ended)):
                if event is None:
                    sink.log(step, metrics)
                else:
                    sink.event(event)
            sink.flush()
        if end.died:
            timer = threading.Timer(LINGER_SECONDS, os._exit, (1,))
            timer.daemon = True
            timer.start()
        sink.finish(end.exit_code)
    except ImportError as error:
        answer(sink=kind.name, status="failed", reason=f"{error} ({kind.advice})")
    except BaseException as error:
        answer(sink=kind.name, status="failed", reason=f"{type(error).__name__}: {error}")


def main() -> None:
    # The script's own folder must not answer for top-level imports of W&B's.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]
    # stdout belongs to the answers; whatever W&B prints goes to the log with stderr.
    answers, lock = os.fdopen(os.dup(1), "w"), threading.Lock()
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        with lock:
            try:
                answers.write(json.dumps(fields) + "\n")
                answers.flush()
            except OSError:  # the run is gone
                return

    settings, end = json.loads(sys.stdin.buffer.readline()), End()
    board = threading.Thread(target=follow, args=(TensorboardSink, settings, end, answer))
    if settings["tensorboard"]:
        board.start()
    if settings["mode"] != "off":
        follow(WandbSink, settings, end, answer)
    if settings["tensorboard"]:
        board.join()


if __name__ == "__main__":
    main()
