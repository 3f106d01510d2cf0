"""`transcoder validate`: one short run with the anti-duplication parts on, one with them off, all outputs checked."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transcoder.activations.stream import resolved_layers
from transcoder.antidup import validate_correlation_report
from transcoder.checkpoint_folder import CheckpointError, verify_checkpoint
from transcoder.config import RunConfig
from transcoder.files import local_path
from transcoder.reporting.compare import compare_runs, format_comparison, write_comparison
from transcoder.training.run_end import RunResult
from transcoder.training.start_checks import as_started, check_one_process
from transcoder.training.train import train_transcoder
from transcoder.usage import SECTIONS, judge

SAMPLE_COLUMNS = {
    "latent",
    "kind",
    "activation",
    "token",
    "position",
    "sequence",
    "step",
    "context",
    "anchor",
    "tokens",
}


@dataclass(frozen=True)
class Check:
    """One statement about a run folder and whether it holds."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.detail}"


@dataclass(frozen=True)
class ValidationResult:
    """What `validate` found."""

    checks: dict[str, list[Check]]
    """By run: `with_antidup`, `baseline`."""
    comparison: dict[str, Any] | None
    """None when a run was stopped before its end."""

    @property
    def passed(self) -> bool:
        return self.comparison is not None and all(c.passed for checks in self.checks.values() for c in checks)

    def format(self) -> str:
        """One line a check, the comparison, and the verdict."""
        lines = [f"{check}  [{run}]" for run, checks in self.checks.items() for check in checks]
        if self.comparison is not None:
            lines += ["", format_comparison(self.comparison), ""]
        failed = sum(not check.passed for checks in self.checks.values() for check in checks)
        lines.append("validation passed" if self.passed else f"validation failed: {failed} checks do not hold")
        return "\n".join(lines)


def validate(config: RunConfig, out: Path | str) -> ValidationResult:
    """Train twice (parts on into out/with_antidup, off into out/baseline), measure both dictionaries' duplicates on held-out
    tokens in the same way, check both folders, write out/comparison.json.

    Args:
        config: the run; its four anti-duplication parts are switched by this function. 100 steps are enough.
        out: a new or empty folder.

    Raises:
        LedgerError: in the run with the parts on, one was not really used. ConfigError and others as
            `train_transcoder`.
    """
    check_one_process()
    out, config = local_path(out), resolved_layers(config)
    checks: dict[str, list[Check]] = {}
    for name, enabled in (("with_antidup", True), ("baseline", False)):
        switches = {f"antidup.{section}.enabled": enabled for section in SECTIONS.values()}
        if not enabled:
            switches["antidup.recycle.enabled"] = False  # it acts on what the monitor finds
        run = config.replace({**switches, "name": name})
        result = train_transcoder(run, out / name)
        if not result.finished:
            ending = f"stopped by {result.interrupted_by} after step {result.step} of {run.training.steps}"
            return ValidationResult({**checks, name: [Check("finished", False, ending)]}, None)
        layers: list[tuple[int | None, RunResult]] = list(result.layers.items()) or [(None, result)]
        checks |= {
            name if layer is None else f"{name}, layer {layer}": check_run(
                one.run_dir, _config_of(one.run_dir, run, layer)
            )
            for layer, one in layers
        }
    comparison = compare_runs(out / "baseline", out / "with_antidup")
    write_comparison(comparison, out / "comparison.json")
    return ValidationResult(checks, comparison)


def _config_of(run_dir: Path, run: RunConfig, layer: int | None) -> RunConfig:
    """A run's config; of a layer of a set its own, which the set made."""
    return run if layer is None else RunConfig.load(run_dir / "config.yaml")


class _Unmet(Exception):
    """A check that does not hold; its text says what was found."""


def check_run(run_dir: Path, config: RunConfig) -> list[Check]:
    """Every output that a finished run of `config` must have left in `run_dir`. Read-only."""
    checks = []
    for name, look in _LOOKS.items():
        try:
            checks.append(Check(name, True, look(run_dir, config)))
        except _Unmet as unmet:
            checks.append(Check(name, False, str(unmet)))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
            # A file that is missing or of another form is exactly what is looked for here.
            checks.append(Check(name, False, f"{type(error).__name__}: {error}"))
    return checks


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise _Unmet(otherwise)


def _settings(run_dir: Path, config: RunConfig) -> str:
    # The run's file has the values that were found for `auto`, and those of what follows the run's length.
    saved, expected = RunConfig.load(run_dir / "config.yaml"), as_started(config, run_dir, resume=True)
    _require(saved == expected, "config.yaml differs from the settings of the run")
    return "config.yaml holds the settings of the run"


def _summary(run_dir: Path, config: RunConfig) -> str:
    fvu = json.loads((run_dir / "summary.json").read_bytes())["evaluation/fvu"]
    _require(math.isfinite(fvu), f"evaluation/fvu is {fvu}")
    return f"held-out FVU {fvu:.4f}"


def _metrics(run_dir: Path, config: RunConfig) -> str:
    wanted = {
        *("losses/overall_loss", "losses/mse_loss", "losses/auxiliary_reconstruction_loss"),
        *("metrics/explained_variance", "metrics/fvu", "metrics/l0", "metrics/topk_threshold"),
        *("metrics/tokens_per_second", "sparsity/dead_features", "sparsity/dead_share"),
        *("details/n_training_samples", "details/learning_rate", "details/gradient_norm"),
        *("evaluation/fvu", "evaluation/baseline_mean_fvu", "evaluation/baseline_linear_fvu"),
    }
    for width in config.transcoder.widths or (config.transcoder.d_sae,):
        wanted |= {f"losses/inner_mse_loss_{width}", f"metrics/fvu_prefix_{width}", f"evaluation/fvu_prefix_{width}"}
    if config.antidup.regularizer_acts:
        wanted.add("losses/diversity_penalty")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "step" in line]
    found = {name for record in records for name in record}
    _require(wanted <= found, f"missing from metrics.jsonl: {', '.join(sorted(wanted - found))}")
    if config.antidup.monitor.enabled:
        _require(any(n.startswith("duplicates/") for n in found), "no duplicates/* in metrics.jsonl")
    bad = {n for r in records for n in wanted & set(r) if not isinstance(r[n], (int, float)) or not math.isfinite(r[n])}
    _require(not bad, f"not finite numbers in metrics.jsonl: {', '.join(sorted(bad))}")
    last = max(record["step"] for record in records)
    _require(last == config.training.steps, f"metrics.jsonl ends at step {last} of {config.training.steps}")
    return f"{len(found)} names in {len(records)} lines, finite, up to step {last}"


def _checkpoints(run_dir: Path, config: RunConfig) -> str:
    folders = sorted((run_dir / "checkpoints").iterdir())
    strange = [f.name for f in folders if not f.name.startswith("step_")]
    _require(not strange, f"leftovers in checkpoints: {', '.join(strange)}")
    steps = [verify_checkpoint(folder) for folder in folders]
    _require(config.training.steps in steps, f"no checkpoint of the last step {config.training.steps}: {steps}")
    return f"{len(steps)} verify by checksum, of steps {', '.join(map(str, sorted(steps)))}"


def _ledger(run_dir: Path, config: RunConfig) -> str:
    components = json.loads((run_dir / "usage.json").read_bytes())["components"]
    said = []
    for name, section in SECTIONS.items():
        record = components[name]
        enabled = getattr(config.antidup, section).enabled
        _require(record["enabled"] is enabled, f"{name}: enabled is {record['enabled']}, the settings say {enabled}")
        if enabled:
            lacking = judge(name, record, run_dir).lacking
            _require(not lacking, f"{name}: {', '.join(lacking)}")
            said.append(f"{name} {record['calls']} calls, {len(record['files'])} files")
        else:
            _require(not record["calls"] and not record["files"], f"{name} is off and was used: {record}")
    return "; ".join(said) or "all four off, none used"


def _correlation_reports(run_dir: Path, config: RunConfig) -> str:
    files = sorted((run_dir / "anti_duplication_logs").glob("correlation_step_*.json"))
    if not config.antidup.monitor.enabled:
        _require(not files, f"the monitor is off and wrote {len(files)} reports")
        return "none, the monitor is off"
    _require(files, "no report in anti_duplication_logs")
    for file in files:
        report = json.loads(file.read_bytes())
        try:
            validate_correlation_report(report)
        except ValueError as error:
            raise _Unmet(f"{file.name}: {error}") from error
    live, pairs = report["live_latents"], report["pairs_total"]
    _require(live > 0, f"{file.name}: no live latents")
    _require(report["d_sae"] == config.transcoder.d_sae, f"{file.name}: d_sae is {report['d_sae']}")
    return f"{len(files)} valid; the last one: {live} live latents, {pairs} pairs, {report['pairs_flagged']} flagged"


def _samples(run_dir: Path, config: RunConfig) -> str:
    folder = run_dir / "activation_samples"
    if not config.antidup.samples.enabled:
        _require(not folder.exists() or not any(folder.iterdir()), "samples are off and there are files")
        return "none, samples are off"
    from pyarrow import parquet

    summary = json.loads((folder / "summary.json").read_bytes())
    table = parquet.read_table(folder / "samples.parquet")
    missing = SAMPLE_COLUMNS - set(table.column_names)
    _require(not missing, f"samples.parquet lacks columns: {', '.join(sorted(missing))}")
    _require(table.num_rows > 0, "samples.parquet is empty")
    _require(summary["samples_kept"] == table.num_rows, f"summary.json says {summary['samples_kept']} samples")
    latents = len(set(table.column("latent").to_pylist()))
    return f"{table.num_rows} samples of {latents} latents, with contexts"


def _html_report(run_dir: Path, config: RunConfig) -> str:
    if not config.logging.report:
        return "none, logging.report is off"
    text = (run_dir / "report.html").read_text(encoding="utf-8")
    _require(text.rstrip().endswith("</html>"), "report.html is not whole")
    return f"report.html, {len(text) / 2**10:.0f} KiB"


_LOOKS: dict[str, Callable[[Path, RunConfig], str]] = {
    "settings": _settings,
    "summary": _summary,
    "metrics": _metrics,
    "checkpoints": _checkpoints,
    "ledger": _ledger,
    "correlation reports": _correlation_reports,
    "activation samples": _samples,
    "report": _html_report,
}
