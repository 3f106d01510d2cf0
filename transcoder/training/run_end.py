"""What a run writes when it ends: summary.json, and the report with what only the model can say of each latent."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from transcoder.activations import ActivationStream
from transcoder.files import replace_atomically
from transcoder.reporting.report_subprocess import write_report_apart
from transcoder.training.latent_facts import write_latent_facts

if TYPE_CHECKING:
    from transcoder.training.trainer import Trainer

logger = logging.getLogger(__name__)

REPORT_PAIRS = 4096
"""Pairs whose latents get promoted tokens in the report, besides those that samples are kept of."""
REPORT_SECONDS, INTERRUPTED_REPORT_SECONDS = 900.0, 20.0
"""How long a run waits for its page at its end, and at an interrupt."""


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
    summary |= {"bad_steps": run.bad_steps.count, "data": run.source.counters()}
    text = json.dumps(summary, indent=2).encode()
    run.write("summary.json", lambda: replace_atomically(run.run_dir / "summary.json", text))
    return summary


def write_run_report(run: Trainer, finished: bool) -> Path | None:
    """report.html, by a process of its own: a fault in drawing it does not end the run. None where it is not there yet."""
    if not run.config.logging.report:
        return None
    run.writer.flush()
    try:
        if finished:
            _write_latent_facts(run)
    except Exception as error:
        logger.warning("latents.parquet could not be written: %s: %s", type(error).__name__, error)
    try:
        # After an interrupt this process may soon be killed: the page is then finished without it.
        path = write_report_apart(run.run_dir, REPORT_SECONDS if finished else INTERRUPTED_REPORT_SECONDS)
    except Exception as error:
        logger.warning("report.html could not be written: %s; try `transcoder report %s`", error, run.run_dir)
        return None
    if path is None:
        logger.warning("report.html is still being written, by a process of its own")
    return path


def _write_latent_facts(run: Trainer) -> None:
    """What only the model and the held-out tokens can say of each latent."""
    listed = [] if run.parts.samples is None else [run.parts.samples.latents]
    if run.parts.monitor is not None:
        listed.extend(run.parts.monitor.target_pairs(REPORT_PAIRS))
    shown = torch.cat([part.cpu() for part in listed]).unique() if listed else None
    stream = run.source if isinstance(run.source, ActivationStream) else None
    unembedding = "the run had no language model at hand" if stream is None else stream.unembedding()
    decode = None if stream is None else stream.decode_tokens
    write_latent_facts(run.run_dir, run.layers[0].transcoder, run.parts.data.heldout, shown, unembedding, decode)
