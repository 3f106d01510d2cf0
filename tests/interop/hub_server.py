"""A hub in one process: the few endpoints of huggingface.co that creating, committing and fetching a model repository ask for.

Repositories live in memory. What is asked beside is answered 404 and kept in `unknown`, so a test can show it. Safetensors are
stored as huggingface.co does for a client without Xet: by the Git LFS batch protocol, handed out through a redirect to another
host. (Xet, which is what a client with hf_xet speaks there, is not imitated.)
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class HubServer:
    """`with HubServer() as hub:` then `hub.address`, `hub.files["org/name"]`."""

    def __init__(self) -> None:
        self.stored: dict[str, bytes] = {}
        """By sha256: what was uploaded by LFS; `verified` is what the client had checked."""
        self.verified: set[str] = set()
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.unknown: list[str] = []
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address, self.elsewhere = (
            f"http://{at}:{self._server.server_address[1]}" for at in ("127.0.0.1", "localhost")
        )

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def commit(self, repo: str) -> str:
        """A commit's id: of its content, as git has it."""
        digest = hashlib.sha1(repo.encode())
        for name, data in sorted(self.files[repo].items()):
            digest.update(name.encode() + data)
        return digest.hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server_of: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_POST(self) -> None:
        hub, body = self.server_of, self._body()
        hub.tokens.add(self.headers.get("Authorization"))
        path = self.path.split("?")[0]
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            hub.files.setdefault(name, {})
            hub.private[name] = bool(asked.get("private") or asked.get("visibility") == "private")
            return self._json({"url": f"{hub.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/\w+", path):
            files = [
                {"path": file["path"], "uploadMode": self._mode(file["path"]), "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": files})
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/\w+", path):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    hub.files[match[1]][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                elif line["key"] == "lfsFile":
                    hub.files[match[1]][line["value"]["path"]] = hub.stored[line["value"]["oid"]]
            commit = hub.commit(match[1])
            return self._json(
                {"success": True, "commitOid": commit, "commitUrl": f"{hub.address}/{match[1]}/commit/{commit}"}
            )
        if re.fullmatch(r"/[^/]+/[^/]+\.git/info/lfs/objects/batch", path):
            objects = [
                {
                    **one,
                    "actions": {
                        name: {"href": f"{hub.address}/lfs/{name}/{one['oid']}"} for name in ("upload", "verify")
                    },
                }
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/lfs/verify/(\w+)", path):
            if len(hub.stored.get(match[1], b"")) != json.loads(body)["size"]:
                return self._missing()
            hub.verified.add(match[1])
            return self._json({})
        return self._missing()

    def do_PUT(self) -> None:
        data, match = self._body(), re.fullmatch(r"/lfs/upload/(\w+)", self.path)
        if match is None or hashlib.sha256(data).hexdigest() != match[1]:
            return self._missing()
        self.server_of.stored[match[1]] = data
        return self._json({})

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        hub, path = self.server_of, self.path.split("?")[0]
        if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", path)) and match[1] in hub.files:
            if match[2] not in (None, "main", hub.commit(match[1])):
                return self._missing("RevisionNotFound")
            siblings = [{"rfilename": name} for name in hub.files[match[1]]]
            return self._json(
                {"id": match[1], "sha": hub.commit(match[1]), "siblings": siblings, "private": False, "tags": []}
            )
        if (match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path)) and match[1] in hub.files:
            files = [
                {"type": "file", "path": name, "size": len(data), "oid": _blob(data)}
                for name, data in hub.files[match[1]].items()
            ]
            return self._json(files)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            data = hub.files.get(match[1], {}).get(match[3])
            if data is None:
                return self._missing("EntryNotFound")
            headers = {"ETag": f'"{_blob(data)}"', "X-Repo-Commit": hub.commit(match[1])}
            if self._mode(match[3]) == "lfs":
                oid = hashlib.sha256(data).hexdigest()
                linked = {
                    "X-Linked-Etag": f'"{oid}"',
                    "X-Linked-Size": str(len(data)),
                    "Location": f"{hub.elsewhere}/cdn/{oid}",
                }
                return self._answer(302, b"", {**headers, **linked}, "text/plain")
            return self._answer(200, data, headers, "application/octet-stream")
        if (match := re.fullmatch(r"/cdn/(\w+)", path)) and match[1] in hub.stored:
            return self._answer(200, hub.stored[match[1]], {"ETag": f'"{match[1]}"'}, "application/octet-stream")
        return self._missing("RepoNotFound")

    @staticmethod
    def _mode(path: str) -> str:
        return "lfs" if path.endswith(".safetensors") else "regular"

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _missing(self, code: str = "") -> None:
        self.server_of.unknown.append(f"{self.command} {self.path}")
        self._answer(404, b'{"error": "not found"}', {"X-Error-Code": code} if code else {}, "application/json")

    def _json(self, value: object) -> None:
        self._answer(200, json.dumps(value).encode(), {}, "application/json")

    def _answer(self, status: int, data: bytes, headers: dict[str, str], kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
