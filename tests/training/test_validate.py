"""`validate` on a run of a few steps, and every kind of missing or wrong output found by name."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder.activations import ActivationBatch
from transcoder.config import MonitorSection, RunConfig
from transcoder.model import Transcoder, TranscoderConfig
from transcoder.training.heldout_pairs import heldout_duplicates
from transcoder.training.validate import ValidationResult, check_run, validate

TINY = RunConfig.from_dict(
    {
        "model": {"name": "demo", "device": "cpu"},
        "activations": {"sequence_length": 32, "sequences_per_forward": 4, "buffer_tokens": 256, "prefetch": 0},
        "transcoder": {"d_sae": 64, "k": 4, "widths": [16, 64], "normalization_tokens": 256},
        "training": {"steps": 4, "batch_size": 64, "warmup_steps": 1, "evaluation_tokens": 128},
        "antidup": {
            # Every part has something to act on within four steps.
            "regularizer": {"orthogonality_weight": 0.01, "orthogonality_every": 1, "orthogonality_threshold": 0.0},
            "samples": {"collect_every": 1, "min_activation": 0.0},
            "monitor": {"correlation_save_frequency": 2},
            "verify_at_step": 4,
        },
        "checkpoint": {"every": 2},
        "logging": {"every": 1, "progress": False},
    }
)
WITH = TINY.replace({"name": "with_antidup"})


@pytest.fixture(scope="module")
def validated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ValidationResult]:
    out = tmp_path_factory.mktemp("validate")
    return out, validate(TINY, out)


@pytest.mark.slow
def test_every_check_holds_and_the_comparison_is_saved(validated: tuple[Path, ValidationResult]) -> None:
    out, result = validated
    assert result.passed, result.format()
    assert list(result.checks) == ["with_antidup", "baseline"]
    assert result.format().endswith("validation passed")
    assert json.loads((out / "comparison.json").read_text())
    usage = {name: json.loads((out / name / "usage.json").read_text())["components"] for name in result.checks}
    assert all(part["enabled"] and part["calls"] for part in usage["with_antidup"].values())
    assert not any(part["enabled"] or part["calls"] for part in usage["baseline"].values())


def test_both_dictionaries_are_measured_alike(validated: tuple[Path, ValidationResult]) -> None:
    """The baseline has no monitor: its duplicates are counted after training, as the other's are."""
    out, result = validated
    rows = {row["name"]: row for row in json.loads((out / "comparison.json").read_text())["figures"]}
    for name in ("mergeable", "correlated", "distinct_latents", "effective_dictionary_size"):
        assert all(isinstance(v, (int, float)) for v in rows[f"heldout_duplicates/{name}"]["values"]), name
    assert "Duplicate pairs" in result.format()


def test_held_out_duplicates_are_the_pairs_that_are_there() -> None:
    model = Transcoder(TranscoderConfig(8, 8, 16, 4))
    with torch.no_grad():
        model.W_enc[1] = model.W_enc[0]
        model.W_dec[1] = model.W_dec[0]
        model.W_enc[3] = 2 * model.W_enc[2]
        model.W_dec[3] = model.W_dec[2]
    x = torch.randn(2000, 8, generator=torch.Generator().manual_seed(0))
    tokens = torch.arange(1000)
    held = [
        ActivationBatch(part, part, tokens, tokens, sequences=tokens // 8 + 1000 * i)
        for i, part in enumerate(x.split(1000))
    ]
    found = heldout_duplicates(model, held, MonitorSection(min_support=50, min_sequences=20, update_every=7))
    codes = model.encode(x).to_dense()
    r = torch.corrcoef(codes.T).nan_to_num().triu(1)
    assert found["heldout_duplicates/pairs"] == int((r > 0.8).sum()) >= 2
    assert found["heldout_duplicates/live_latents"] == int((codes > 0).any(0).sum())
    assert model.training


def change_json(file: Path, change: Callable[[Any], object]) -> None:
    value = json.loads(file.read_text())
    change(value)
    file.write_text(json.dumps(value))


def change_usage(part: str, **values: Any) -> Callable[[Path], object]:
    return lambda run: change_json(run / "usage.json", lambda usage: usage["components"][part].update(values))


def newest(run: Path, pattern: str) -> Path:
    return sorted(run.glob(pattern))[-1]


def without_name(run: Path) -> None:
    file = run / "metrics.jsonl"
    file.write_text(file.read_text().replace('"losses/inner_mse_loss_16"', '"losses/renamed"'))


def not_a_number(run: Path) -> None:
    file = run / "metrics.jsonl"
    record = {**json.loads(file.read_text().splitlines()[0]), "step": 1, "losses/mse_loss": None}
    file.write_text(file.read_text() + json.dumps(record) + "\n")


def empty_samples(run: Path) -> None:
    from pyarrow import parquet

    file = run / "activation_samples" / "samples.parquet"
    parquet.write_table(parquet.read_table(file).slice(0, 0), file)


DAMAGE: dict[str, tuple[str, Callable[[Path], object]]] = {
    "other settings": ("settings", lambda run: (run / "config.yaml").write_text(TINY.to_yaml())),
    "no settings": ("settings", lambda run: (run / "config.yaml").unlink()),
    "no summary": ("summary", lambda run: (run / "summary.json").unlink()),
    "a figure is null": (
        "summary",
        lambda run: change_json(run / "summary.json", lambda s: s.update({"evaluation/fvu": None})),
    ),
    "no metrics": ("metrics", lambda run: (run / "metrics.jsonl").unlink()),
    "a metric lacks": ("metrics", without_name),
    "a metric is null": ("metrics", not_a_number),
    "no checkpoints": ("checkpoints", lambda run: shutil.rmtree(run / "checkpoints")),
    "the last checkpoint lacks": ("checkpoints", lambda run: shutil.rmtree(newest(run, "checkpoints/step_*"))),
    "a torn checkpoint": ("checkpoints", lambda run: os.truncate(newest(run, "checkpoints/*/trainer.safetensors"), 99)),
    "a leftover": ("checkpoints", lambda run: (run / "checkpoints" / ".writing_step_00000009").mkdir()),
    "no ledger": ("ledger", lambda run: (run / "usage.json").unlink()),
    "never called": ("ledger", change_usage("position_sampler", calls=0)),
    "no effect": ("ledger", change_usage("diversity_regularizer", effect={"penalty": 0.0})),
    "no files": ("ledger", change_usage("correlation_monitor", files=[])),
    "a file that is not there": ("ledger", change_usage("activation_samples", files=["activation_samples/no"])),
    "disabled": ("ledger", change_usage("correlation_monitor", enabled=False)),
    "no reports": (
        "correlation reports",
        lambda run: [f.write_text("{}") for f in run.glob("anti_duplication_logs/correlation_step_*.json")],
    ),
    "a report that is torn": (
        "correlation reports",
        lambda run: os.truncate(newest(run, "anti_duplication_logs/correlation_step_*.json"), 40),
    ),
    "empty samples": ("activation samples", empty_samples),
    "samples that are no table": (
        "activation samples",
        lambda run: (run / "activation_samples" / "samples.parquet").write_text("x"),
    ),
    "no report": ("report", lambda run: (run / "report.html").unlink()),
    "half a report": ("report", lambda run: os.truncate(run / "report.html", 200)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_each_missing_or_wrong_output_is_found(
    validated: tuple[Path, ValidationResult], tmp_path: Path, damage: str
) -> None:
    run = shutil.copytree(validated[0] / "with_antidup", tmp_path / "run")
    assert all(check.passed for check in check_run(run, WITH))
    name, harm = DAMAGE[damage]
    harm(run)
    failed = [check for check in check_run(run, WITH) if not check.passed]
    assert [check.name for check in failed] == [name], failed
    assert failed[0].detail
