"""`transcoder validate`: one short run with the anti-duplication parts on, one with them off, all outputs checked."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transcoder.config import RunConfig
from transcoder.files import local_path, replace_atomically
from transcoder.reporting.compare import compare_runs, format_comparison, write_comparison
from transcoder.training.heldout_duplicates import heldout_duplicates
from transcoder.training.output_checks import Check, check_run
from transcoder.training.trainer import train_transcoder
from transcoder.usage import SECTIONS


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
    out = local_path(out)
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
        _add_to_summary(out / name, heldout_duplicates(result.transcoder, result.heldout, run.antidup.monitor))
        checks[name] = check_run(out / name, run)
    comparison = compare_runs(out / "with_antidup", out / "baseline")
    write_comparison(comparison, out / "comparison.json")
    return ValidationResult(checks, comparison)


def _add_to_summary(run_dir: Path, metrics: dict[str, float]) -> None:
    path = run_dir / "summary.json"
    summary = {**json.loads(path.read_bytes()), **metrics}
    replace_atomically(path, json.dumps(summary, indent=2))
