"""Checks of a finished run's folder: every output is there, can be read, and says what it should. Read-only."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from transcoder.antidup import validate_correlation_report
from transcoder.checkpoint_folder import CheckpointError, verify_checkpoint
from transcoder.config import RunConfig
from transcoder.usage import SECTIONS, judge

SAMPLE_COLUMNS = {
    *("latent", "kind", "activation", "token", "position", "sequence", "step", "context", "anchor", "tokens"),
}
_NUMBER = (int, float)


@dataclass(frozen=True)
class Check:
    """One statement about a run folder and whether it holds."""

    name: str
    passed: bool
    detail: str

    def __str__(self) -> str:
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {self.detail}"


class _Unmet(Exception):
    """A check that does not hold; its text says what was found."""


def check_run(run_dir: Path, config: RunConfig) -> list[Check]:
    """Every output that a finished run of `config` must have left in `run_dir`."""
    looks: list[tuple[str, Callable[[Path, RunConfig], str]]] = [
        ("settings", _settings),
        ("summary", _summary),
        ("metrics", _metrics),
        ("checkpoints", _checkpoints),
        ("ledger", _ledger),
        ("correlation reports", _correlation_reports),
        ("activation samples", _samples),
        ("report", _html_report),
    ]
    return [_check(name, look, run_dir, config) for name, look in looks]


def _check(name: str, look: Callable[[Path, RunConfig], str], run_dir: Path, config: RunConfig) -> Check:
    try:
        return Check(name, True, look(run_dir, config))
    except _Unmet as unmet:
        return Check(name, False, str(unmet))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, CheckpointError) as error:
        # A file that is missing or of another form is exactly what is looked for here.
        return Check(name, False, f"{type(error).__name__}: {error}")


def _require(condition: object, otherwise: str) -> None:
    if not condition:
        raise _Unmet(otherwise)


def _settings(run_dir: Path, config: RunConfig) -> str:
    _require(RunConfig.load(run_dir / "config.yaml") == config, "config.yaml differs from the settings of the run")
    return "config.yaml holds the settings of the run"


def _summary(run_dir: Path, config: RunConfig) -> str:
    summary = json.loads((run_dir / "summary.json").read_bytes())
    fvu = summary["evaluation/fvu"]
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
    if config.antidup.regularizer.enabled:
        wanted.add("losses/diversity_penalty")
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    records = [line for line in lines if "step" in line]
    found = {name for record in records for name in record}
    _require(not wanted - found, f"missing from metrics.jsonl: {', '.join(sorted(wanted - found))}")
    if config.antidup.monitor.enabled:
        _require(any(n.startswith("duplicates/") for n in found), "no duplicates/* in metrics.jsonl")
    bad = {n for r in records for n in wanted & set(r) if not isinstance(r[n], _NUMBER) or not math.isfinite(r[n])}
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
        if not enabled:
            _require(not record["calls"] and not record["files"], f"{name} is off and was used: {record}")
            continue
        usage = judge(name, record, run_dir)
        _require(not usage.lacking, f"{name}: {', '.join(usage.lacking)}")
        said.append(f"{name} {record['calls']} calls, {len(record['files'])} files")
    return "; ".join(said) or "all four off, none used"


def _correlation_reports(run_dir: Path, config: RunConfig) -> str:
    files = sorted((run_dir / "anti_duplication_logs").glob("correlation_step_*.json"))
    if not config.antidup.monitor.enabled:
        _require(not files, f"the monitor is off and wrote {len(files)} reports")
        return "none, the monitor is off"
    _require(files, "no report in anti_duplication_logs")
    for file in files:
        try:
            validate_correlation_report(json.loads(file.read_bytes()))
        except ValueError as error:
            raise _Unmet(f"{file.name}: {error}") from error
    report = json.loads(files[-1].read_bytes())
    live, pairs = report["live_latents"], report["pairs_total"]
    _require(live > 0, f"{files[-1].name}: no live latents")
    _require(report["d_sae"] == config.transcoder.d_sae, f"{files[-1].name}: d_sae is {report['d_sae']}")
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
