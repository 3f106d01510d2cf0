"""`transcoder evaluate`: what any weights do on a model and a text, in a folder that reads like a run's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transcoder.activations import build_stream
from transcoder.config import ConfigError, RunConfig, load_yaml
from transcoder.files import local_path, replace_atomically
from transcoder.model import Transcoder
from transcoder.reporting import write_report
from transcoder.settings import set_dotted
from transcoder.training.describe_latents import describe_latents
from transcoder.training.evaluation import cross_entropy, evaluate
from transcoder.training.saebench import saebench_core
from transcoder.training.start_checks import as_started, device_of, say_backend

OF_THE_WEIGHTS = ("d_sae", "k", "activation", "widths", "skip")
"""Settings of the dictionary that its weights decide."""

MEASURED = {
    "evaluation/fvu": "fraction of variance unexplained, held-out non-sink tokens",
    "evaluation/l0": "active latents a token (L0)",
    "evaluation/dead_share": "share of latents that never fire there",
    "evaluation/ce_recovered": "cross-entropy recovered",
    "heldout_duplicates/pairs": "pairs of latents above the correlation threshold",
    "heldout_duplicates/mergeable": "of these, duplicates",
    "saebench/ce_loss_score": "SAEBench: CE loss score",
    "saebench/kl_div_score": "SAEBench: KL divergence score",
    "saebench/explained_variance": "SAEBench: explained variance",
    "saebench/cossim": "SAEBench: cosine similarity",
    "saebench/l0": "SAEBench: L0",
    "saebench/l1": "SAEBench: L1",
    "saebench/l2_ratio": "SAEBench: L2 ratio",
    "saebench/frac_alive": "SAEBench: share alive",
}
"""What `format_metrics` prints, with labels."""


def config_of_weights(
    weights: Path, hooks: Mapping[str, Any], given: str | None, overrides: Mapping[str, Any]
) -> RunConfig:
    """CONFIG, else the config of the run that the weights are of; what it leaves open the weights say themselves.

    Args:
        hooks: fields of `interop.folded_weights.Hooks`.
        given: CONFIG, a file or a preset.   overrides: settings by dotted names.

    Raises: ConfigError: neither says where the weights belong.
    """
    homes = (place / "config.yaml" for place in (weights, *weights.parents[:2]))
    own = next((file for file in homes if file.is_file()), None)
    source = own if given is None else given
    values = {} if source is None else load_yaml(source)
    activations = values.get("activations") or {}
    if isinstance(activations, dict) and activations.get("layers") is not None:
        # Of a layer set, the weights know their own hooks.
        values["activations"] = {
            k: v for k, v in activations.items() if k not in ("layers", "source_hook", "target_hook")
        }
    known = {
        "model.name": hooks["model_name"],
        "activations.source_hook": hooks["source"],
        "activations.target_hook": hooks["target"] or hooks["source"],
        "activations.sequence_length": hooks["context_size"],
        "activations.prepend_bos": hooks["prepend_bos"],
    }
    for dotted, value in known.items():
        section, _, field = dotted.partition(".")
        if value is not None and field not in (values.get(section) or {}):
            set_dotted(values, dotted, value)
    for dotted, value in overrides.items():
        set_dotted(values, dotted, value)
    for dotted in ("model.name", "activations.source_hook", "activations.target_hook"):
        section, _, field = dotted.partition(".")
        if field not in (values.get(section) or {}):
            raise ConfigError(
                f"evaluate: {weights} does not say where it belongs ({dotted}): give a CONFIG, or --model.name, "
                "--activations.source_hook and --activations.target_hook"
            )
    name = "".join(c if c.isalnum() or c in "._-" else "-" for c in weights.name)
    return RunConfig.from_dict({**values, "name": f"evaluate-{name}"})


def evaluate_weights(
    transcoder: Transcoder, config: RunConfig, out: str | Path, *, origin: str, step: int = 0
) -> dict[str, Any]:
    """Evaluate a transcoder of any origin on held-out text, and write into `out` config.yaml, summary.json, report.html
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


def format_metrics(summary: Mapping[str, Any]) -> str:
    """Of what `evaluate_weights` returns, one line for each of `MEASURED`."""
    return "\n".join(f"{label:<64}{summary[key]:.4f}" for key, label in MEASURED.items() if key in summary)
