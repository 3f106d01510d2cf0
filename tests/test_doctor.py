"""`transcoder doctor`: its facts, its exit code, and what a first call costs: Triton compiles cold and finds its cache warm."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from transcoder.cli import main
from transcoder.doctor import CompileTime, remember_first
from transcoder.kernels import extension

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from transcoder.kernels import segments_triton as s
from transcoder.doctor import compile_time
import triton.language as tl
from triton import knobs

with compile_time() as found:
    kernel = s.segment_sums
    source = ASTSource(
        kernel, {"values": "*fp32", "ptr": "*i64", "out": "*fp32", "ACC": "constexpr", "ENTRIES": "constexpr"},
        {(3,): tl.float32, (4,): 256},
    )
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(found.compiled, found.loaded, found.compile_seconds, found.load_seconds, knobs.cache.dir)
"""


@needs_triton
def test_cold_and_warm_are_told_apart(tmp_path: Path) -> None:
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)

    def run() -> tuple[int, int, float, float, str]:
        words = [sys.executable, "-c", COMPILE]
        done = subprocess.run(words, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        compiled, loaded, cold, warm, folder = done.stdout.split()
        return int(compiled), int(loaded), float(cold), float(warm), folder

    compiled, loaded, seconds, _, folder = run()
    assert (compiled, loaded, folder) == (1, 0, str(tmp_path))
    assert seconds > 0
    compiled, loaded, seconds, _, _ = run()
    assert (compiled, loaded, seconds) == (0, 1, 0)


def test_only_a_whole_compilation_is_noted_as_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSCODER_CACHE", str(tmp_path / "cache"))
    assert remember_first("sm_90", CompileTime(compiled=3, loaded=20, compile_seconds=2)) is None
    cold = CompileTime(compiled=23, compile_seconds=31.5)
    assert remember_first("sm_90", cold) == cold
    assert remember_first("sm_90", CompileTime(loaded=23, load_seconds=0.5)) == cold
    assert remember_first("sm_80", CompileTime(loaded=23)) is None
    (tmp_path / "cache" / "first_call.json").write_text("{")
    assert remember_first("sm_90", CompileTime(loaded=23)) is None


def test_doctor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    code, out = main(["doctor"]), capsys.readouterr().out
    assert code == 0, out
    lines = out.splitlines()
    assert all(line.startswith(("ok ", "note ")) for line in lines)
    for text in ("python 3.", "torch ", "topk_encode on cpu", "FeatureCorrelation on cpu", "demo language model"):
        assert any(text in line for line in lines)
    if extension.usable():
        cost = extension.first_call()
        assert cost is not None
        assert cost.folder.is_dir()
        (line,) = (line for line in lines if "C++ extension: compiled once" in line)
        assert re.search(r"this process waited \d+\.\d{3} s; kept in " + re.escape(str(cost.folder)), line)
    if importlib.util.find_spec("triton") is not None:
        from triton import knobs

        (line,) = (line for line in lines if "Triton kernels" in line)
        assert str(knobs.cache.dir) in line
    monkeypatch.setenv("TRANSCODER_BACKEND", "abacus")
    code, out = main(["doctor"]), capsys.readouterr().out
    assert code == 1
    assert any(line.startswith("missing") and "abacus" in line for line in out.splitlines())
