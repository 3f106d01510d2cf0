"""The wheel carries every source of the extension and every module, and building it asks for no torch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD = """
import json, sys
from setuptools import build_meta
out = sys.argv[1]  # the build puts its own words there
print(json.dumps([build_meta.get_requires_for_build_wheel(), build_meta.build_wheel(out)]), file=sys.stderr)
"""


def test_the_wheel_is_whole(tmp_path: Path) -> None:
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path / "source", tmp_path / "out"
    out.mkdir()
    for name in ("csrc", "kernels", "transcoder"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    ran = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)], cwd=source, capture_output=True, text=True, timeout=300
    )
    assert ran.returncode == 0, ran.stderr
    requires, wheel = json.loads(ran.stderr.splitlines()[-1])
    assert not [name for name in requires if "torch" in name]
    with zipfile.ZipFile(out / wheel) as archive:
        packed = set(archive.namelist())
    wanted = {f"transcoder/kernels/csrc/{file.name}" for file in (ROOT / "csrc").iterdir()}
    wanted |= {f"transcoder/kernels/{file.relative_to(ROOT / 'kernels')}" for file in (ROOT / "kernels").rglob("*.py")}
    wanted |= {
        str(file.relative_to(ROOT)) for file in (ROOT / "transcoder").rglob("*.py") if "kernels" not in file.parts
    }
    assert wanted <= packed, sorted(wanted - packed)
    # The folder kernels/ is no top-level package of the wheel.
    assert not [name for name in packed if name.startswith(("kernels/", "csrc/"))]
