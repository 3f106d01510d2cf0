"""How a run ends, and what it writes then: summary.json, and the report with what only the model can say of each latent."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.activations import ActivationBatch, ActivationStream
from transcoder.files import replace_atomically
from transcoder.model import Transcoder
from transcoder.reporting.progress import stage
from transcoder.reporting.report_subprocess import write_report_apart
from transcoder.training.describe_latents import describe_latents, tokens_to_look_at

if TYPE_CHECKING:
    from transcoder.training.trainer import Trainer

logger = logging.getLogger(__name__)

REPORT_SECONDS, INTERRUPTED_REPORT_SECONDS = 900.0, 20.0
"""How long a run waits for its page at its end, and at an interrupt."""


@dataclass(frozen=True)
class RunResult:
    """How a run ended."""

    run_dir: Path
    step: int
    """Optimizer steps done."""
    finished: bool
    interrupted_by: str | None
    """Name of the signal that stopped it; its state is saved, resume goes on."""
    summary: dict[str, Any]
    """Final metrics, as in summary.json."""
    report: Path | None
    transcoder: Transcoder = field(repr=False)
    heldout: Sequence[ActivationBatch] = field(repr=False)
    """What evaluation read, on the run's device."""
    layers: Mapping[int, RunResult] = field(default_factory=dict)
    """Of a layer set, each layer's own; `transcoder` and `heldout` are then those of the first."""


def write_summary(run: Trainer, finished: bool, interrupted_by: str | None) -> dict[str, Any]:
    """Write usage.json and summary.json; returns the latter's content."""
    run.write("usage.json", run.parts.ledger.write)
    summary: dict[str, Any] = {
        "name": run.config.name,
        "step": run.step,
        "finished": finished,
        "interrupted_by": interrupted_by,
        "tokens": run.tokens,
        "d_in": run.source.d_in,
        "d_out": run.source.d_out,
    }
    for observer in run.observers:
        summary |= observer.summary()
    if finished:
        found = describe_final_weights(run)
        if found:
            run.writer.write(run.step, found)
        summary |= found
    summary |= {"bad_steps": run.bad_steps.count, "data": run.source.counters()}
    text = json.dumps(summary, indent=2).encode()
    run.write("summary.json", lambda: replace_atomically(run.run_dir / "summary.json", text))
    return summary


def write_run_report(run: Trainer, finished: bool) -> Path | None:
    """report.html, by a process of its own: a fault in drawing it does not end the run. None where it is not there yet."""
    if not run.config.logging.report:
        return None
    run.writer.flush()
    stage("writing report.html")
    try:
        # After an interrupt this process may soon be killed: the page is then finished without it.
        path = write_report_apart(run.run_dir, REPORT_SECONDS if finished else INTERRUPTED_REPORT_SECONDS)
    except Exception as error:
        logger.warning("report.html could not be written: %s; try `transcoder report %s`", error, run.run_dir)
        return None
    if path is None:
        logger.warning("report.html is still being written, by a process of its own")
    return path


def describe_final_weights(run: Trainer) -> dict[str, float]:
    """Contexts, histograms, densities and duplicates of the final weights, see `describe_latents`: their metrics. What goes
    wrong costs a warning."""
    tokens = tokens_to_look_at(run.config, run.tokens)
    stage(f"looking at the final weights on up to {tokens:,} tokens")
    data = run.source if isinstance(run.source, ActivationStream) else run.parts.data.heldout
    try:
        layer = run.layers[0]
        return describe_latents(run.run_dir, run.config, layer.transcoder, data, step=run.step, tokens=tokens)
    except Exception as error:
        logger.warning("the final weights could not be looked at: %s: %s", type(error).__name__, error)
        return {}
