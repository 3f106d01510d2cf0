"""Tests marked `interpreted` launch Triton kernels: on a GPU where there is one, else in Triton's interpreter, which must be
asked for before triton is first imported. So in an ordinary run without a GPU they are left out here and each such file
runs itself again in a process of its own (`interpreted_again`)."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator

import pytest
import torch

from transcoder.kernels import active_backend, backend, extension

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpreted: launches Triton kernels (a GPU, or TRITON_INTERPRET=1)")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if "interpreted_again" in getattr(item, "fixturenames", ()):
            words = (
                "-m",
                "pytest",
                "-q",
                "-x",
                "-m",
                "interpreted",
                "-p",
                "no:cacheprovider",
                "-p",
                "no:xdist",
                str(item.path),
            )
            item.add_marker(pytest.mark.beside(*words, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES=""))
            item.add_marker(pytest.mark.timeout(900))  # it may have to wait for its turn
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
def interpreted_again(beside: subprocess.CompletedProcess[str]) -> None:
    """Every `interpreted` test of the file passed in Triton's interpreter."""
    assert beside.returncode == 0, beside.stdout[-8000:]


@pytest.fixture(scope="module", params=["torch", "cpp"])
def cpu_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The backend that `auto` chooses on the CPU. Without a compiler `cpp` is torch again: the fallback is then tested."""
    order = ("torch",) if request.param == "torch" else ("cpp", "torch")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backend.FASTEST_FIRST, "cpu", order)
        expected = "cpp" if request.param == "cpp" and extension.usable() else "torch"
        assert active_backend("cpu", "encode") == active_backend("cpu", "decode") == expected
        yield expected
