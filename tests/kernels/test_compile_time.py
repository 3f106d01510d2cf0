"""What a first call costs: Triton compiles cold and finds its cache warm, the extension notes its own compilation."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from transcoder.doctor import examine
from transcoder.kernels import compile_time, extension
from transcoder.kernels.compile_time import CompileTime

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")

COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from transcoder.kernels import segments_triton as s
from transcoder.kernels.compile_time import triton_cache, watched
import triton.language as tl

with watched() as found:
    kernel = s.segment_sums
    source = ASTSource(
        kernel, {"values": "*fp32", "ptr": "*i64", "out": "*fp32", "ACC": "constexpr", "ENTRIES": "constexpr"},
        {(3,): tl.float32, (4,): 256},
    )
    triton.compile(source, target=GPUTarget("cuda", 90, 32))
print(found.compiled, found.loaded, found.compile_seconds, found.load_seconds, triton_cache())
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
    assert compile_time.remember_first("sm_90", CompileTime(compiled=3, loaded=20, compile_seconds=2)) is None
    cold = CompileTime(compiled=23, compile_seconds=31.5)
    assert compile_time.remember_first("sm_90", cold) == cold
    assert compile_time.remember_first("sm_90", CompileTime(loaded=23, load_seconds=0.5)) == cold
    assert compile_time.remember_first("sm_80", CompileTime(loaded=23)) is None
    (tmp_path / "cache" / "first_call.json").write_text("{")
    assert compile_time.remember_first("sm_90", CompileTime(loaded=23)) is None


def test_the_doctor_says_what_first_calls_cost() -> None:
    lines = [str(fact) for fact in examine()]
    if extension.usable():
        cost = extension.first_call()
        assert cost is not None
        assert cost.folder.is_dir()
        (line,) = (line for line in lines if "C++ extension: compiled once" in line)
        assert re.search(r"this process waited \d+\.\d{3} s; kept in " + re.escape(str(cost.folder)), line)
    if importlib.util.find_spec("triton") is not None:
        (line,) = (line for line in lines if "Triton kernels" in line)
        assert str(compile_time.triton_cache()) in line
