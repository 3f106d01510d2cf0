"""What a run takes of a disk, computed before it starts; refused where it cannot fit, with settings that would."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from transcoder.checkpoint_folder import CheckpointError
from transcoder.config import CheckpointSection, RunConfig
from transcoder.training.storage import human_bytes

SLACK = 64 * 1024
"""Room for a checkpoint's folder and for blocks that are not full."""
LINE_BYTES = 4096
"""A line of metrics.jsonl: the demo's have 2 KB."""
PAIR_BYTES = 512
"""A pair in a correlation report: the demo's take a fifth of this."""
PAGES = 16 << 20
"""report.html, usage.json, summary.json and a report's figures besides its pairs."""
_THRIFT: tuple[tuple[str, Any, str], ...] = (
    ("keep_every", None, "null"),
    ("keep_best", False, "false"),
    ("keep_last", 1, "1"),
)
"""Settings that take less room, the least missed first, and how a flag spells them."""


def log_bytes(config: RunConfig, samples_at_most: int) -> int:
    """What everything beside checkpoints takes at most: the log, once more for each further sink, reports and samples.

    Args:
        samples_at_most: bytes of the samples' state; their file is written beside the old one.
    """
    steps, anti = config.training.steps, config.antidup
    lines = 2 + steps // config.logging.every + steps // max(1, config.training.evaluation_every or steps)
    sinks = 1 + (config.logging.wandb != "off") + config.logging.tensorboard
    reports = (2 + steps // anti.monitor.correlation_save_frequency) * (1 + anti.monitor.max_reported_pairs)
    return (
        min(lines * LINE_BYTES, config.logging.max_megabytes << 20) * sinks
        + (reports * PAIR_BYTES if anti.monitor.enabled else 0)
        + 2 * samples_at_most
        + PAGES
    )


def checkpoint_bytes(section: CheckpointSection, each: int, steps: int) -> int:
    """What checkpoints take at most in a run of `steps`: those kept and the one in writing."""
    saves = math.ceil(steps / section.every)
    kept = section.keep_last + int(section.keep_best)
    if section.keep_every is not None:
        kept += steps // math.lcm(section.every, section.keep_every)
    return min(saves, kept + 1) * (each + SLACK)


def refuse_what_cannot_fit(
    folder: Path, section: CheckpointSection, each: int, steps: int, beside: int, free: int
) -> None:
    """CheckpointError where checkpoints of `each` bytes and what lies `beside` them need more than `free` bytes."""

    def needed(section: CheckpointSection) -> int:
        return checkpoint_bytes(section, each, steps) + beside

    if needed(section) <= free:
        return
    message = (
        f"{folder}: checkpoints ({human_bytes(checkpoint_bytes(section, each, steps))}) and what a run writes beside them "
        f"({human_bytes(beside)}) need {human_bytes(needed(section))}, free are {human_bytes(free)}. "
    )
    flags = ""
    for name, value, text in _THRIFT:
        if getattr(section, name) != value:
            section = dataclasses.replace(section, **{name: value})
            flags += f" --checkpoint.{name} {text}"
            if needed(section) <= free:
                raise CheckpointError(f"{message}This would fit:{flags} (needs {human_bytes(needed(section))})")
    share = math.floor(100 * max(free - 2 * SLACK, 0) / needed(section))
    raise CheckpointError(
        f"{message}The least is {human_bytes(needed(section))}{flags and ' with' + flags}: choose --out on another disk, free "
        f"space, or a smaller transcoder.d_sae (about {share} % of the present one fits)"
    )
