"""The example notebook: well-formed, without outputs, and every cell runs."""

from __future__ import annotations

import base64
import json
import os
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


def test_the_notebook_is_one_without_outputs() -> None:
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    ids = [cell["id"] for cell in cells()]
    assert len(set(ids)) == len(ids)
    for cell in cells():
        fields = {"cell_type", "id", "metadata", "source"}
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            fields |= {"outputs", "execution_count"}
        assert set(cell) == fields
        assert all(isinstance(line, str) for line in cell["source"])


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_notebook.py"), str(NOTEBOOK)],
        capture_output=True,
        text=True,
        timeout=280,
        cwd=tmp_path,
        env={**os.environ, "TMPDIR": str(tmp_path)},
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
    told = ("80 of 80 steps", "256 latents", "max activation", "pairs above", "Correlation monitor")
    assert [words for words in told if words not in pages] == []
    assert "[]" in shown["text"], "run.missing: a whole run lacks nothing"
