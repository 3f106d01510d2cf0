"""Two processes (gloo) that each count half of the tokens report what one process reports that counts all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from transcoder.antidup import Replicas, validate_correlation_report

from . import replica

SCRIPT = Path(replica.__file__)


def start(folder: Path, sketch_dim: int) -> list[dict[str, Any]]:
    """What both replicas found."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), "2", str(folder), str(sketch_dim)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in running:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    return [json.loads((folder / f"replica_2_{rank}.json").read_text()) for rank in range(2)]


def by_pair(report: dict[str, Any]) -> dict[tuple[int, int], dict[str, Any]]:
    return {(p["i"], p["j"]): p for p in report["pairs"]}


@pytest.mark.parametrize("sketch_dim", [0, 64])
def test_two_replicas_report_what_one_process_reports(sketch_dim: int, tmp_path: Path) -> None:
    first, second = start(tmp_path, sketch_dim)
    whole = json.loads(json.dumps(replica.run(0, 1, tmp_path, sketch_dim or None)))
    # Both decide the same; the first writes.
    assert first == second
    written = json.loads((tmp_path / "logs_2" / f"correlation_step_{replica.STEPS:08d}.json").read_text())
    assert written == first["report"]
    validate_correlation_report(written)
    merged, alone = first["report"], whole["report"]
    for name in ("tokens", "live_latents", "pairs_total", "pairs_flagged", "components"):
        assert merged[name] == alone[name]
    assert merged["pairs_flagged"] == 3
    assert merged["tokens"] == replica.SHARES * replica.STEPS * replica.TOKENS
    pairs = by_pair(merged)
    assert set(pairs) == set(by_pair(alone)) == {(2, 3), (4, 5), (6, 7)}
    for pair, other in by_pair(alone).items():
        for name in ("support", "sequences", "blocks_above", "flagged", "bounds"):
            assert pairs[pair][name] == other[name]
        for name in ("correlation", "cosine", "jaccard", "lower", "upper"):
            assert pairs[pair][name] == pytest.approx(other[name], abs=1e-9)
    assert first["targets"] == whole["targets"]
    if not sketch_dim:
        size = "effective_dictionary_size"
        assert merged[size] == pytest.approx(alone[size], rel=1e-9)
        assert merged["histogram"] == alone["histogram"]
    # The strongest examples are those of the union; the reservoirs are as large.
    tables = [pq.read_table(tmp_path / f"samples_{n}" / "samples.parquet").to_pylist() for n in (2, 1)]
    tops = [
        sorted((row["latent"], round(row["activation"], 5)) for row in table if row["kind"] == "top")
        for table in tables
    ]
    assert tops[0] == tops[1]
    assert len(tops[0]) == 6 * replica.LATENTS
    counts = [sum(row["kind"] != "top" for row in table) for table in tables]
    assert counts[0] == pytest.approx(counts[1], rel=0.05)


def test_without_a_process_group_it_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        Replicas()
