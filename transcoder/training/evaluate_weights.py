"""`transcoder evaluate`: what any weights do on a model and a text, in a folder that reads like a run's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transcoder.activations import build_stream
from transcoder.config import ConfigError, RunConfig
from transcoder.files import local_path, replace_atomically
from transcoder.model import Transcoder
from transcoder.reporting import write_report
from transcoder.training.describe_latents import describe_latents
from transcoder.training.evaluation import cross_entropy, evaluate
from transcoder.training.saebench import saebench_core
from transcoder.training.start_checks import as_started, device_of, say_backend

OF_THE_WEIGHTS = ("d_sae", "k", "activation", "widths", "skip")
"""Settings of the dictionary that its weights decide."""


def evaluate_weights(
    transcoder: Transcoder, config: RunConfig, out: str | Path, *, origin: str, step: int = 0
) -> dict[str, Any]:
    """Evaluate a transcoder on held-out text, whoever trained it, and write into `out` config.yaml, summary.json, report.html
    and what `describe_latents` writes.

    Args:
        transcoder: of any device; it is moved to that of the config.
        config: model, hooks, text and sizes; `transcoder` follows the weights.
        out: a folder that is made, or whose files of an earlier evaluation are replaced.
        origin: where the weights are from, for the summary.
        step: of the checkpoint.

    Returns: the content of summary.json: evaluation/* (FVU, L0, live and dead share, cross-entropy recovered), saebench/*
    (see `saebench_core`), heldout_duplicates/*.

    Raises:
        ConfigError: the hooks have other widths than the weights, or nothing is held out.  ModelError, DataError: as
            `build_stream`.   OSError: `out` cannot be written.
    """
    run_dir, shape = local_path(out, "--out"), transcoder.config
    follow = {f"transcoder.{name}": getattr(shape, name) for name in OF_THE_WEIGHTS}
    config = as_started(config.replace({**follow, "transcoder.prefix_weights": None}), run_dir, resume=False)
    device = device_of(config.model.device)
    say_backend(device)
    transcoder = transcoder.to(device)
    section, training = config.activations, config.training
    with build_stream(config, device, context_tokens=config.antidup.samples.context_tokens) as stream:
        for name, have, want in (
            ("source_hook", stream.d_in, shape.d_in),
            ("target_hook", stream.d_out, shape.d_out),
        ):
            if have != want:
                raise ConfigError(
                    f"activations.{name}: expected a hook of width {want}, that of the weights; {getattr(section, name)!r} of "
                    f"{config.model.name} has {have}"
                )
        heldout = stream.heldout(training.evaluation_tokens)
        if not heldout:
            raise ConfigError("activations.heldout_fraction: expected held-out text to evaluate on; set it above 0")
        run_dir.mkdir(parents=True, exist_ok=True)
        replace_atomically(run_dir / "config.yaml", config.to_yaml())
        metrics = evaluate(transcoder, heldout, stream.heldout_sinks())
        metrics["evaluation/dead_share"] = 1 - metrics["evaluation/live_share"]
        if training.evaluation_ce_tokens:
            metrics |= cross_entropy(transcoder, stream, training.evaluation_ce_tokens)
            metrics |= saebench_core(transcoder, stream, training.evaluation_ce_tokens)
        tokens = max(training.evaluation_tokens, config.logging.report_tokens)
        metrics |= describe_latents(run_dir, config, transcoder, stream, step=step, tokens=tokens)
    summary = {
        "name": config.name,
        "evaluated": origin,
        "step": step,
        "finished": True,
        "interrupted_by": None,
        "tokens": 0,
        "d_in": shape.d_in,
        "d_out": shape.d_out,
        **metrics,
    }
    replace_atomically(run_dir / "summary.json", json.dumps(summary, indent=2))
    if config.logging.report:
        write_report(run_dir)
    return summary
