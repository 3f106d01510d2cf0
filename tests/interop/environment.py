"""One environment for one peer library: its released version from PyPI, torch and this checkout together.

    python tests/interop/environment.py sparsify              # prints the environment's Python
    python tests/interop/environment.py saelens --into DIR

The libraries pin versions that exclude each other, so each has an environment of its own. It is kept in `.interop/` of the
checkout, named by what it was made from, and made again only when that changed. Packages come through uv, whose cache makes an
environment a matter of seconds; a uv that is not on the PATH is put into an environment of its own under `.interop/` by pip.

torch is asked for by the version below. pip's own settings (index, find-links, certificates) are handed on, so a machine set up
for CPU builds gets one; elsewhere on Linux PyPI's build comes with GPU libraries, and `--torch-backend cpu` asks uv for
PyTorch's CPU index instead.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import venv
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

TORCH = "torch==2.13.0"

PEERS = {
    "saelens": "sae-lens==6.54.12",
    "sparsify": "eai-sparsify==1.3.3",
    "dictionary-learning": "dictionary-learning==0.1.0",
    # 0.4.1 was never on PyPI; this is the fork that is, with the same file format.
    "circuit-tracer": "circuit-tracer==0.5.0",
    "sae-bench": "sae-bench==0.6.0",
}
TOGETHER = {"circuit-tracer": ("nnsight==0.6.3",)}
"""Installed at the same time: circuit-tracer 0.5.0 cannot import its nnsight backend with the newest nnsight, 0.8.1."""
ALONE = {"sparsify": ("eai-delphi==0.1.3",)}
"""Installed without its dependencies: only the loader of delphi is called, which needs none of vllm and bitsandbytes."""

UNFIT = ("torchvision",)
"""What a library pulls in and none of it needs here: PyPI's torchvision is built for GPUs and cannot load beside a CPU build of
torch, and transformers takes a torchvision that is there and broken for one that works."""

TOOLS = ("pytest>=8", "pytest-timeout>=2.3")


def environment(library: str, into: Path | None = None, torch_backend: str | None = None) -> Path:
    """The environment's Python; made first where there is none, or none from the same parts.

    Args:
        library: a key of `PEERS`.
        into: the folder that holds environments; default `.interop/` of the checkout.
        torch_backend: as uv's `--torch-backend`, such as `cpu`.

    Raises:
        subprocess.CalledProcessError: an install that failed; its output has been printed.
    """
    folder = (into or ROOT / ".interop").resolve()
    parts = {
        "packages": [TORCH, PEERS[library], *TOOLS, *TOGETHER.get(library, ()), *ALONE.get(library, ())],
        "torch_backend": torch_backend,
        "python": platform.python_version(),
        "checkout": str(ROOT),
        # What the checkout asks for is installed too, and an editable install shows new modules by itself.
        "project": re.findall(r"(?ms)^dependencies = \[.*?^\]", (ROOT / "pyproject.toml").read_text(encoding="utf-8")),
    }
    key = hashlib.blake2b(json.dumps(parts, sort_keys=True).encode(), digest_size=6).hexdigest()
    home = folder / f"{library}-{key}"
    python = home / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    done = home / "complete.json"
    if done.is_file():
        return python
    folder.mkdir(parents=True, exist_ok=True)
    uv, settings = _uv(folder), {**os.environ, **_from_pip()}
    for old in folder.glob(f"{library}-*"):
        shutil.rmtree(old)
    _call([uv, "venv", "--quiet", "--python", sys.executable, str(home)], settings)
    backend = ["--torch-backend", torch_backend] if torch_backend else []
    install = [uv, "pip", "install", "--quiet", "--python", str(python), *backend]
    _call([*install, TORCH, PEERS[library], *TOGETHER.get(library, ()), "-e", str(ROOT), *TOOLS], settings)
    if library in ALONE:
        _call([*install, "--no-deps", *ALONE[library]], settings)
    _call([uv, "pip", "uninstall", "--quiet", "--python", str(python), *UNFIT], settings)
    done.write_text(json.dumps(parts, indent=1, sort_keys=True), encoding="utf-8")
    return python


def _uv(folder: Path) -> str:
    found = shutil.which("uv")
    if found:
        return found
    home = folder / "uv"
    at = home / ("Scripts/uv.exe" if os.name == "nt" else "bin/uv")
    if not at.is_file():
        venv.create(home, with_pip=True, clear=True)
        _call([str(at.with_name(Path(sys.executable).name)), "-m", "pip", "install", "--quiet", "uv>=0.8"], os.environ)
    return str(at)


def _from_pip() -> dict[str, str]:
    """pip's sources and certificates under uv's names: a mirror or a folder of wheels set up for pip serves here too."""
    names = {"find-links": "UV_FIND_LINKS", "index-url": "UV_DEFAULT_INDEX", "cert": "SSL_CERT_FILE"}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    ).stdout
    found = {}
    for line in listed.splitlines():
        name, _, value = line.partition("=")
        wanted = names.get(name.rpartition(".")[2])
        value = value.strip("'\"")
        if wanted and wanted not in os.environ and _reachable(value):
            found[wanted] = value
    return found


def _reachable(sources: str) -> bool:
    """pip warns about a local folder that is not there; uv refuses it."""
    return all(Path(s.removeprefix("file://")).exists() for s in sources.split() if s.startswith(("file://", "/")))


def _call(command: list[str], settings: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=dict(settings), capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, sep="\n", file=sys.stderr)
        done.check_returncode()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="make (or find) the environment of one peer library; prints its Python"
    )
    parser.add_argument("library", choices=sorted(PEERS))
    parser.add_argument(
        "--into", type=Path, help="the folder that holds environments (default: .interop/ of the checkout)"
    )
    parser.add_argument("--torch-backend", help="as uv's --torch-backend, such as cpu")
    given = parser.parse_args()
    try:
        print(environment(given.library, given.into, given.torch_backend))
    except subprocess.CalledProcessError as error:
        sys.exit(f"environment: {given.library}: {' '.join(error.cmd[:4])} ... failed with {error.returncode}")


if __name__ == "__main__":
    main()
