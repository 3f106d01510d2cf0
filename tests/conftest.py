"""What every test shares: devices, tolerances (derived, never loosened to pass), seeds."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from importlib.machinery import ModuleSpec
from importlib.util import module_from_spec
from pathlib import Path

import pytest
import torch

# `bench` is imported from the checkout without the checkout on sys.path, where it would offer its folders to everyone.
_bench = ModuleSpec("bench", None, is_package=True)
_bench.submodule_search_locations = [str(Path(__file__).resolve().parent.parent / "bench")]
sys.modules.setdefault("bench", module_from_spec(_bench))

Finished = subprocess.CompletedProcess[str]


class Beside:
    """Commands of tests marked `beside(*words, **environment)`: Python processes of their own that take minutes. They start
    when the first test does, one after another, on a core that the other tests leave idle."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(max_workers=1)
        self._jobs: dict[str, Future[Finished]] = {}
        self._lock = threading.Lock()
        self._running: subprocess.Popen[str] | None = None
        self._ended = False

    def start(self, item: pytest.Item) -> None:
        mark = item.get_closest_marker("beside")
        if mark is not None and item.nodeid not in self._jobs:
            self._jobs[item.nodeid] = self._pool.submit(self._run, list(mark.args), dict(mark.kwargs))

    def result(self, item: pytest.Item) -> Finished:
        self.start(item)
        return self._jobs[item.nodeid].result()

    def end(self) -> None:
        with self._lock:
            self._ended = True
            if self._running is not None:
                self._running.kill()
        self._pool.shutdown(cancel_futures=True)

    def _run(self, words: list[str], environment: dict[str, str]) -> Finished:
        variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        variables.pop("PYTEST_ADDOPTS", None)
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
        out, _ = self._running.communicate()
        return subprocess.CompletedProcess(words, self._running.returncode, out, "")


_beside = pytest.StashKey[Beside]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "beside(*words, **environment): its command runs beside the other tests")
    config.stash[_beside] = Beside()


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
