"""A W&B server that answers, and answers nonsense."""

from __future__ import annotations

import contextlib
import random
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.reporting.test_wandb import ONLINE, _own_wandb, use, warnings  # noqa: F401 (the fixture keeps to the test's folder)
from transcoder.reporting import follower

ANSWERS = {
    "bytes": b"\x00\xff" + random.Random(0).randbytes(4096),
    "no JSON": b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 8\r\n\r\n<html>\xff{",
    "other JSON": b'HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 16\r\n\r\n{"data": [1, {}]',
    "cut off": b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n{",
}


@contextlib.contextmanager
def server(answer: bytes) -> Iterator[tuple[int, list[int]]]:
    """Gives every request this answer. (port, a list with an entry for each answer given)"""
    given: list[int] = []
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(64)

        def serve() -> None:
            while True:
                try:
                    caller, _ = listener.accept()
                except OSError:
                    return
                with caller, contextlib.suppress(OSError):
                    caller.settimeout(1)
                    caller.recv(65536)
                    given.append(1)
                    caller.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield listener.getsockname()[1], given
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


@pytest.mark.parametrize("kind", ANSWERS)
def test_garbage_neither_stops_nor_slows_a_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(follower, "CLOSE_SECONDS", 12.0)
    with server(ANSWERS[kind]) as (port, given):
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{port}")
        use(ONLINE, tmp_path / "run")
        assert given, "W&B did ask"
    assert len(warnings(caplog)) >= 1
