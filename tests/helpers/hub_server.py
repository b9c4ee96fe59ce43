"""A small server that speaks as much of the Hugging Face hub's protocol as a push and a fetch need.

Repositories are kept in memory: {name: {revision: {path: bytes}}}. Files of 1 kB and more go the way of large
files (LFS): asked for in a batch, sent to an address of their own, then named in the commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

LARGE = 1000
TOKEN = "hf_ofthetests"
MAIN = "main"


class HubServer:
    """What is there, and what was asked for."""

    def __init__(self) -> None:
        self.repositories: dict[str, dict[str, dict[str, bytes]]] = {}
        self.private: set[str] = set()
        self.large: dict[str, bytes] = {}
        self.fetched: list[str] = []

    def commit(self, name: str, revision: str) -> str:
        """A commit's name: that of its content."""
        content = sorted(
            (path, hashlib.sha1(data).hexdigest()) for path, data in self.files(name, revision).items()
        )
        return hashlib.sha1(json.dumps(content).encode()).hexdigest()

    def files(self, name: str, revision: str = MAIN) -> dict[str, bytes]:
        revisions = self.repositories[name]
        return revisions.get(revision) or next(
            files for other, files in revisions.items() if self.commit(name, other) == revision
        )


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, status: int, value: Any = None, headers: dict[str, str] | None = None) -> None:
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in (headers or {}).items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self, status: int, message: str, code: str = "") -> None:
        self._answer(status, {"error": message}, {"X-Error-Message": message, "X-Error-Code": code})

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _known(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def _readable(self, name: str) -> bool:
        if name in self.hub.repositories and (name not in self.hub.private or self._known()):
            return True
        self._refuse(404, "Repository not found", "RepoNotFound")
        return False

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            self._information(found[2], found[3] or MAIN)
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/([^/]+)/?", path):
            self._tree(found[2], found[3])
        elif found := re.fullmatch(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        else:
            self._refuse(404, f"nothing at {path}")

    def _information(self, name: str, revision: str) -> None:
        if not self._readable(name):
            return
        try:
            files = self.hub.files(name, revision)
        except StopIteration:
            self._refuse(404, f"Invalid rev id: {revision}", "RevisionNotFound")
            return
        siblings = [{"rfilename": file} for file in files]
        self._answer(200, {"id": name, "sha": self.hub.commit(name, revision), "siblings": siblings})

    def _tree(self, name: str, revision: str) -> None:
        if self._readable(name):
            entries = [_entry(path, data) for path, data in self.hub.files(name, revision).items()]
            self._answer(200, entries)

    def _file(self, name: str, revision: str, path: str) -> None:
        if not self._readable(name):
            return
        data = self.hub.files(name, revision).get(path)
        if data is None:
            self._refuse(404, "Entry not found", "EntryNotFound")
            return
        if self.command == "GET":
            self.hub.fetched.append(path)
        etag = hashlib.sha1(data).hexdigest()
        part = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if part:
            data = data[int(part[1]) : int(part[2]) + 1]
        self._answer(
            206 if part else 200,
            data,
            {"ETag": f'"{etag}"', "X-Repo-Commit": self.hub.commit(name, revision)},
        )

    def do_PUT(self) -> None:
        self.hub.large[self.path.rpartition("/")[2]] = self._body()
        self._answer(200, {})

    def do_POST(self) -> None:
        body = self._body()
        if not self._known():
            self._refuse(401, "Invalid username or password.")
        elif self.path == "/api/validate-yaml":
            self._answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/repos/create":
            self._create(json.loads(body))
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/branch/(.+)", self.path):
            here = self.hub.repositories[found[1]]
            here.setdefault(unquote(found[2]), dict(here[MAIN]))
            self._answer(200, {})
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/paths-info/(.+)", self.path):
            asked = parse_qs(body.decode())["paths"] if b"paths=" in body else json.loads(body)["paths"]
            files = self.hub.files(found[1], found[2])
            self._answer(200, [_entry(path, files[path]) for path in asked if path in files])
        elif "/preupload/" in self.path:
            modes = [
                {
                    "path": file["path"],
                    "shouldIgnore": False,
                    "uploadMode": _mode(file["size"]),
                }
                for file in json.loads(body)["files"]
            ]
            self._answer(200, {"files": modes})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                each | {"actions": {"upload": {"href": f"http://{self.headers['Host']}/large/{each['oid']}"}}}
                for each in json.loads(body)["objects"]
            ]
            self._answer(200, {"transfer": "basic", "objects": objects})
        elif found := re.fullmatch(r"/api/(?:models|datasets)/([^/]+/[^/]+)/commit/(.+)", self.path):
            self._commit(found[1], unquote(found[2]), body)
        else:
            self._refuse(404, f"nothing at {self.path}")

    def _create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization'] or 'somebody'}/{wanted['name']}"
        page = {"url": f"http://{self.headers['Host']}/{name}", "name": name}
        if name.startswith("others/"):
            self._refuse(403, "You don't have the rights to create a model under the namespace others")
        elif name in self.hub.repositories:
            self._answer(409, page)
        else:
            self.hub.repositories[name] = {MAIN: {}}
            if wanted.get("private") or wanted.get("visibility") == "private":
                self.hub.private.add(name)
            self._answer(200, page)

    def _commit(self, name: str, revision: str, body: bytes) -> None:
        files = self.hub.repositories[name][revision]
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif entry["key"] == "deletedFile":
                del files[value["path"]]
        oid = self.hub.commit(name, revision)
        page = f"http://{self.headers['Host']}/{name}/commit/{oid}"
        self._answer(200, {"success": True, "commitOid": oid, "commitUrl": page})


def _mode(size: int) -> str:
    return "lfs" if size >= LARGE else "regular"


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}


@contextmanager
def hub_server(monkeypatch: pytest.MonkeyPatch, cache: Any) -> Iterator[HubServer]:
    """Inside, huggingface_hub speaks with this server, and keeps what it fetches in `cache`."""
    hub = HubServer()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
