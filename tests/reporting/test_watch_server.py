"""`transcoder watch`'s server: this machine only, read-only, nothing of the disk but the report, small whatever comes."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from transcoder.reporting import watch_server

Answer = tuple[int, dict[str, str], bytes]


@pytest.fixture
def watched(make_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, int]]:
    """A run in its middle, and the port of its live report."""
    monkeypatch.setattr(watch_server, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(watch_server, "SHARE", 0)
    run = make_run(interrupted=True, latents=5)
    with watch_server.serve(run) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield run, server.server_port
        server.shutdown()
        thread.join()


def ask(port: int, path: str, method: str = "GET", **headers: str) -> Answer:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders()
    response = connection.getresponse()
    found = response.status, {k.lower(): v for k, v in response.getheaders()}, response.read()
    connection.close()
    return found


def test_it_serves_the_page_the_data_and_the_packed_latents(watched: tuple[Path, int]) -> None:
    run, port = watched
    status, headers, page = ask(port, "/")
    assert status == 200
    assert headers["content-type"].startswith("text/html")
    assert b"connect-src 'self'" in page
    status, headers, data = ask(port, "/data.json")
    assert (status, headers["content-type"]) == (200, "application/json")
    core = json.loads(data)
    assert core["header"]["pill"][0] == "interrupted or still running"
    assert ask(port, "/data.json", If_None_Match=headers["etag"])[0] == 304
    assert ask(port, "/packed/latent-index")[0] == ask(port, "/packed/chunk-0")[0] == 200
    status, headers, body = ask(port, "/", "HEAD")
    assert (status, body) == (200, b"")
    assert int(headers["content-length"]) == len(page)
    assert not (run / "report.html").exists(), "watching writes nothing"


def test_what_is_new_is_shown(watched: tuple[Path, int]) -> None:
    run, port = watched
    before = ask(port, "/data.json")[1]["etag"]
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 555, "time": 99.0, "metrics/fvu": 0.1}) + "\n")
    status, headers, data = ask(port, "/data.json", If_None_Match=before)
    assert status == 200
    assert headers["etag"] != before
    assert "555 of 600 steps" in json.loads(data)["header"]["facts"]


def test_a_run_whose_process_is_gone_is_called_dead(watched: tuple[Path, int]) -> None:
    run, port = watched
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    (run / ".lock").write_text(json.dumps({"pid": process.pid, "host": socket.gethostname()}))
    words, look = json.loads(ask(port, "/data.json")[2])["header"]["pill"]
    assert look == "bad"
    assert words.startswith(f"dead: process {process.pid} is gone")


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        watch_server.serve(tmp_path / "none")


def test_a_port_that_cannot_be_had_is_named(make_run: Callable[..., Path]) -> None:
    run = make_run(steps=100, latents=1)
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} of 127.0.0.1 is in use: choose another --port"):
            watch_server.serve(run, port)
    for port in (-1, 65536):
        with pytest.raises(ValueError, match=r"from 0 .* to 65535"):
            watch_server.serve(run, port)


def test_a_resumed_run_shows_its_own_figures(watched: tuple[Path, int]) -> None:
    run, port = watched
    (run / "summary.json").write_text(
        '{"step": 270, "interrupted_by": "SIGTERM", "evaluation/fvu": 0.77, "tokens": 276480}'
    )
    assert json.loads(ask(port, "/data.json")[2])["header"]["pill"][0] == "stopped by SIGTERM"
    with open(run / "metrics.jsonl", "a") as file:
        file.write(
            json.dumps({"step": 300, "time": 99.0, "evaluation/fvu": 0.33, "details/n_training_samples": 307200}) + "\n"
        )
    core = json.loads(ask(port, "/data.json")[2])
    assert core["header"]["pill"][0] == "interrupted or still running"
    assert "307,200 tokens" in core["header"]["facts"]
    overview = core["sections"][0]["html"]
    assert "0.33" in overview
    assert ">0.77<" not in overview
    assert "0.77;" not in overview
    assert "ended at step 270" in overview


def test_it_listens_on_this_machine_only(watched: tuple[Path, int]) -> None:
    _, port = watched
    addresses = {i[4][0] for i in socket.getaddrinfo(socket.gethostname(), None, socket.AF_INET)} - {"127.0.0.1"}
    for address in addresses:
        if address.startswith("127."):
            continue
        with pytest.raises(OSError, match=r"refused|timed out|unreachable"):
            socket.create_connection((address, port), timeout=2).close()
    assert watch_server.HOST == "127.0.0.1"


def test_it_is_read_only(watched: tuple[Path, int]) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH", "OPTIONS"):
        status, headers, _ = ask(watched[1], "/", method)
        assert (status, headers["allow"]) == (405, "GET, HEAD"), method


ELSEWHERE = [
    *("/config.yaml", "/metrics.jsonl", "/index.html", "/data.json/", "/../../etc/passwd", "//etc/passwd"),
    *(
        "/%2e%2e/%2e%2e/etc/passwd",
        "/packed/../config.yaml",
        "/packed/chunk-%2e%2e",
        "/packed/chunk-99999",
        "/packed/plotly",
    ),
]


def test_nothing_else_is_given_away(watched: tuple[Path, int]) -> None:
    for path in ELSEWHERE:
        status, _, body = ask(watched[1], path)
        assert (status, body) == (404, b"not here\n"), path


def test_a_name_that_was_pointed_here_is_refused(watched: tuple[Path, int]) -> None:
    port = watched[1]
    for host in (f"evil.example:{port}", "evil.example", f"127.0.0.1:{port + 1}", ""):
        assert ask(port, "/data.json", Host=host)[0] == 403
    assert ask(port, "/data.json", Host=f"localhost:{port}")[0] == 200


def test_silent_connections_do_not_pile_up(watched: tuple[Path, int], monkeypatch: pytest.MonkeyPatch) -> None:
    port = watched[1]
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(watch_server.CONNECTIONS + 5)]
    deadline = time.monotonic() + 20
    while threading.active_count() < watch_server.CONNECTIONS and time.monotonic() < deadline:
        time.sleep(0.05)
    assert threading.active_count() <= watch_server.CONNECTIONS + 8
    for connection in silent:
        connection.close()
    assert ask(port, "/data.json")[0] == 200


def test_a_folder_that_goes_away_keeps_the_last_page(watched: tuple[Path, int]) -> None:
    run, port = watched
    before = ask(port, "/data.json")[2]
    os.rename(run, run.with_name("elsewhere"))
    assert ask(port, "/data.json")[::2] == (200, before)


def test_the_cards_are_packed_again_only_when_they_change(
    watched: tuple[Path, int], make_run: Callable[..., Path]
) -> None:
    run, port = watched

    def version() -> int:
        return int(json.loads(ask(port, "/data.json")[2])["version"])

    first = version()
    (run / "usage.json").write_text("{}")
    assert version() == first
    other = make_run(seed=5, latents=6)
    (run / "activation_samples" / "samples.parquet").write_bytes(
        (other / "activation_samples" / "samples.parquet").read_bytes()
    )
    assert version() == first + 1
