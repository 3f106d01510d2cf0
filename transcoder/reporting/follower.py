"""W&B and TensorBoard follow metrics.jsonl, in a process of their own during a run (`Follower`) or afterwards (`sync_run`).

Training never waits for a sink and never fails from one: what goes wrong is one warning.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import secrets
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transcoder.config import RunConfig
from transcoder.files import local_path, replace_atomically
from transcoder.reporting import follow_metrics
from transcoder.reporting.follow_metrics import FILE_NAME, MetricsCursor, by_step

logger = logging.getLogger(__name__)

INIT_SECONDS = 30.0
"""How long an online W&B run tries to start before it goes on offline."""
CLOSE_SECONDS = 10.0
"""How long the end of a run waits for its sinks."""
UPLOAD_CLOSE_SECONDS = 600.0
"""The same where the user asked for checkpoints to be uploaded."""
SYNC_SECONDS = 600.0
"""The longest that W&B may take for a whole finished run."""
LOG, LOG_BYTES = "worker.log", 10 << 20
"""What W&B prints; emptied when it grows beyond this."""


def run_id(folder: Path) -> str:
    """One id a run folder, so that a resumed run continues the same W&B run. A file that holds no id is replaced."""
    file = folder / "run_id"
    with contextlib.suppress(FileNotFoundError, UnicodeDecodeError):
        known = file.read_text(encoding="utf-8").strip()
        if known.isascii() and known.isalnum():
            return known
    fresh = secrets.token_hex(4)
    replace_atomically(file, fresh + "\n")
    return fresh


def without_secrets(text: str) -> str:
    """`text`, which came from W&B, without the values of variables that are named like a secret."""
    for name, value in os.environ.items():
        if len(value) >= 8 and any(word in name.upper() for word in ("KEY", "TOKEN", "SECRET", "PASSWORD")):
            text = text.replace(value, "***")
    return text


def settings_of(run_dir: Path, config: RunConfig) -> dict[str, Any]:
    """What the process is told, for a new run; makes `run_dir/wandb`, where W&B writes, caches included. Raises: OSError."""
    folder = run_dir / "wandb"
    if config.logging.wandb != "off":
        folder.mkdir(exist_ok=True)
    return {
        "dir": str(run_dir),
        "offset": 0,
        "since": None,
        "mode": config.logging.wandb,
        "project": config.logging.wandb_project,
        "name": config.name,
        "id": run_id(folder) if config.logging.wandb != "off" else "",
        "config": config.to_dict(),
        "uploads": config.logging.wandb_upload_checkpoints,
        "init_timeout": INIT_SECONDS,
        "log": LOG,
        "log_bytes": LOG_BYTES,
        "tensorboard": config.logging.tensorboard,
        "purge_step": None,
    }


class Follower:
    """The process that follows a run's metrics.jsonl.

    The packages of the sinks are imported there only. Absent, unreachable, hanging, raising or crashing, they cost the run one
    warning; `close` returns within its limit and then ends the process and its helpers.

    Args:
        run_dir, config: the run.
        changes: to `settings_of`.
        warn: takes each warning.
    """

    def __init__(
        self, run_dir: Path, config: RunConfig, changes: Mapping[str, Any], warn: Callable[[str], None] = logger.warning
    ) -> None:
        self.url: str | None = None
        """The address of the W&B run, once it is known."""
        self.failed: list[str] = []
        """Reasons for which a sink, or the process, ended."""
        run_dir = Path(run_dir).absolute()
        self._log, self._warn, self._ended = run_dir / "wandb" / LOG, warn, False
        self._seconds = UPLOAD_CLOSE_SECONDS if config.logging.wandb_upload_checkpoints else CLOSE_SECONDS
        self._process: subprocess.Popen[bytes] | None = None
        try:
            settings = {**settings_of(run_dir, config), **changes}
            self._start(settings)
        except OSError as error:
            self._fail("W&B and TensorBoard", f"their process cannot start: {error}")

    def _start(self, settings: dict[str, Any]) -> None:
        folder = self._log.parent
        caches = {f"WANDB_{name.upper()}_DIR": str(folder / name) for name in ("cache", "data")}
        with contextlib.ExitStack() as stack:
            log = stack.enter_context(open(self._log, "ab")) if folder.is_dir() else subprocess.DEVNULL
            self._process = subprocess.Popen(
                [sys.executable, follow_metrics.__file__],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env={**caches, **os.environ, "WANDB_DIR": settings["dir"]},
                # It outlives a Ctrl-C for the run; its helpers are of its session, and end with it.
                start_new_session=True,
            )
        self._listener = threading.Thread(target=self._listen, args=(self._process,), daemon=True)
        self._listener.start()
        self._tell(settings)

    def close(self, exit_code: int = 0, seconds: float | None = None) -> None:
        """Have every line sent, for at most `seconds` (None: `CLOSE_SECONDS` or `UPLOAD_CLOSE_SECONDS`); then the process is
        gone, by force if need be. A second call does nothing."""
        process, seconds = self._process, self._seconds if seconds is None else seconds
        if process is None:
            return
        self._process = None
        self._tell({"finish": exit_code}, process)
        with contextlib.suppress(OSError):
            if process.stdin is not None:
                process.stdin.close()
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            self._ended = True
            if not self.failed:
                where = f"what W&B has lies in {self._log.parent}; `transcoder sync` sends all of it"
                self._fail("W&B and TensorBoard", f"not finished {seconds:g} s after the run's end, so ended ({where})")
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._listener.join(1.0)
        with contextlib.suppress(OSError):
            text = self._log.read_text(encoding="utf-8", errors="replace")
            if (shown := without_secrets(text)) != text:
                replace_atomically(self._log, shown)

    def _tell(self, message: dict[str, Any], process: subprocess.Popen[bytes] | None = None) -> None:
        """A pipe takes 64 KiB without a reader, and both messages together are smaller: this never waits."""
        process = process or self._process
        assert process is not None
        assert process.stdin is not None
        with contextlib.suppress(OSError):
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            status, sink = message.get("status"), message.get("sink")
            reason = without_secrets(str(message.get("reason", "no reason given")))
            if status == "failed":
                self._fail(sink, reason)
            elif status == "warning":
                self._warn(f"{sink}: {reason}")
            elif status == "ready":
                self.url = message.get("url")
                logger.info("%s (%s): %s", sink, message.get("mode"), self.url or message.get("directory"))
        process.stdout.close()
        if process.wait() != 0 and not self._ended and not self.failed:
            self._fail("W&B and TensorBoard", f"the worker ended unasked (see {self._log})")

    def _fail(self, sink: str, reason: str) -> None:
        self.failed.append(reason)
        self._warn(f"{sink}: {reason}; the run goes on and metrics.jsonl keeps everything")


def sync_run(run_dir: Path | str, mode: str = "online", seconds: float = SYNC_SECONDS) -> dict[str, Any]:
    """Send every line of metrics of a finished or stopped run to W&B, as one new W&B run named after it.

    Args:
        run_dir: a run folder with config.yaml and metrics.jsonl.
        mode: `online`, or `offline` (files in `run_dir/wandb`, for `wandb sync`).
        seconds: the longest wait.

    Returns:
        {"lines": how many, "url": its address or None, "warnings": what W&B said}.

    Raises:
        FileNotFoundError: no such folder or file.  RuntimeError: W&B is absent, cannot be reached, or did not end in time.
    """
    run_dir = local_path(run_dir).absolute()
    if not (run_dir / FILE_NAME).is_file():
        raise FileNotFoundError(f"{run_dir}: expected a run folder, found no {FILE_NAME} in it")
    lines = sum(event is None for *_, event in by_step(MetricsCursor(str(run_dir / FILE_NAME)).read()))
    config = RunConfig.load(run_dir / "config.yaml").replace({"logging.wandb": mode, "logging.tensorboard": False})
    # Not the id of what was logged during the run: W&B takes no step twice. Its checkpoints stay here.
    (run_dir / "wandb").mkdir(exist_ok=True)
    told: list[str] = []
    follower = Follower(run_dir, config, {"id": f"{run_id(run_dir / 'wandb')}s", "uploads": False}, told.append)
    began = time.monotonic()
    follower.close(0, seconds)
    if time.monotonic() - began >= seconds:
        raise RuntimeError(f"W&B did not take {lines} lines in {seconds:g} s; try again later")
    if follower.failed:
        raise RuntimeError(f"W&B: {follower.failed[0]}")
    return {"lines": lines, "url": follower.url, "warnings": [text.removeprefix("W&B: ") for text in told]}
