"""Weights & Biases, at arm's length: a bounded queue, a feeder thread, a worker process with a deadline."""

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
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transcoder.config import RunConfig
from transcoder.files import replace_atomically
from transcoder.reporting.background import BackgroundFeed

logger = logging.getLogger(__name__)

INIT_SECONDS = 30.0
"""How long the worker tries to start an online run before it goes on offline."""
CLOSE_SECONDS = 10.0
"""How long the end of a run waits for W&B."""
UPLOAD_CLOSE_SECONDS = 600.0
"""The same where the user asked for checkpoints to be uploaded."""


WORKER_LOG, WORKER_LOG_BYTES = "worker.log", 10 << 20
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


def worker_environment(folder: Path, present: Mapping[str, str]) -> dict[str, str]:
    """The worker's variables: whatever W&B writes, its caches included, lies in the run's folder."""
    names = {f"WANDB_{name.upper()}_DIR": str(folder / name) for name in ("cache", "data")}
    return {**names, **present, "WANDB_DIR": str(folder.parent)}


class WandbSink:
    """Sends metrics to W&B without ever stopping or slowing the run.

    The package wandb is imported in a worker process only. Absent, unreachable, hanging, raising or
    crashing, it costs the run one warning; `close` returns within `close_seconds` and then ends the worker.

    Args:
        run_dir: W&B writes into `run_dir/wandb`, its caches included. The worker's own log is
            `wandb/worker.log`.
        config: `logging.wandb` (offline or online), `wandb_project`, `wandb_upload_checkpoints`, and the
            run's name.
        close_seconds: Longest wait in `close`; None takes 10 s, or 600 s where checkpoints are uploaded.
    """

    def __init__(
        self,
        run_dir: Path,
        config: RunConfig,
        *,
        init_seconds: float = INIT_SECONDS,
        close_seconds: float | None = None,
    ) -> None:
        self.url: str | None = None
        self.uploads = config.logging.wandb_upload_checkpoints
        self._close_seconds = close_seconds or (UPLOAD_CLOSE_SECONDS if self.uploads else CLOSE_SECONDS)
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._folder = Path(run_dir).absolute() / "wandb"
        self._feed: BackgroundFeed[dict[str, Any]] = BackgroundFeed("W&B", self._send, self._end_input)
        settings = {
            "project": config.logging.wandb_project,
            "name": config.name,
            "id": "",
            "config": config.to_dict(),
            "dir": str(self._folder.parent),
            "mode": config.logging.wandb,
            "init_timeout": init_seconds,
        }
        try:
            self._folder.mkdir(exist_ok=True)
            settings["id"] = run_id(self._folder)
            self._start_worker()
        except OSError as error:
            self._feed.fail(f"the worker cannot start: {error}")
            return
        self._feed.offer(settings)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        self._feed.offer({"step": step, "metrics": metrics})

    def upload_checkpoint(self, folder: Path, step: int) -> None:
        """Upload a checkpoint folder as an artifact, only where `logging.wandb_upload_checkpoints` is set."""
        if self.uploads:
            self._feed.offer({"upload": str(Path(folder).absolute()), "step": step})

    def close(self, exit_code: int = 0) -> None:
        """Finish the W&B run, within the deadline. After it the worker is ended, by force if need be."""
        process = self._process
        if process is None or self._closed:
            return
        self._closed = True
        deadline = time.monotonic() + self._close_seconds
        self._feed.offer({"finish": exit_code})
        if self._feed.close(self._close_seconds):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        if process.poll() is None:
            self._feed.fail(
                f"not finished {self._close_seconds:g} s after the run's end, so ended "
                f"(what it has lies in {self._folder}; `wandb sync` uploads it)"
            )
            # The worker leads a session of its own: its helpers go with it, and only they.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._clean_log()
        # A feeder that was stuck in a write to a worker now gone wakes up with a broken pipe.
        self._feed.close(1.0)
        self._end_input()

    def _start_worker(self) -> None:
        with open(self._folder / WORKER_LOG, "ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("wandb_worker.py"))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=worker_environment(self._folder, os.environ),
                start_new_session=True,
            )
        threading.Thread(target=self._listen, args=(self._process,), name="transcoder-W&B-answers", daemon=True).start()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        for line in process.stdout:
            try:
                message = json.loads(line)
            except ValueError:
                continue
            if message.get("status") == "failed":
                self._feed.fail(without_secrets(str(message.get("reason", "no reason given"))))
            elif message.get("status") == "warning":
                logger.warning("W&B: %s", without_secrets(str(message.get("reason"))))
            elif message.get("status") == "ready":
                self.url = message.get("url")
                logger.info("W&B (%s): %s", message.get("mode"), self.url or message.get("directory"))
        process.stdout.close()

    def _send(self, message: dict[str, Any]) -> None:
        process = self._process
        if process is None or process.stdin is None or self._feed.failed:
            return
        self._bound_log()
        try:
            process.stdin.write(json.dumps(message).encode() + b"\n")
            process.stdin.flush()
        except (BrokenPipeError, ValueError):
            # An orderly failure has told its reason on the worker's stdout; give that a moment to be read.
            time.sleep(0.2)
            self._feed.fail(f"the worker ended unasked (see {self._folder / WORKER_LOG})")

    def _bound_log(self) -> None:
        # The worker appends: what it writes next begins the file anew.
        with contextlib.suppress(OSError):
            if (self._folder / WORKER_LOG).stat().st_size > WORKER_LOG_BYTES:
                os.truncate(self._folder / WORKER_LOG, 0)

    def _clean_log(self) -> None:
        with contextlib.suppress(OSError):
            text = (self._folder / WORKER_LOG).read_text(encoding="utf-8", errors="replace")
            if (shown := without_secrets(text)) != text:
                replace_atomically(self._folder / WORKER_LOG, shown)

    def _end_input(self) -> None:
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._process.stdin.close()
