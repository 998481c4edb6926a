"""A server with the routes of the Hugging Face hub, and one with those of its CDN, over a folder of repositories.

Large files are redirected to the CDN by URLs that are signed for some time; the CDN refuses the hub's token, as S3
does.
"""

import hashlib
import json
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_secret"
LARGE = (".safetensors", ".gguf", ".bin", "tokenizer.json")

Fault = Callable[["_Handler"], bool]
"""Does something else than the route would; returns whether it has answered."""


def status(code: int, **headers: str) -> Fault:
    def fault(handler: "_Handler") -> bool:
        handler.answer(code, b"", {name.replace("_", "-"): value for name, value in headers.items()})
        return True

    return fault


def login_page(handler: "_Handler") -> bool:
    """Answer as a network does that wants a login first."""
    handler.answer(200, b"<html>Welcome to our hotel</html>", {"Content-Type": "text/html; charset=utf-8"})
    return True


def break_after(count: int) -> Fault:
    """Close the connection after so many bytes of the content."""

    def fault(handler: "_Handler") -> bool:
        handler.bytes_before_break = count
        return False

    return fault


def without_ranges(handler: "_Handler") -> bool:
    del handler.headers["Range"]
    return False


@dataclass
class HubServer:
    """Repositories `owner/name` below `folder`, all at one commit. Faults are taken by one request each, in order."""

    folder: Path
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    hub_faults: deque[Fault] = field(default_factory=deque)
    cdn_faults: deque[Fault] = field(default_factory=deque)
    signed_for: int = 1_000_000
    """How many requests a signed URL is good for."""
    requests: list[str] = field(default_factory=list)
    sent: Counter[str] = field(default_factory=Counter)
    """Bytes of content by file name."""
    url: str = ""
    cdn_url: str = ""
    signatures: Counter[str] = field(default_factory=Counter)
    connections: int = 0

    def content(self, prefix: str = "") -> list[str]:
        """Return the requests for content, of the files that begin with a prefix."""
        return [line for line in self.requests if line.startswith(f"GET {prefix}") and "bytes=" in line]


@contextmanager
def serve_hub(folder: Path) -> Iterator[HubServer]:
    hub = HubServer(folder)
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, route)) for route in (_Handler.hub, _Handler.cdn)]
    hub.url, hub.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in servers)
    threads = [Thread(target=server.serve_forever, args=(0.01,), daemon=True) for server in servers]
    for thread in threads:
        thread.start()
    try:
        yield hub
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            server.server_close()
            thread.join()


def _handler(hub: HubServer, route: Callable[[Any], None]) -> type["_Handler"]:
    return type("Handler", (_Handler,), {"server_state": hub, "do_GET": route, "do_HEAD": route})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_state: HubServer
    bytes_before_break: int | None = None

    def setup(self) -> None:
        self.server_state.connections += 1
        super().setup()

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(code)
        for name, value in {"Content-Length": str(len(body)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def fail(self, code: int, error: str, message: str) -> None:
        self.answer(code, json.dumps({"error": message}).encode(), {"X-Error-Code": error, "X-Error-Message": message})

    def hub(self) -> None:
        state, url = self.server_state, urlsplit(self.path)
        state.requests.append(f"{self.command} {unquote(url.path)}")
        if state.hub_faults and state.hub_faults.popleft()(self):
            return
        path = unquote(url.path)
        for pattern, route in (
            (r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
            (r"/api/resolve-cache/models/([^/]+/[^/]+)/([^/]+)/(.+)", self._small),
        ):
            if match := re.fullmatch(pattern, path):
                repository = match[1]
                if not (state.folder / repository).is_dir() or (
                    repository in state.private and self.headers["Authorization"] != f"Bearer {TOKEN}"
                ):
                    self.fail(401, "RepoNotFound", "Invalid username or password.")
                elif match[2] not in {None, "main", "v1", COMMIT}:
                    self.fail(404, "RevisionNotFound", f"Invalid rev id: {match[2]}")
                else:
                    route(*match.groups())
                return
        self.fail(404, "NotFound", "no such route")

    def _files(self, repository: str) -> dict[str, Path]:
        root = self.server_state.folder / repository
        return {path.relative_to(root).as_posix(): path for path in sorted(root.rglob("*")) if path.is_file()}

    def _info(self, repository: str, _revision: str | None) -> None:
        siblings = []
        for name, path in self._files(repository).items():
            size = path.stat().st_size
            entry = {"rfilename": name, "size": size, "blobId": hashlib.sha1(name.encode()).hexdigest()}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": hashlib.sha256(name.encode()).hexdigest(), "size": size, "pointerSize": 134}
            siblings.append(entry if "blobs=" in self.path else {"rfilename": name})
        info = {"_id": "1", "id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings}
        self.answer(200, json.dumps(info).encode(), {"Content-Type": "application/json"})

    def _tree(self, repository: str, _revision: str) -> None:
        files = self._files(repository)
        tree = [
            {"type": "file", "oid": "0" * 40, "path": name, "size": it.stat().st_size} for name, it in files.items()
        ]
        self.answer(200, json.dumps(tree).encode(), {"Content-Type": "application/json"})

    def _resolve(self, repository: str, revision: str, name: str) -> None:
        state, path = self.server_state, self._files(repository).get(name)
        if repository in state.gated and self.headers["Authorization"] != f"Bearer {TOKEN}":
            self.fail(403, "GatedRepo", f"Access to model {repository} is restricted.")
        elif path is None:
            self.fail(404, "EntryNotFound", "Entry not found")
        elif not name.endswith(LARGE):
            location = f"/api/resolve-cache/models/{repository}/{COMMIT}/{name}"
            self.answer(307, b"", {"Location": location, "X-Repo-Commit": COMMIT, "ETag": '"small"'})
        else:
            signature = f"{len(state.signatures)}-{time.monotonic_ns()}"
            state.signatures[signature] = state.signed_for
            headers = {
                "Location": f"{state.cdn_url}/{repository}/{name}?Signature={signature}",
                "X-Repo-Commit": COMMIT,
                "X-Linked-Size": str(path.stat().st_size),
                "X-Linked-Etag": f'"{hashlib.sha256(name.encode()).hexdigest()}"',
                "ETag": '"redirect"',
            }
            self.answer(302, b"", headers)

    def _small(self, repository: str, _revision: str, name: str) -> None:
        self._send(self._files(repository)[name], {"X-Repo-Commit": COMMIT, "ETag": '"small"'})

    def cdn(self) -> None:
        state, url = self.server_state, urlsplit(self.path)
        signature = parse_qs(url.query)["Signature"][0]
        state.signatures[signature] -= 1
        name = unquote(url.path).rpartition("/")[2]
        state.requests.append(f"{self.command} {name} {self.headers['Range']}")
        if self.headers["Authorization"] is not None:
            self.answer(400, b"Only one auth mechanism allowed")
        elif state.signatures[signature] < 0:
            self.answer(403, b"Request has expired")
        elif not state.cdn_faults or not state.cdn_faults.popleft()(self):
            self._send(state.folder / unquote(url.path)[1:], {"ETag": '"blob"', "Accept-Ranges": "bytes"})

    def _send(self, path: Path, headers: dict[str, str]) -> None:
        total = path.stat().st_size
        code, first, end = 200, 0, total
        if (wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"] or "")) is not None:
            code, first, end = 206, int(wanted[1]), min(int(wanted[2] or total - 1) + 1, total)
            if first >= total:
                self.answer(416, b"", {"Content-Range": f"bytes */{total}"})
                return
            headers = {**headers, "Content-Range": f"bytes {first}-{end - 1}/{total}"}
        self.answer(code, b"", {**headers, "Content-Length": str(end - first)})
        if self.command == "HEAD":
            return
        if self.bytes_before_break is not None:
            end = min(end, first + self.bytes_before_break)
            self.close_connection = True
        with path.open("rb") as file, suppress(ConnectionError):
            file.seek(first)
            while first < end:
                piece = file.read(min(end - first, 256 << 10))
                self.wfile.write(piece)
                self.server_state.sent[path.name] += len(piece)
                first += len(piece)
