"""What every test shares: devices, tolerances (derived, never loosened to pass), seeds."""

from __future__ import annotations

import hashlib
import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# `bench` and `tools` are imported from the checkout without the checkout on sys.path, which would offer all its folders.
for _name in ("bench", "tools"):
    _spec = ModuleSpec(_name, None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).resolve().parent.parent / _name)]
    sys.modules.setdefault(_name, module_from_spec(_spec))

FOLDER = "{folder}"
LIMIT = 900.0
"""Seconds after which a command is killed: by far the longest takes a tenth of that on an idle core."""
MOST_WORKERS = 8
_finished = pytest.StashKey[dict[str, subprocess.CompletedProcess[str]]]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "command(*words, **environment): what the fixture `finished_command` runs")
    config.stash[_finished] = {}
    # A shell's background job ignores SIGINT, and so would every process that a test starts and interrupts.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    # One core a worker: threads of two workers that wait for each other take both.
    torch.set_num_threads(1)


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """The whole suite, which is what `pytest` alone asks for, runs on every core; named files run in one process."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS
    if "PYTEST_XDIST_WORKER" in os.environ:  # A worker has the same options, and no workers of its own.
        return
    if whole and getattr(config.option, "numprocesses", 0) is None and not config.option.usepdb:
        config.option.numprocesses = min(MOST_WORKERS, os.cpu_count() or 1)
        config.option.dist = "loadscope"
        # In the order of collection: xdist's own begins with the files of most tests, which are not the longest.
        config.option.loadscopereorder = False


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests of one command come first, since they take longest."""
    items.sort(key=lambda item: item.get_closest_marker("command") is None)
    for item in items:
        if item.get_closest_marker("command") is not None:
            item.add_marker(pytest.mark.timeout(LIMIT + 60), append=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests go to one worker: each would make the file's fixtures again. So do those that share the process of
    tests/kernels/conftest.py. xdist's own groups are not seen by pytest 9.2."""
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, test = nodeid.partition("::")
            return test if test == "test_in_the_interpreter" else file

    return ByFile(config, log)


def _key(mark: pytest.Mark) -> str:
    return hashlib.sha256(repr((mark.args, sorted(mark.kwargs.items()))).encode()).hexdigest()[:12]


@pytest.fixture
def finished_command(request: pytest.FixtureRequest, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """The ended Python process of the test's mark `command`; its stdout holds its stderr. Tests with the same words share
    one process. A word `{folder}` is an empty folder, which the process names in its `args`."""
    mark = request.node.get_closest_marker("command")
    assert mark is not None, "the fixture `finished_command` needs the mark `command`"
    known = request.config.stash[_finished]
    if _key(mark) not in known:
        words = [str(tmp_path) if word == FOLDER else word for word in mark.args]
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **mark.kwargs}
        for name in ("PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER", "PYTEST_XDIST_WORKER_COUNT"):
            variables.pop(name, None)
        with subprocess.Popen(
            [sys.executable, *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=variables,
            cwd=Path(__file__).resolve().parent.parent,
        ) as process:
            try:
                out, _ = process.communicate(timeout=LIMIT)
            except BaseException as error:
                process.kill()
                if not isinstance(error, subprocess.TimeoutExpired):
                    raise
                out = process.communicate()[0] + f"\nkilled after {LIMIT:.0f} s"
        known[_key(mark)] = subprocess.CompletedProcess(words, process.returncode, out, "")
    return known[_key(mark)]


@pytest.fixture(scope="session")
def _loaded_models() -> dict[str, Any]:
    return {}


@pytest.fixture
def shared_models(_loaded_models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A language model that several streams of the tests read is loaded once: a pass leaves nothing behind in it."""
    from transcoder.activations import model_activations

    load = model_activations.HookedModel

    def loaded_once(*what: Any) -> Any:
        return _loaded_models.get(repr(what)) or _loaded_models.setdefault(repr(what), load(*what))

    monkeypatch.setattr(model_activations, "HookedModel", loaded_once)


DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def close() -> Callable[..., None]:
    """close(actual, expected, length, scale=1): equal up to the rounding of sums of `length` terms of size `scale`.

    A sum of n rounded products is off by about sqrt(n) ulps of its largest partial sum (worst case n); 8 standard
    deviations of that random walk separate rounding from a wrong formula.
    """

    def check(actual: torch.Tensor, expected: torch.Tensor, length: int, scale: float = 1.0) -> None:
        eps = torch.finfo(actual.dtype).eps
        bound = 8 * eps * math.sqrt(max(1, length))
        torch.testing.assert_close(
            actual, expected.to(actual.dtype), atol=bound * scale * math.sqrt(max(1, length)), rtol=bound
        )

    return check
