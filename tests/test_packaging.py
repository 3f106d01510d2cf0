"""What is published: an sdist that is the whole checkout, a whole wheel, and ops that need torch, triton and numpy only."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import transcoder

ROOT = Path(__file__).resolve().parents[1]
ROOMS = {"csrc": "transcoder/kernels/csrc", "kernels": "transcoder/kernels", "transcoder": "transcoder"}
"""Folders of the checkout that are installed, and where."""
NEEDED = ("torch", "triton", "numpy")

BUILD = """
import json, sys
from setuptools import build_meta
out = sys.argv[1]  # the build prints its own words
asked = build_meta.get_requires_for_build_wheel()
print(json.dumps([asked, build_meta.build_sdist(out), build_meta.build_wheel(out)]), file=sys.stderr)
"""

OPS = """
import torch
from transcoder.kernels import FeatureCorrelation, active_backend, batch_topk_encode, nested_loss, sparse_decode
from transcoder.kernels import threshold_encode, topk_encode
g = torch.Generator().manual_seed(0)
x, y = torch.randn(9, 16, generator=g), torch.randn(9, 16, generator=g)
W_enc, W_dec = torch.randn(32, 16, generator=g), torch.randn(32, 16, generator=g, requires_grad=True)
b_enc, b_dec = torch.zeros(32), torch.zeros(16)
dense = (x @ W_enc.T).relu()
codes = topk_encode(x, W_enc, b_enc, 4)
torch.testing.assert_close(codes.to_dense().sum(1), dense.topk(4).values.sum(1))
torch.testing.assert_close(batch_topk_encode(x, W_enc, b_enc, 4).values.sum(), dense.flatten().topk(36).values.sum())
torch.testing.assert_close(threshold_encode(x, W_enc, b_enc, torch.ones(32)).to_dense(), dense * (dense > 1))
torch.testing.assert_close(sparse_decode(codes, W_dec, b_dec), codes.to_dense() @ W_dec + b_dec)
nested_loss(codes, W_dec, b_dec, y, [8, 32], [0.5, 0.5]).value.backward()
assert W_dec.grad.abs().sum() > 0
FeatureCorrelation(32).update(codes)
print(active_backend(x.device))
"""


def run(python: Path | str, words: list[str], cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(python), *words], cwd=cwd, capture_output=True, text=True, timeout=300, env={**clean, **environment}
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def checkout_files() -> set[str]:
    if not (ROOT / ".git").exists():
        pytest.skip("no git checkout: what belongs to it is not known")
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name for name in listed.splitlines() if (ROOT / name).is_file()}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The sdist and the wheel of a clean copy of the checkout."""
    pytest.importorskip("setuptools", minversion="77")
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in checkout_files():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    done = run(sys.executable, ["-c", BUILD, str(out)], source)
    said = done.stdout + done.stderr
    assert not re.search(r"SetuptoolsWarning|Deprecat|is absent from the `packages`", said), said
    requires, sdist, wheel = json.loads(done.stderr.splitlines()[-1])
    assert not [name for name in requires if "torch" in name], "the build may not ask for torch"
    return {"sdist": out / sdist, "wheel": out / wheel}


def test_the_sdist_is_the_whole_checkout(built: dict[str, Path]) -> None:
    with tarfile.open(built["sdist"]) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    assert checkout_files() <= packed, sorted(checkout_files() - packed)


def test_the_wheel_has_what_is_installed_and_nothing_else(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name}
    rooms = [(name.partition("/"), name) for name in checkout_files()]
    wanted = {f"{ROOMS[room]}/{rest}" for (room, _, rest), _ in rooms if room in ROOMS}
    assert packed == wanted, sorted(packed ^ wanted)


def test_the_metadata_of_the_wheel(built: dict[str, Path]) -> None:
    with zipfile.ZipFile(built["wheel"]) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith("/METADATA")]
        text = archive.read(name).decode()
    for line in ("Name: sparse-transcoders", f"Version: {transcoder.__version__}", "Project-URL: "):
        assert re.search(rf"^{re.escape(line)}", text, flags=re.M), line


def test_the_changelog_has_this_version() -> None:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(transcoder.__version__)}\] - \d{{4}}-\d\d-\d\d$", text, flags=re.M)


def closure(names: tuple[str, ...]) -> dict[str, importlib.metadata.Distribution]:
    """The distributions of that name with all that they need here."""
    requirement = pytest.importorskip("packaging.requirements").Requirement
    found: dict[str, importlib.metadata.Distribution] = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop().lower().replace("_", "-")
        if name in found:
            continue
        found[name] = importlib.metadata.distribution(name)
        needs = map(requirement, found[name].requires or ())
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


@pytest.fixture(scope="module")
def bare(built: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment of torch, triton, numpy, what these need, and the wheel without its dependencies."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("no triton on this system")
    home = tmp_path_factory.mktemp("bare")
    venv.create(home, symlinks=True, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    for distribution in closure(NEEDED).values():
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(distribution.locate_file(top))).resolve())
    with zipfile.ZipFile(built["wheel"]) as archive:
        archive.extractall(site)
    return home / "bin" / "python"


def test_nothing_else_is_in_the_bare_environment(bare: Path, tmp_path: Path) -> None:
    code = "import importlib.metadata as m, json; print(json.dumps([d.metadata['Name'] for d in m.distributions()]))"
    names = {name.lower().replace("_", "-") for name in json.loads(run(bare, ["-c", code], tmp_path).stdout)}
    assert names == {*closure(NEEDED), "sparse-transcoders"}


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_the_ops_work_there(bare: Path, tmp_path: Path, backend: str) -> None:
    interpreted = {"TRITON_INTERPRET": "1"} if backend == "triton" else {}
    said = run(bare, ["-c", OPS], tmp_path, TRANSCODER_BACKEND=backend, **interpreted).stdout.split()
    assert said[-1] == backend or (backend == "auto" and said[-1] in ("cpp", "torch"))


def test_a_checkout_as_current_folder_does_not_hide_the_installed_kernels(bare: Path) -> None:
    """`python -c`, `python -m`: the current folder comes first, and its transcoder/ has no folder kernels."""
    code = (
        "import transcoder.kernels as k, os; print(os.path.realpath(k.__file__)); import transcoder.kernels.decode.op"
    )
    assert run(bare, ["-c", code], ROOT).stdout.split() == [str(ROOT / "kernels" / "__init__.py")]
