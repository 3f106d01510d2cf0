"""Send the figures of a run's metrics.jsonl to W&B afterwards: where it was off, absent, out of reach or cut short."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transcoder.config import RunConfig
from transcoder.reporting.jsonl import read_records
from transcoder.reporting.metrics import FILE_NAME, RESERVED
from transcoder.reporting.wandb_sink import INIT_SECONDS, run_id, worker_environment

SECONDS = 600.0
"""The longest that W&B may take for a whole run."""


def sync_run(run_dir: Path | str, mode: str = "online", seconds: float = SECONDS) -> dict[str, Any]:
    """Log every line of figures of a finished or stopped run, as one new W&B run named after it.

    Args:
        run_dir: a run folder with config.yaml and metrics.jsonl.
        mode: `online`, or `offline` (files in `run_dir/wandb`, for `wandb sync`).
        seconds: the longest wait.

    Returns:
        {"lines": how many, "url": its address or None, "warnings": what W&B said}.

    Raises:
        FileNotFoundError: no such folder or file.  RuntimeError: W&B is absent, cannot be reached, or did not end in time.
    """
    run_dir = Path(run_dir).absolute()
    if not (run_dir / FILE_NAME).is_file():
        raise FileNotFoundError(f"{run_dir}: expected a run folder, found no {FILE_NAME} in it")
    config = RunConfig.load(run_dir / "config.yaml")
    folder = run_dir / "wandb"
    folder.mkdir(exist_ok=True)
    settings = {
        "project": config.logging.wandb_project,
        "name": config.name,
        # Not the id of what was logged during the run: W&B takes no step twice.
        "id": f"{run_id(folder)}s",
        "config": config.to_dict(),
        "dir": str(run_dir),
        "mode": mode,
        "init_timeout": INIT_SECONDS,
    }
    messages = [settings, *_figures(run_dir / FILE_NAME), {"finish": 0}]
    try:
        done = subprocess.run(
            [sys.executable, str(Path(__file__).with_name("wandb_worker.py"))],
            input="".join(json.dumps(message) + "\n" for message in messages),
            capture_output=True,
            text=True,
            timeout=seconds,
            env=worker_environment(folder, os.environ),
        )
    except subprocess.TimeoutExpired:
        raise RuntimeError(f"W&B did not take {len(messages) - 2} lines in {seconds:g} s; try again later") from None
    answers = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    failed = [a.get("reason") for a in answers if a.get("status") == "failed"]
    warnings = [str(a.get("reason")) for a in answers if a.get("status") == "warning"]
    if failed or done.returncode != 0:
        raise RuntimeError(f"W&B: {failed[0] if failed else done.stderr[-500:] or 'the worker ended unasked'}")
    ready: dict[str, Any] = next((a for a in answers if a.get("status") == "ready"), {})
    return {"lines": len(messages) - 2, "url": ready.get("url"), "warnings": warnings}


def _figures(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of figures, those of one step together: W&B takes a step once."""
    step, together = -1, dict[str, float]()
    for record in read_records(path):
        if record is None or "event" in record or not isinstance(record.get("step"), int):
            continue
        if record["step"] != step and together:
            yield {"step": step, "metrics": together}
            together = {}
        step = record["step"]
        together.update({k: v for k, v in record.items() if k not in RESERVED and isinstance(v, (int, float))})
    if together:
        yield {"step": step, "metrics": together}
