"""A bare `import kernels` belongs to Hugging Face's package: ours never answers to it, with that package or without."""

from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ROOT / "kernels" / "__init__.py"

try:
    importlib.metadata.version("kernels")
    INSTALLED = True
except importlib.metadata.PackageNotFoundError:
    INSTALLED = False
beside = pytest.mark.skipif(not INSTALLED, reason="the optional package `kernels` (Hugging Face) is not installed")

IS_THE_REAL_ONE = f"""
import os, sys
import kernels
assert kernels.__file__ is not None, "looks absent"
assert os.path.realpath(kernels.__file__) != {str(OURS)!r}, "ours answers to a bare `import kernels`"
assert sys.modules["kernels"] is kernels
assert hasattr(kernels, "get_kernel"), "not Hugging Face's package"
"""
OURS_HAS_ITS_OWN_NAME = f"""
import transcoder.kernels as ours
import os
assert os.path.realpath(ours.__file__) == {str(OURS)!r}
"""


def run(words: list[str], cwd: Path = ROOT, **environment: str) -> str:
    """stdout of a fresh interpreter. PYTHONPATH and safe-path settings of the caller must not decide the outcome."""
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [sys.executable, *words], cwd=cwd, capture_output=True, text=True, timeout=180, env={**clean, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@beside
def test_from_the_root_by_python_c() -> None:
    run(["-c", IS_THE_REAL_ONE + OURS_HAS_ITS_OWN_NAME])


@beside
def test_from_elsewhere(tmp_path: Path) -> None:
    run(["-c", IS_THE_REAL_ONE + OURS_HAS_ITS_OWN_NAME], cwd=tmp_path)


@beside
def test_a_script_in_the_root_and_ours_first() -> None:
    run(["-c", OURS_HAS_ITS_OWN_NAME + IS_THE_REAL_ONE])


@beside
def test_no_module_of_ours_answers_below_it() -> None:
    run(["-c", "import importlib.util, kernels\nassert importlib.util.find_spec('kernels.codes') is None"])


@beside
@pytest.mark.parametrize(
    "runner", [["-m", "pytest"], ["-c", "import pytest, sys; sys.exit(pytest.main(sys.argv[1:]))"]]
)
def test_by_pytest_in_the_root(tmp_path: Path, runner: list[str]) -> None:
    body = "".join(f"    {line}\n" for line in (IS_THE_REAL_ONE + OURS_HAS_ITS_OWN_NAME).strip().splitlines())
    (tmp_path / "test_it.py").write_text(f"def test_it():\n{body}", encoding="utf-8")
    out = run([*runner, "-q", "-p", "no:cacheprovider", f"--rootdir={tmp_path}", "-c", os.devnull, str(tmp_path)])
    assert "1 passed" in out


@beside
def test_by_python_m_transcoder_in_the_root() -> None:
    code = """
import runpy, sys
sys.argv = ["transcoder", "--version"]
try:
    runpy.run_module("transcoder", run_name="__main__", alter_sys=True)
except SystemExit as end:
    assert not end.code
"""
    run(["-c", code + IS_THE_REAL_ONE])
    assert run(["-m", "transcoder", "--version"]).startswith("transcoder ")


@beside
def test_transformers_finds_the_real_one_from_the_root() -> None:
    run(["-c", "from transformers.utils import import_utils as u\nassert u._is_package_available('kernels')[0]"])


@pytest.fixture(scope="module")
def without(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site-packages folder like ours, but without Hugging Face's kernels."""
    folder = tmp_path_factory.mktemp("site")
    for place in dict.fromkeys((sysconfig.get_path("purelib"), sysconfig.get_path("platlib"))):
        for entry in Path(place).iterdir():
            if not entry.name.startswith(("kernels", "__editable__")) and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def test_where_there_is_none_it_looks_absent(without: Path) -> None:
    code = "import kernels\nassert getattr(kernels, '__file__', None) is None, kernels.__file__"
    # -S leaves the real site-packages out; -c puts the root first on the path.
    run(["-S", "-c", code], PYTHONPATH=str(without))


def test_where_there_is_none_transformers_sees_none(without: Path) -> None:
    code = """
from transformers.utils import import_utils as u
found = u._is_package_available("kernels", return_version=True)
assert not found[0], found
"""
    run(["-S", "-c", code], PYTHONPATH=str(without))


def test_where_there_is_none_ours_still_works(without: Path, tmp_path: Path) -> None:
    """In a checkout on the path, with transcoder.kernels laid out as the build does it."""
    (tmp_path / "kernels").symlink_to(ROOT / "kernels")
    (tmp_path / "transcoder").mkdir()
    for entry in (ROOT / "transcoder").iterdir():
        (tmp_path / "transcoder" / entry.name).symlink_to(entry)
    (tmp_path / "transcoder" / "kernels").symlink_to(ROOT / "kernels")
    code = "import transcoder.kernels as ours, kernels\nassert ours.SparseCodes\nassert kernels is not ours"
    run(["-S", "-c", code], cwd=tmp_path, PYTHONPATH=str(without))
