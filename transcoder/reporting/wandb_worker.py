"""The W&B side of a run, as a process of its own: whatever W&B does, hangs included, happens only here.

Started by path, not as a module, so that it imports nothing of this package (no torch). It reads JSON lines
from stdin: first the settings, then {"step", "metrics"} and {"upload", "step"} messages, last {"finish":
    exit code}. It answers on stdout, also
in JSON lines: {"status": "ready" | "warning" | "failed", ...}. An end of input without "finish" means that
    the run died.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Callable
from typing import Any

LINGER_SECONDS = 120
"""A worker whose run has died uploads what it has for at most this long."""


def start_run(settings: dict[str, Any], answer: Callable[..., None]) -> Any:
    """wandb.init; an online run that cannot start becomes an offline one (`wandb sync` uploads it later)."""
    import wandb

    def init(mode: Any) -> Any:
        return wandb.init(
            project=settings["project"],
            name=settings["name"],
            id=settings["id"],
            config=settings["config"],
            dir=settings["dir"],
            mode=mode,
            resume="allow" if mode == "online" else None,
            settings=wandb.Settings(console="off", silent=True, init_timeout=settings["init_timeout"]),
        )

    mode = settings["mode"]
    try:
        run = init(mode)
    except Exception as error:
        if mode != "online":
            raise
        run = init("offline")
        mode = "offline"
        answer(status="warning", reason=f"W&B cannot be used online ({error}); logging offline instead")
    answer(status="ready", mode=mode, url=getattr(run, "url", None), directory=str(run.dir))
    return run


def upload_checkpoint(run: Any, folder: str, step: int) -> None:
    import wandb

    artifact = wandb.Artifact(f"{run.id}-checkpoint", type="checkpoint", metadata={"step": step})
    # No copy into W&B's staging folder or cache: a run once died of the disk space that those took.
    artifact.add_dir(folder, policy="immutable", skip_cache=True)
    run.log_artifact(artifact)


def serve(answer: Callable[..., None]) -> None:
    lines = iter(sys.stdin.buffer.readline, b"")
    run = start_run(json.loads(next(lines)), answer)
    for line in lines:
        message = json.loads(line)
        if "finish" in message:
            run.finish(exit_code=message["finish"])
            return
        if "upload" in message:
            try:
                upload_checkpoint(run, message["upload"], message["step"])
            except Exception as error:  # a failed upload must not end the logging
                answer(status="warning", reason=f"checkpoint not uploaded: {error}")
        else:
            run.log(message["metrics"], step=message["step"])
    timer = threading.Timer(LINGER_SECONDS, os._exit, (1,))
    timer.daemon = True
    timer.start()
    run.finish(exit_code=1)


def main() -> int:
    # The script's own folder must not answer for top-level imports of W&B's.
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p or ".") != here]
    # stdout belongs to the answers; whatever W&B prints goes to the log with stderr.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        try:
            answers.write(json.dumps(fields) + "\n")
            answers.flush()
        except OSError:
            # The run is gone; there is nobody to tell.
            return

    try:
        serve(answer)
    except ModuleNotFoundError as error:
        answer(status="failed", reason=f"{error} (pip install wandb, or set logging.wandb to off)")
        return 1
    except BaseException as error:
        answer(status="failed", reason=f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
