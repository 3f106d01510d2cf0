"""The report's own process: it leaves the page, needs no torch, says what went wrong, and holds nobody up."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from transcoder.reporting import report_subprocess, write_report

NO_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"torch", "triton", "transformer_lens", "plotly"}: raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
from transcoder.reporting.report import payload
from transcoder.reporting.run import Run
core, cards = payload(Run(sys.argv[1]))
assert cards.with_contexts and len(core["sections"]) == 7
"""


def test_it_writes_the_same_page(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=100, latents=4)
    assert report_subprocess.write_report_apart(run, 120) == run / "report.html"
    page = (run / "report.html").read_bytes()
    assert write_report(run).read_bytes() == page


def test_a_report_needs_no_torch(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=100, latents=4)
    subprocess.run([sys.executable, "-c", NO_TORCH, str(run)], check=True, timeout=120)


def test_what_went_wrong_is_said(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=100, latents=4)
    (run / "report.html").mkdir()
    with pytest.raises(report_subprocess.ReportError, match=r"IsADirectoryError|directory"):
        report_subprocess.write_report_apart(run, 120)


def test_whoever_does_not_wait_gets_a_page_all_the_same(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=100, latents=4)
    assert report_subprocess.write_report_apart(run, 0.0) is None
    deadline = time.monotonic() + 120
    while not (run / "report.html").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert (run / "report.html").read_text().rstrip().endswith("</html>")


@pytest.mark.skipif(not Path("/proc/self/limits").exists(), reason="no limits to set here")
def test_its_memory_is_bounded(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """With less memory than Python's own libraries need it fails, by name, and this process does not notice."""
    run = make_run(steps=100, latents=4)
    code = (
        "import transcoder.reporting.report_subprocess as a, sys; "
        f"a.MEMORY_BYTES = 64 << 20; sys.argv = ['x', {str(run)!r}]; a._main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env=dict(os.environ)
    )
    assert done.returncode != 0
    assert not (run / "report.html").exists()
