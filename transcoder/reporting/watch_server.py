"""`transcoder watch RUN`: the report of a run that is still going, served to this machine only."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import threading
import time
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from transcoder.files import local_path
from transcoder.reporting.format import clock
from transcoder.reporting.latent_cards import LatentCards
from transcoder.reporting.latent_table import FILE_NAME as LATENTS_FILE
from transcoder.reporting.metrics_table import FILE_NAME as METRICS_FILE
from transcoder.reporting.metrics_table import Metrics
from transcoder.reporting.page import chunk_elements, render, render_page
from transcoder.reporting.report import FILE_NAME as PAGE_FILE
from transcoder.reporting.report import payload
from transcoder.reporting.watch_state import look, process_of

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
CONNECTIONS = 16
"""Answered at a time; a page opens two or three."""
IDLE_SECONDS = 20
LEAST_SECONDS = 2.0
SHARE = 4
"""Between two readings at least so many times the processor time of one: a long run takes seconds, training needs the cores."""
OF_CARDS = ("activation_samples/samples.parquet", LATENTS_FILE, "anti_duplication_logs/*", "checkpoints/*")
"""What the latents' cards are made of: packing them again takes seconds."""
LOOKS = {"running": "good", "slow": "warn", "dead": "bad"}
"""States that a run's files alone do not tell, and how they look."""
TEXT = "text/plain; charset=utf-8"
HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}


class LiveReport:
    """The newest page of a run folder, kept in memory; requests between two readings get the same one.

    Reads files, writes none. Thread-safe.
    """

    def __init__(self, run_dir: Path) -> None:
        self._path = run_dir
        self._metrics = Metrics(run_dir / METRICS_FILE)
        self._lock = threading.Lock()
        self._seen: object = None
        self._cards_seen: object = None
        self._next = 0.0
        self._version = 0
        self._cards = LatentCards({})
        self.packed: dict[str, bytes] = {}
        """Packed latents by their addresses."""
        self.core: dict[str, Any] = {}
        self.data = b"{}"
        self.tag = ""
        self._render()

    def refresh(self) -> None:
        """Read the folder again if anything in it changed and the last reading was long enough ago."""
        if time.monotonic() < self._next or not self._lock.acquire(blocking=False):
            return
        try:
            if self._signature() != self._seen:
                self._render()
        except OSError as error:
            # A folder that is being moved, a network share that is away: what was read last stays.
            logger.warning("watch: %s cannot be read now: %s", self._path, error)
            self._next = time.monotonic() + LEAST_SECONDS
        finally:
            self._lock.release()

    def page(self) -> bytes:
        return render_page(self.core, {}, live=True).encode("utf-8", errors="replace")

    def _render(self) -> None:
        began = time.process_time()
        self._seen = self._signature()
        snapshot = look(self._path, self._metrics)
        cards_seen = self._stats(*OF_CARDS)
        changed = cards_seen != self._cards_seen
        version = self._version + changed
        core, cards = payload(snapshot.run, None if changed else self._cards, version, live=True)
        if snapshot.state in LOOKS:
            core["header"]["pill"] = [snapshot.words, LOOKS[snapshot.state]]
        if snapshot.state == "running" and snapshot.left:
            core["header"]["facts"].append(f"{clock(snapshot.left)} left")
        core["head"] = render("header.html", header=core["header"])
        if changed:
            self._cards_seen, self._cards, self._version = cards_seen, cards, version
            packed = chunk_elements(cards.packed_index, cards.chunks)
            self.packed = {f"/packed/{name}": text.encode() for name, text in packed.items()}
            # What the chunks were made of is not needed any more.
            cards.chunks.clear()
        self.core = core
        self.data = json.dumps(core, allow_nan=False).encode()
        self.tag = f'"{hashlib.sha256(self.data).hexdigest()[:32]}"'
        took = time.process_time() - began
        self._next = time.monotonic() + max(LEAST_SECONDS, SHARE * took)

    def _signature(self) -> object:
        """What a page is made of, and whether its process is there."""
        return process_of(self._path).state, self._stats("*", "activation_samples/*", *OF_CARDS)

    def _stats(self, *patterns: str) -> list[tuple[str, int, int]]:
        """Names, sizes and times of the files that are there, but for a page that was made of them."""
        found = []
        for file in (file for pattern in patterns for file in self._path.glob(pattern)):
            with contextlib.suppress(OSError):
                if file.name != PAGE_FILE:
                    found.append((str(file), file.stat().st_size, file.stat().st_mtime_ns))
        return sorted(found)


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    timeout = IDLE_SECONDS
    server_version, sys_version = "transcoder", ""

    def do_GET(self) -> None:
        status, kind, content, headers = self._answer()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **HEADERS, **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        # A client that closes its connection in the middle of an answer is no fault of the server.
        if self.command != "HEAD":
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                self.wfile.write(content)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = do_OPTIONS = do_GET

    def _answer(self) -> tuple[HTTPStatus, str, bytes, dict[str, str]]:
        """Status, content type, content and further headers."""
        if self.command not in ("GET", "HEAD"):
            return HTTPStatus.METHOD_NOT_ALLOWED, TEXT, b"read-only: GET and HEAD\n", {"Allow": "GET, HEAD"}
        # A page elsewhere whose name was pointed at this machine would come with its own name.
        if self.headers.get("Host", "") not in self.server.names:
            return HTTPStatus.FORBIDDEN, TEXT, b"this report is for 127.0.0.1 only\n", {}
        path, report = self.path.partition("?")[0], self.server.report
        report.refresh()
        if path == "/":
            return HTTPStatus.OK, "text/html; charset=utf-8", report.page(), {}
        if path == "/data.json":
            known = self.headers.get("If-None-Match") == report.tag
            status = HTTPStatus.NOT_MODIFIED if known else HTTPStatus.OK
            return status, "application/json", b"" if known else report.data, {"ETag": report.tag}
        if (found := report.packed.get(path)) is not None:
            return HTTPStatus.OK, "text/plain", found, {}
        return HTTPStatus.NOT_FOUND, TEXT, b"not here\n", {}

    def log_message(self, format: str, *arguments: Any) -> None:
        logger.debug("watch: " + format, *arguments)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    allow_reuse_address = True

    def __init__(self, report: LiveReport, port: int) -> None:
        self.report = report
        self._room = threading.BoundedSemaphore(CONNECTIONS)
        super().__init__((HOST, port), _Handler)
        self.names = {f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost")}

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._room.acquire(timeout=1):
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        logger.debug("watch: a request failed", exc_info=True)


def serve(run_dir: str | Path, port: int = 0) -> _Server:
    """A server of the run's live report on 127.0.0.1, not yet answering: call `serve_forever`, and `server_close` at the end.

    Read-only: GET and HEAD of four kinds of address, none of which names a file.

    Args:
        port: 0 takes a free one.

    Raises:
        FileNotFoundError: `run_dir` is no folder.
        ValueError: no such port.
        OSError: the port is taken, or not this user's to take.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"watch: expected a port from 0 (a free one) to 65535, got {port}")
    try:
        return _Server(LiveReport(local_path(run_dir)), port)
    except OSError as error:
        if error.errno not in (errno.EADDRINUSE, errno.EACCES):
            raise
        why = "is in use" if error.errno == errno.EADDRINUSE else "needs rights that this user does not have"
        raise OSError(
            error.errno, f"watch: port {port} of {HOST} {why}: choose another --port, or 0 for a free one"
        ) from error


def watch(run_dir: str | Path, port: int = 0) -> None:
    """Serve until Ctrl-C."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(10)
    with serve(run_dir, port) as server:
        tunnel = f"ssh -L {server.server_port}:{HOST}:{server.server_port} HOST"
        print(f"{server.address}  (this machine only; from another one: {tunnel})")
        print("Ctrl-C ends it.", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
