"""Tests marked `interpreted` launch Triton kernels: on a GPU where there is one, else in Triton's interpreter, which must be
asked for before triton is first imported. So in an ordinary run without a GPU they are left out here and these files
run again in a process of its own (`interpreted_again`)."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pytest
import torch

from transcoder.kernels import active_backend, backend, extension
from transcoder.kernels.triton_support import interpreted

INTERPRETED = interpreted()


def _patch_the_language_once() -> None:
    """Triton's interpreter patches the whole language at a launch, and again at each call of a device function: a third of the
    time of these tests. The second is needed once, for functions of Triton's own that see `tl.core`, and is never undone."""
    import triton.language as tl
    from triton.runtime import interpreter

    done: list[bool] = []

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not done and tl.core in (v for v in self.fn.__globals__.values() if isinstance(v, ModuleType)):
            interpreter._patch_lang(self.fn)
            done.append(True)
        return self.rewrite()(*args, **kwargs)

    interpreter.InterpretedFunction.__call__ = call  # type: ignore[method-assign]


if INTERPRETED:
    _patch_the_language_once()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: launches Triton kernels (a GPU, or TRITON_INTERPRET=1)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    again = [item for item in items if "interpreted_again" in getattr(item, "fixturenames", ())]
    files = sorted({str(item.path) for item in again})
    options = ("-m", "pytest", "-q", "-m", "interpreted and not slow", "-p", "no:cacheprovider", "-p", "no:xdist")
    for item in again:
        # One process for all files, since each imports torch and triton again.
        item.add_marker(pytest.mark.command(*options, *files, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""))
    if INTERPRETED or torch.cuda.is_available():
        return
    left_out = [item for item in items if item.get_closest_marker("interpreted")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if not item.get_closest_marker("interpreted")]


@pytest.fixture
def triton_device() -> torch.device:
    """Where Triton kernels run here."""
    return torch.device("cpu" if INTERPRETED else "cuda")


@pytest.fixture
def interpreted_again(finished_command: subprocess.CompletedProcess[str], request: pytest.FixtureRequest) -> None:
    """Every `interpreted` test of the file passed in Triton's interpreter."""
    broken = [line for line in finished_command.stdout.splitlines() if line.startswith(("FAILED ", "ERROR "))]
    others = all(request.path.name not in line for line in broken)
    # Another file's failure is told there. A process that said of nothing that it failed must have ended well.
    assert finished_command.returncode == 0 or (broken and others), finished_command.stdout[-8000:]


@pytest.fixture(scope="module", params=["torch", "cpp"])
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that `auto` chooses on the CPU. Without a compiler `cpp` is torch again: the fallback is then tested."""
    order = ("torch",) if request.param == "torch" else ("cpp", "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend.FASTEST_FIRST, "cpu", order)
        expected = "cpp" if request.param == "cpp" and extension.usable() else "torch"
        assert active_backend("cpu", "encode") == active_backend("cpu", "decode") == expected
        yield expected


SHARED_LIMIT = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10, "gfx942": 64 << 10}
"""Bytes of shared memory that one program may take on each chip."""


class Compiled(NamedTuple):
    registers: int
    """A lane."""
    spilled: int
    """Bytes of stack a lane, and on AMD spilled vector registers."""
    shared: int
    code: str
    """PTX or AMD assembly."""
    machine: Callable[[], str]
    """SASS (NVIDIA), disassembled when asked for."""
    shared_limit: int


def _nvidia_tool(tool: str, *words: str) -> str:
    from triton.backends import nvidia

    program = Path(nvidia.__file__).parent / "bin" / tool
    return subprocess.run([str(program), *words], capture_output=True, text=True, check=True).stdout


@pytest.fixture
def compile_kernel(tmp_path: Path) -> Callable[..., Compiled]:
    """compile_kernel(kernel, types, constants, target, num_warps=, ...): ahead of time, no GPU needed.

    `types` gives every argument that is not in `constants` its Triton type ("*fp32", "i64", ...); pointers, and integers
    written "i32:16", are promised to be multiples of 16, as PyTorch's allocations and the reference shapes are.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def run(kernel, types: dict[str, str], constants: dict, target: str, **options: int) -> Compiled:  # type: ignore[no-untyped-def]
        names = kernel.arg_names
        places = {name: n for n, name in enumerate(names)}
        signature = {n: "constexpr" if n in constants else types[n].split(":")[0] for n in names}
        sixteen = [n for n in names if n not in constants and (types[n].startswith("*") or types[n].endswith(":16"))]
        attributes = {(places[n],): [["tt.divisibility", 16]] for n in sixteen}
        source = ASTSource(
            kernel, signature, {(places[n],): v for n, v in constants.items() if n in places}, attributes
        )
        nvidia = target.startswith("sm_")
        chip = GPUTarget("cuda", int(target[3:]), 32) if nvidia else GPUTarget("hip", target, 64)
        made = triton.compile(source, target=chip, options=options)
        if not nvidia:
            text = made.asm["amdgcn"]
            wanted = r"\.(vgpr_count|vgpr_spill_count|private_segment_fixed_size):\s*(\d+)"
            found = {k: int(v) for k, v in re.findall(wanted, text)}
            # Spilled scalar registers go to lanes of vector registers, not to memory.
            return Compiled(
                found["vgpr_count"],
                found["vgpr_spill_count"] + found["private_segment_fixed_size"],
                made.metadata.shared,
                text,
                lambda: text,
                SHARED_LIMIT[target],
            )
        cubin = tmp_path / "kernel.cubin"
        cubin.write_bytes(made.asm["cubin"])
        used = dict(
            re.findall(r"(REG|STACK|LOCAL):(\d+)", _nvidia_tool("cuobjdump", "--dump-resource-usage", str(cubin)))
        )
        return Compiled(
            int(used["REG"]),
            int(used["STACK"]) + int(used["LOCAL"]),
            made.metadata.shared,
            made.asm["ptx"],
            lambda: _nvidia_tool("nvdisasm", str(cubin)),
            SHARED_LIMIT[target],
        )

    return run


@pytest.fixture(
    params=[chip if chip == "sm_90" else pytest.param(chip, marks=pytest.mark.slow) for chip in SHARED_LIMIT]
)
def target(request: pytest.FixtureRequest) -> str:
    """Each chip that kernels are compiled for. Every day the H100's only: a test of all chips takes minutes."""
    return str(request.param)
