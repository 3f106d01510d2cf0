"""What every test shares: devices, tolerances (derived, never loosened to pass), seeds."""

from __future__ import annotations

import math
import os
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest
import torch

# `bench` and `tools` are imported from the checkout without the checkout on sys.path, which would offer all its folders.
for _name in ("bench", "tools"):
    _spec = ModuleSpec(_name, None, is_package=True)
    _spec.submodule_search_locations = [str(Path(__file__).resolve().parent.parent / _name)]
    sys.modules.setdefault(_name, module_from_spec(_spec))

Finished = subprocess.CompletedProcess[str]


FOLDER = "{folder}"
LIMIT = 900.0
"""Seconds after which a command is killed: by far the longest takes a tenth of that on an idle core."""
WAIT = 3 * LIMIT
"""Seconds that a test may wait for its command's turn and end."""


class Beside:
    """Commands of tests marked `beside(*words, **environment)`: Python processes of their own that take minutes. They start
    when the first test does, one after another, on a core that the other tests leave idle; their tests come last. Tests of
    one and the same command share its process. A word `{folder}` becomes an empty folder of the command's own, which the
    finished process names in its `args`."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._jobs: dict[tuple[object, ...], Future[Finished]] = {}
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._ended = False
        self._folders: list[str] = []

    def start(self, item: pytest.Item) -> Future[Finished] | None:
        mark = item.get_closest_marker("beside")
        if mark is None:
            return None
        command = (mark.args, tuple(sorted(mark.kwargs.items())))
        if command not in self._jobs:
            self._jobs[command] = self._pool.submit(self._run, list(mark.args), dict(mark.kwargs))
        return self._jobs[command]

    def result(self, item: pytest.Item) -> Finished:
        job = self.start(item)
        assert job is not None, "the fixture `beside` needs the mark of this name"
        return job.result()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            if self._running is not None:
                self._running.kill()
        self._pool.shutdown(cancel_futures=True)
        for folder in self._folders:
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, words: list[str], environment: dict[str, str]) -> Finished:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        variables.pop("PYTEST_ADDOPTS", None)
        if FOLDER in words:
            self._folders.append(tempfile.mkdtemp(prefix="transcoder-beside-"))
            words = [self._folders[-1] if word == FOLDER else word for word in words]
        with self._lock:
            if self._ended:
                raise RuntimeError("the session has ended")
            self._running = subprocess.Popen(
                [sys.executable, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env=variables,
                cwd=Path(__file__).resolve().parent.parent,
            )
        try:
            out, _ = self._running.communicate(timeout=LIMIT)
        except subprocess.TimeoutExpired:
            self._running.kill()
            out, _ = self._running.communicate()
            out += f"\nkilled after {LIMIT:.0f} s"
        return subprocess.CompletedProcess(words, self._running.returncode, out, "")


_beside = pytest.StashKey[Beside]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "beside(*words, **environment): its command runs beside the other tests")
    config.stash[_beside] = Beside()
    # Two cores: one for the tests, one for what runs beside them. Threads that wait for each other there take both.
    torch.set_num_threads(1)


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Who waits for a command comes last: until then nothing waits."""
    items.sort(key=lambda item: item.get_closest_marker("beside") is not None)
    for item in items:
        if item.get_closest_marker("beside") is not None:
            item.add_marker(pytest.mark.timeout(WAIT), append=False)


def pytest_collection_finish(session: pytest.Session) -> None:
    # Workers of xdist collect everything each, and use every core anyhow: there a command starts with its test.
    if "PYTEST_XDIST_WORKER" not in os.environ and not session.config.option.collectonly:
        for item in session.items:
            session.config.stash[_beside].start(item)


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_beside].end()


@pytest.fixture
def beside(request: pytest.FixtureRequest) -> Finished:
    """The finished process of the test's `beside` mark; stderr is in its stdout."""
    return request.config.stash[_beside].result(request.node)


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
