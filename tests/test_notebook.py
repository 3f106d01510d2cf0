"""The example notebook: well-formed, with the outputs of one whole run, and every cell runs."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "docs" / "explore-a-run.ipynb"


def cells() -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return found


SMALL = {
    "name": "tiny",
    "transcoder.d_sae": 256,
    "transcoder.widths": [32, 96, 224, 256],
    "transcoder.dead_after_tokens": 20_000,
    "training.steps": 80,
    "training.batch_size": 512,
    "training.warmup_steps": 10,
    "training.lr": 5e-3,
    "training.evaluation_every": 20,
    "training.evaluation_tokens": 4096,
    "training.evaluation_ce_tokens": 1024,
    "activations.buffer_tokens": 8192,
    # So short a run has few strong pairs yet: a lower threshold, so that there is something to see.
    "antidup.monitor.correlation_threshold": 0.6,
    "antidup.monitor.release_threshold": 0.5,
    "antidup.monitor.min_support": 30,
    "antidup.monitor.block_tokens": 8192,
    "antidup.monitor.correlation_save_frequency": 40,
    "antidup.samples.collect_every": 5,
    "antidup.samples.save_frequency": 40,
    "antidup.verify_at_step": 40,
    "checkpoint.every": 40,
    "logging.every": 5,
    "logging.progress": False,
}
"""In place of the notebook's settings: a run of a quarter of a minute."""


def test_the_notebook_has_the_outputs_of_one_whole_run() -> None:
    """`jupyter nbconvert --to notebook --execute --inplace docs/explore-a-run.ipynb` writes them."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    ids = [cell["id"] for cell in cells()]
    assert len(set(ids)) == len(ids)
    code = [cell for cell in cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1)), "run from the top"
    assert all(output["output_type"] != "error" for cell in code for output in cell["outputs"])
    assert sum("image/png" in output.get("data", {}) for cell in code for output in cell["outputs"]) == 5
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert not re.search(r"/(home|root|tmp|work|Users)/", text), "paths of a machine"
    assert len(text) < 2_000_000


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    notebook = NOTEBOOK.read_text(encoding="utf-8")
    settings = '{\\"logging.progress\\": False}'
    assert notebook.count(settings) == 1
    small = json.dumps(repr(SMALL))[1:-1]
    (tmp_path / "notebook.ipynb").write_text(notebook.replace(settings, small), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_notebook.py"), "notebook.ipynb"],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    shown: dict[str, list[str]] = {"html": [], "png": [], "text": []}
    for line in done.stdout.splitlines():
        found = json.loads(line)
        shown[found["kind"]].append(found["content"])
    # A figure a plot, and tables for the run, its prefixes, latents, a latent, a search, the duplicates and the ledger.
    plots = sum("run.plot_" in "".join(cell["source"]) for cell in cells())
    assert len(shown["png"]) == plots == 5
    assert all(base64.b64decode(picture).startswith(b"\x89PNG") for picture in shown["png"])
    pages = "\n".join(shown["html"])
    assert len(shown["html"]) == 7
    told = ("80 of 80 steps", "256 latents", "max activation", "pairs above a correlation of", "Correlation monitor")
    assert [words for words in told if words not in pages] == []
    assert "[]" in shown["text"], "run.missing: a whole run lacks nothing"
