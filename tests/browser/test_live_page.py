"""`transcoder watch`: the page of a run that goes on updates by itself, and its server gives nothing else away."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.reporting.conftest import synthetic_run
from transcoder.reporting import watch_server

OpenPage = Callable[..., Any]


@pytest.fixture
def watched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, str]]:
    """A run in its middle, and the address of its live report."""
    monkeypatch.setattr(watch_server, "LEAST_SECONDS", 0.05)
    monkeypatch.setattr(watch_server, "SHARE", 0)
    run = synthetic_run(tmp_path / "run", interrupted=True, latents=12)
    with watch_server.serve(run) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield run, server.address
        server.shutdown()
        thread.join()


# `watched` first: the page is closed before its server is, or it would ask in vain and say so on the console.
def test_a_running_run_updates_by_itself(watched: tuple[Path, str], open_page: OpenPage, tmp_path: Path) -> None:
    run, address = watched
    page = open_page(address)
    page.locator("header .live", has_text="live").wait_for()
    assert "270 of 600 steps" in page.inner_text("header")
    page.locator("#pairs button.open").first.click()
    page.locator("#pairs tr.detail .ctx").first.wait_for()
    opened = page.locator("#pairs tr.detail h4").first.inner_text()
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 310, "time": 99.0, "metrics/fvu": 0.123}) + "\n")
    page.locator("header", has_text="310 of 600 steps").wait_for()
    assert page.locator("#pairs tr.detail h4").first.inner_text() == opened, "what was open stays open"
    # The rest of the run: the samples of its end are other ones.
    whole = synthetic_run(tmp_path / "whole", seed=1, latents=12)
    shutil.copy(whole / "activation_samples" / "samples.parquet", run / "activation_samples" / "samples.parquet")
    shutil.copy(whole / "metrics.jsonl", run / "metrics.jsonl")
    shutil.copy(whole / "summary.json", run / "summary.json")
    page.locator("header .pill", has_text="finished").wait_for()
    page.locator("#latent-card .ctx").first.wait_for()
