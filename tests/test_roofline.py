"""The predictions: complete, never below their floors, made from what is launched, and called predictions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
KERNELS = {
    *("topk_encode forward", "batch_topk_encode forward", "feature-major order", "encode backward"),
    *("nested loss forward", "nested loss backward", "correlation sketch", "correlation exact"),
    *("Adam and projection", "whole step, topk", "whole step, batch_topk"),
}
END = "== end of one output =="
ONE = ("--chip", "h100", "--rows", "1024", "--k", "48")


def run(*words: str) -> str:
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    environment.pop("TRITON_INTERPRET", None)
    done = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@cache
def outputs() -> list[str]:
    """The report as JSON, its table for one width, and the JSON again after a launch choice changed: one process."""
    script = f"""
from dataclasses import replace
import bench.roofline
from transcoder.kernels.encode import config
one = {list(ONE)}
bench.roofline.main(["--json", *one])
print({END!r})
bench.roofline.main([*one, "--latents", "18432"])
print({END!r})
config.PRODUCT["sm_90"]["half"] = replace(config.PRODUCT["sm_90"]["half"], group=1)
bench.roofline.main(["--json", *one, "--latents", "18432"])
"""
    return run("-c", script).split(END)


def row(kernel: str, latents: int = 18432, output: int = 0) -> dict[str, Any]:
    rows = json.loads(outputs()[output])["rows"]
    (found,) = (r for r in rows if r["kernel"] == kernel and r["shape"]["latents"] == latents)
    return found


def test_every_kernel_at_every_width_and_no_time_below_its_floor() -> None:
    found = json.loads(outputs()[0])
    assert found["predicted"] is True
    for latents in (18432, 131072, 1048576):
        names = {r["kernel"] for r in found["rows"] if r["shape"]["latents"] == latents}
        assert names == (KERNELS if latents == 18432 else KERNELS - {"correlation exact"})
    for r in found["rows"]:
        floor, planned = r["floor"], r["planned"]
        assert 0 < floor["bytes"] <= planned["bytes"], r
        assert floor["matrix_operations"] <= planned["matrix_operations"], r
        assert floor["predicted_seconds"] < planned["predicted_seconds"], r
        assert floor["bound"] in ("memory", "matrix", "vector")
        assert "seconds" not in {*floor, *planned}


def test_counts_by_hand() -> None:
    encode, backward, adam = row("topk_encode forward"), row("encode backward"), row("Adam and projection")
    product = 2 * 1024 * 18432 * 2304
    assert encode["floor"]["matrix_operations"] == product
    # 144 whole tiles of 128, and the tokens that are expected to be computed again: one tile for one in a thousand.
    assert encode["planned"]["matrix_operations"] == pytest.approx(product + 1e-3 * 1024 * 2 * 128 * 128 * 2304)
    W = 18432 * 2304
    # Cast to bf16, read once as that by 8 row blocks of one group; kept entries written and read.
    assert encode["planned"]["bytes"] > (4 + 2 + 2) * W
    assert encode["planned"]["bytes"] < (4 + 2 + 2) * W + 100e6
    assert backward["planned"]["bytes"] > 4 * W
    # Adam alone turns over 28 bytes a parameter.
    assert adam["planned"]["bytes"] > 28 * 2 * W
    steps = row("whole step, topk")["planned"]
    parts = (
        "topk_encode forward",
        "encode backward",
        "nested loss forward",
        "nested loss backward",
        "Adam and projection",
    )
    alone = sum(row(name)["planned"]["bytes"] for name in parts)
    # What lies between the parts sweeps batches (9 MB each), not dictionaries: copying both gradients would be 680 MB.
    assert alone < steps["bytes"] < alone + 2 * 4 * W
    assert steps["triton_launches"] >= 15


def test_figures_follow_the_launch_choices() -> None:
    plain, changed = row("topk_encode forward"), row("topk_encode forward", output=2)
    # Every row block then reads all of W_enc from memory by itself.
    assert changed["planned"]["bytes"] - plain["planned"]["bytes"] == 7 * 18432 * 2304 * 2
    assert changed["floor"] == plain["floor"]


def test_the_table_says_predicted() -> None:
    text = outputs()[1].strip()
    first, *rest = text.splitlines()
    assert re.match(r"PREDICTED \d{4}-\d\d-\d\d, not measured: no GPU was asked", first)
    titles = [line for line in rest if ", B 1024, d 2304" in line]
    assert titles
    assert all(line.endswith(": predicted") for line in titles)
    assert "989 TFLOP/s dense bf16 at 60%" in text
    assert all(name in text for name in KERNELS)


def test_a_kernel_without_a_model_is_an_error_that_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.launch_cost import total
    from bench.launch_trace import Launch

    with pytest.raises(KeyError, match="'brand_new' has no traffic model"):
        total([Launch("brand_new", (1,), {})], 50e6)


def test_bytes_of_pytorch_operations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    from bench.launch_trace import Call, Recorder

    def moved(*makers: Any) -> int:
        a, b, ids = torch.ones(100, 10), torch.ones(100, 10), torch.arange(50)
        with Recorder() as recorder:
            for make in makers:
                make(a, b, ids)
        assert all(isinstance(event, Call) for event in recorder.events)
        return sum(event.bytes for event in recorder.events)

    whole = 4 * 1000
    assert moved(lambda a, b, ids: a + b) == 3 * whole
    assert moved(lambda a, b, ids: a * a) == 2 * whole
    assert moved(lambda a, b, ids: a.mul_(b)) == 3 * whole
    assert moved(lambda a, b, ids: a.copy_(b)) == 2 * whole
    assert moved(lambda a, b, ids: a.zero_()) == whole
    assert moved(lambda a, b, ids: a.t().view(10, 100)[2:].detach()) == 0
    assert moved(lambda a, b, ids: a + b[:1].expand(100, 10)) == 2 * whole + 40
    assert moved(lambda a, b, ids: a.index_select(0, ids)) == 2 * 50 * 40 + 50 * 8
    # A radix sort of 32-bit keys with 64-bit payload: four passes, each read and written.
    assert moved(lambda a, b, ids: a.view(-1).sort(stable=True)) == 4 * 2 * 1000 * 12
