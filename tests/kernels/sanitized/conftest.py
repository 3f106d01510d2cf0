"""Triton kernels under ttsem: it runs what Triton's frontend compiles on the CPU, and names accesses out of bounds and races
between programs at the kernel's line. It needs an environment of its own (`.ci/run` makes one); without it these tests are left
out. A process of these tests is no other's: ttsem stands in for the GPU from before the backends are imported."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

HAVE = importlib.util.find_spec("ttsem") is not None
if not HAVE:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def session() -> Iterator[Any]:
    """ttsem's session: it runs every launch inside, as for sm_90. Uninitialised memory is NaN, or a huge integer, in the
    forward pass (ttsem) and the backward pass (PyTorch's own switch)."""
    from ttsem import sanitize

    plain = sanitize._source_of
    # ttsem 0.1.0 does not find the line of code from an inlined function: it is the first of the places of a call.
    inlined = re.compile(r'callsite\((?:callsite\(|"[^"]*"\()*("[^"]+":\d+:\d+)')

    def source_of(op: str, *rest: str) -> Any:
        place = inlined.search(op)
        return plain(f"loc({place[1]})" if place else op, *rest)

    sanitize._source_of = source_of
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings(), sanitize.session(cc=90) as state:
        warnings.simplefilter("ignore")
        from transcoder.kernels import triton_support

        # In autograd's own threads tensors say that they are on the CPU, which is where ttsem has them.
        triton_support.check_device = lambda op, device: None
        from transcoder.kernels.correlation import op

        op.DeferredSize = Arrived  # type: ignore[misc,assignment]
        # Imported now: a module that is imported while a fault is planted would keep it.
        for family in ("encode", "decode", "correlation", "adam"):
            importlib.import_module(f"transcoder.kernels.{family}.triton_backend")
        yield state
    torch.use_deterministic_algorithms(False)


class Arrived:
    """`DeferredSize` without a GPU's pinned memory."""

    def __init__(self, size: torch.Tensor) -> None:
        self.size = int(size)

    def arrived(self) -> bool:
        return True

    def read(self) -> int:
        return self.size


@pytest.fixture
def watching() -> Callable[[set[str]], Any]:
    """warp_races.watching."""
    spec = importlib.util.spec_from_file_location("warp_races", Path(__file__).with_name("warp_races.py"))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    run: Callable[[set[str]], Any] = module.watching
    return run


@pytest.fixture
def plant(tmp_path: Path) -> Iterator[Callable[[str, str, str], int]]:
    """plant(module, right, wrong): the module with one piece of its text replaced takes its place in all modules that use it.
    Returns the number of the first line that differs."""

    from transcoder.kernels.backend import backend_module

    monkeypatch = pytest.MonkeyPatch()

    def run(name: str, right: str, wrong: str) -> int:
        module = importlib.import_module(f"transcoder.kernels.{name}")
        text = Path(str(module.__file__)).read_text(encoding="utf-8")
        assert text.count(right) == 1, f"{name}: expected once, found {text.count(right)} times: {right}"
        file = tmp_path / f"{name.replace('.', '_')}_planted.py"
        file.write_text(text.replace(right, wrong), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(file.stem, file)
        assert spec is not None
        assert spec.loader is not None
        faulty = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, file.stem, faulty)
        spec.loader.exec_module(faulty)
        monkeypatch.setitem(sys.modules, module.__name__, faulty)
        backend_module.cache_clear()
        for user in [m for n, m in sys.modules.items() if n.startswith("transcoder.kernels.") and m is not module]:
            for key, value in list(vars(user).items()):
                if value is module:
                    monkeypatch.setattr(user, key, faulty)
                elif not isinstance(value, ModuleType) and getattr(value, "__module__", "") == module.__name__:
                    monkeypatch.setattr(user, key, getattr(faulty, key, value))
        lines = zip(text.splitlines(), file.read_text(encoding="utf-8").splitlines(), strict=False)
        return next(n for n, (a, b) in enumerate(lines, 1) if a != b)

    yield run
    monkeypatch.undo()
    backend_module.cache_clear()
