"""The arrows of the house: who may import whom, held by reading the source; and what `import transcoder` needs."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]

LOW = {
    "kernels",
    "config",
    "dictionary_config",
    "files",
    "layer_list",
    "phases",
    "settings",
    "tensor_file",
    "usage",
    "yaml_text",
}
TOP = {"__init__", "__main__", "cli", "commands", "doctor", "setting_help"}
# room -> rooms it may import besides itself. "a.b" allows that one module of room a.
ALLOWED: dict[str, set[str]] = {
    "kernels": set(),
    "settings": set(),
    "dictionary_config": {"settings"},
    "yaml_text": {"files", "settings"},
    "layer_list": {"settings"},
    "config": {"dictionary_config", "files", "layer_list", "settings", "yaml_text"},
    "files": set(),
    "usage": set(),
    "phases": set(),
    "tensor_file": {"files"},
    "demo": {"config"},
    "losses": LOW,
    "pretrained": {"checkpoint_folder", "files", "settings", "tensor_file"},
    "checkpoint_folder": {"files"},
    "selection": LOW,
    "model": LOW | {"losses", "pretrained", "selection"},
    "activations": LOW | {"demo"},
    "antidup": LOW | {"activations.batch"},
    "reporting": LOW | {"model", "checkpoint_folder"},
    "parallel": LOW | {"activations.batch", "losses", "model", "selection"},
    "training": LOW
    | {"losses", "model", "checkpoint_folder", "activations", "antidup", "parallel", "reporting", "demo"},
    "interop": LOW | {"losses", "model", "checkpoint_folder", "activations", "training", "reporting", "demo"},
    "setting_help": {"config", "settings"},
    "doctor": LOW | {"__init__", "demo"},
    "cli": {"__init__", "commands", "config", "setting_help"},
    "commands": LOW | {"doctor", "training", "reporting", "interop"},
    "__main__": {"cli"},
    # Public names, loaded on first use.
    "__init__": LOW | {"losses", "model", "activations", "antidup", "reporting", "training", "interop"},
}
HEAVY = {
    *("transformer_lens", "transformers", "tokenizers", "huggingface_hub", "datasets", "pyarrow", "wandb"),
    *("jinja2", "markupsafe", "pandas", "plotly", "scipy"),
    "docstring_parser",
    *("tensorboard", "matplotlib", "sae_lens", "sparsify", "dictionary_learning", "circuit_tracer"),
}
DAILY = {"yaml", "safetensors", "tqdm"}
KERNELS_MAY = {"torch", "triton", "numpy"}


class Import(NamedTuple):
    file: Path
    line: int
    module: str
    top_level: bool

    def __str__(self) -> str:
        return f"{self.file.relative_to(ROOT)}:{self.line} imports {self.module}"


def source_files() -> Iterator[tuple[str, Path]]:
    """(room, file) of everything that is installed."""
    for file in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", file
    for file in sorted((ROOT / "transcoder").rglob("*.py")):
        yield file.relative_to(ROOT / "transcoder").parts[0].removesuffix(".py"), file


def imports_of(file: Path) -> Iterator[Import]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    inside: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside.update(id(child) for child in ast.walk(node))
        # What stands under `if TYPE_CHECKING:` is never executed.
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            inside.update(id(child) for statement in node.body for child in ast.walk(statement))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for name in node.names:
                yield Import(file, node.lineno, name.name, id(node) not in inside)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: relative import: write the full name"
            module = node.module or ""
            for name in node.names:
                # `from transcoder import model` names a module, `from transcoder.model import Transcoder` an object in
                # one.
                whole = f"{module}.{name.name}"
                yield Import(file, node.lineno, whole if is_module(whole) else module, id(node) not in inside)


def is_module(name: str) -> bool:
    parts = name.split(".")
    if parts[0] != "transcoder" or len(parts) < 2:
        return False
    base = ROOT.joinpath(*parts[1:]) if parts[1] == "kernels" else ROOT.joinpath(*parts)
    return base.is_dir() or base.with_suffix(".py").is_file()


def every_import() -> Iterator[tuple[str, Import]]:
    for room, file in source_files():
        for found in imports_of(file):
            yield room, found


def room_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def test_every_room_is_on_the_map() -> None:
    assert {room for room, _ in source_files()} <= set(ALLOWED)


def test_imports_point_one_way() -> None:
    wrong = []
    for room, found in every_import():
        if found.module.split(".")[0] != "transcoder":
            continue
        target = room_of(found.module)
        modules = {"transcoder." + name for name in ALLOWED[room] if "." in name}
        if target != room and target not in ALLOWED[room] and found.module not in modules:
            wrong.append(f"{found}: {room} may import {sorted(ALLOWED[room])}")
    assert not wrong, "\n".join(wrong)


def test_the_map_has_no_circle() -> None:
    def reaches(room: str, seen: tuple[str, ...]) -> None:
        assert room not in seen, " -> ".join((*seen, room))
        for target in ALLOWED[room]:
            reaches(target.split(".")[0], (*seen, room))

    for room in set(ALLOWED) - TOP:
        reaches(room, ())


def test_nothing_imports_tests_benchmarks_tools_or_the_bare_kernels() -> None:
    wrong = [str(i) for _, i in every_import() if i.module.split(".")[0] in ("tests", "bench", "tools", "kernels")]
    assert not wrong, "\n".join(wrong)


def test_kernels_need_torch_triton_and_numpy_only() -> None:
    wrong = []
    for room, found in every_import():
        top = found.module.split(".")[0]
        if room == "kernels" and top not in {"transcoder", *KERNELS_MAY, *sys.stdlib_module_names}:
            wrong.append(str(found))
    assert not wrong, "\n".join(wrong)


PLUGINS = {"transcoder.interop.saelens_training"}
"""Classes of a peer's registry: they derive from the peer's own, so the module needs it to be imported. Nothing of ours imports
these."""


def test_heavy_packages_are_imported_where_they_are_used() -> None:
    scripts = {ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in PLUGINS}
    found = [i for _, i in every_import() if i.file not in scripts]
    wrong = [str(i) for i in found if i.top_level and i.module.split(".")[0] in HEAVY]
    wrong += [str(i) for i in found if i.module in PLUGINS]
    assert not wrong, "\n".join(wrong)


def run_blocked(blocked: set[str], code: str) -> None:
    """Run code in a fresh interpreter in which the named packages cannot be imported."""
    block = f"""
import importlib.abc, sys
class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(blocked)!r}:
            raise ImportError(name + " is blocked by the test")
sys.meta_path.insert(0, Block())
"""
    run = subprocess.run([sys.executable, "-c", block + code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr


def test_import_transcoder_needs_torch_triton_and_numpy_only() -> None:
    run_blocked(HEAVY | DAILY, "import transcoder, transcoder.kernels; transcoder.kernels.SparseCodes")


def test_what_gpu_check_imports_needs_yaml_besides() -> None:
    """bench.gpu_check runs where only torch, triton, numpy, pyyaml and pytest are installed."""
    code = "import transcoder.config, transcoder.kernels, transcoder.model, transcoder.training.optimizer"
    run_blocked(HEAVY | {"filelock", "rich", "safetensors", "tqdm"}, code)


def test_import_transcoder_loads_nothing_heavy() -> None:
    code = f"import transcoder, transcoder.kernels; assert not {HEAVY!r} & set(sys.modules), sys.modules.keys()"
    run_blocked(set(), code)


def test_public_names_load_without_the_heavy_packages() -> None:
    code = "import transcoder\nfor name in transcoder.__all__: getattr(transcoder, name)"
    run_blocked(HEAVY, code)


def test_the_command_line_answers_without_torch() -> None:
    code = "from transcoder.cli import main\ntry: main(['train', '--help'])\nexcept SystemExit as e: assert e.code == 0"
    run_blocked({"torch", "numpy", "triton"}, code)


@pytest.mark.parametrize("name", ["kernels", "transcoder"])
def test_every_folder_is_a_package(name: str) -> None:
    folders = {file.parent for file in (ROOT / name).rglob("*.py")}
    missing = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").is_file()]
    assert not missing, f"not packages, so a wheel would lack them: {missing}"
