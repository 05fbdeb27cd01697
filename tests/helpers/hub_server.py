"""A strict Hub on the loopback: what huggingface_hub calls to find, fetch and publish files, and faults on demand.

Like the real one it answers for LFS files with a redirect to another origin, which refuses credentials. Whatever it is
asked for beyond that is answered with 404 and kept in ``unexpected``.
"""

from __future__ import annotations

import hashlib
import json
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from helpers.hub_uploads import Uploads


@dataclass(frozen=True)
class File:
    """One version of a file, stored in git or in LFS."""

    content: bytes
    lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        return (
            f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()
        )

    @property
    def blob_id(self) -> str:
        stored = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(stored) + stored).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id


@dataclass(frozen=True)
class Request:
    """One request as it came in. ``origin`` is "hub" or "storage"."""

    origin: str
    method: str
    path: str
    headers: Mapping[str, str]


@dataclass
class Fault:
    """What goes wrong with the requests that it matches.

    Attributes:
        method: Match requests of this method alone.
        origin: Match those to this origin alone.
        match: Match those with this in their path.
        times: Match so many of them.
        status: Answer with this status and ``headers``.
        headers: Without a status they replace the true ones, and those that are None are left out.
        delay: Wait so many seconds first.
        body: Send this instead of the content, with the true headers.
        cut: Drop the connection after so many bytes of the body, of an upload as of an answer.
        stall: Send nothing more where ``cut`` says, but keep the connection.
        endless: Send zeros after the body for as long as the client listens.
        ignore_range: Send the whole body although a part was asked for.
    """

    method: str = ""
    origin: str = ""
    match: str = ""
    times: float = float("inf")
    status: int = 0
    headers: Mapping[str, str | None] = field(default_factory=dict)
    delay: float = 0.0
    body: bytes | None = None
    cut: int | None = None
    stall: bool = False
    endless: bool = False
    ignore_range: bool = False

    def takes(self, request: Request) -> bool:
        mine = request.method in (self.method or request.method) and request.origin in (self.origin or request.origin)
        if not (mine and self.match in request.path and self.times > 0):
            return False
        self.times -= 1
        return True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        self.connections: list[socket.socket] = []
        super().__init__(("127.0.0.1", 0), handler)

    def get_request(self) -> tuple[socket.socket, object]:
        connection, address = super().get_request()
        self.connections.append(connection)
        return connection, address

    def server_close(self) -> None:
        """Hang up as well: a connection that is kept alive would go on being served."""
        super().server_close()
        for connection in self.connections:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Report mistakes of this file, but not clients that hang up."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubServer:
    """A Hub for the length of a ``with`` block.

    ``add`` files, ``fail`` or ``fault`` requests, then read ``requests``.
    """

    def __init__(self) -> None:
        self.requests: list[Request] = []
        self.unexpected: list[Request] = []
        self.faults: list[Fault] = []
        self.branches: dict[str, dict[str, str]] = {}
        self.commits: dict[str, dict[str, File]] = {}
        self.tokens: dict[str, str] = {}
        self.gated: set[str] = set()
        self.writers: dict[str, str] = {}
        self.objects: dict[str, bytes] = {}
        self.sent: list[tuple[str, object]] = []
        self.pushed: list[tuple[str, str, list[str]]] = []
        self.stopped = threading.Event()
        self._lock = threading.Lock()
        handlers = (type("Handler", (_Handler,), {"hub": self, "origin": origin}) for origin in ("hub", "storage"))
        self._servers = [_Server(handler) for handler in handlers]
        self.url, self.storage_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.stopped.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add(self, repo: str, path: str, content: bytes, lfs: bool = True, revision: str = "main") -> str:
        """Commit a file to a branch, which is made when it is new, and return the commit hash."""
        branches = self.branches.setdefault(repo, {})
        tree = {**self.commits.get(branches.get(revision, ""), {}), path: File(content, lfs)}
        listing = [repo, revision, *(f"{name} {file.etag}" for name, file in sorted(tree.items()))]
        commit = hashlib.sha1("\n".join(listing).encode()).hexdigest()
        self.commits[commit] = tree
        branches[revision] = commit
        return commit

    def require_token(self, repo: str, token: str, gated: bool = False) -> None:
        """Make a repository private, or gated, for all who do not send this token."""
        self.tokens[repo] = token
        if gated:
            self.gated.add(repo)

    def allow(self, token: str, owner: str) -> None:
        """Let those who send this token create and write repositories of an owner."""
        self.writers[token] = owner

    def fault(self, **what: Any) -> None:
        """Add a ``Fault`` with these fields."""
        self.faults.append(Fault(**what))

    def fail(self, status: int, **which: Any) -> None:
        """Answer requests with an error status."""
        self.fault(status=status, **which)

    @contextmanager
    def counting(self) -> Iterator[list[Request]]:
        """The requests of the block alone, filled in at its end."""
        start = len(self.requests)
        seen: list[Request] = []
        yield seen
        seen += self.requests[start:]

    def _note(self, request: Request) -> Fault:
        with self._lock:
            self.requests.append(request)
            return next((fault for fault in self.faults if fault.takes(request)), Fault())


class _Handler(Uploads):
    origin: str
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Keep quiet: the requests are kept in a list."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.request_seen = Request(self.origin, self.command, self.path, dict(self.headers.items()))
        self.fault = self.hub._note(self.request_seen)
        length = int(self.headers.get("Content-Length", 0))
        upload_cut = self.command == "PUT" and self.fault.cut is not None
        self.body = self.rfile.read(min(length, self.fault.cut or 0) if upload_cut else length)
        if self.headers.get("Content-Type", "").endswith(("/json", "+json")):
            self.hub.sent.append((self.path, json.loads(self.body)))
        if upload_cut or (self.fault.delay and self.hub.stopped.wait(self.fault.delay)):
            self.close_connection = True
        elif self.fault.status:
            self._send(self.fault.status, b'{"error":"fault on demand"}', self.fault.headers)
        elif self.origin == "storage":
            self._storage()
        else:
            self._route()

    def _route(self) -> None:
        url = urlsplit(self.path)
        parts = [unquote(part) for part in url.path.split("/")[1:]]
        query = {key: values[0] for key, values in parse_qs(url.query).items()}
        if self.command == "POST" and parts in (["api", "repos", "create"], ["api", "validate-yaml"]):
            self._create_repo() if parts[1] == "repos" else self._validate_yaml()
        elif self.command == "POST" and parts[2:] in (
            ["info", "lfs", "objects", "batch"],
            ["info", "lfs", "objects", "verify"],
        ):
            self._lfs(f"{parts[0]}/{parts[1].removesuffix('.git')}", parts[-1])
        elif parts[:2] == ["api", "models"] and len(parts) >= 4:
            self._api("/".join(parts[2:4]), parts[4:], query)
        elif len(parts) >= 5 and parts[2] == "resolve" and self.command in ("GET", "HEAD"):
            self._resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        elif parts == ["api", "agent-harnesses"]:
            self._send_json({"standardEnvVars": [], "harnesses": {}})
        else:
            self._unknown()

    def _unknown(self) -> None:
        self.hub.unexpected.append(self.request_seen)
        self._send(404, b"")

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit, or None after an error was sent."""
        token = self.hub.tokens.get(repo)
        if repo not in self.hub.branches:
            self._refuse(404, "RepoNotFound", "Repository not found")
        elif token and self.headers.get("Authorization") != f"Bearer {token}":
            self._refuse(
                *(
                    (403, "GatedRepo", "Access is restricted")
                    if repo in self.hub.gated
                    else (401, "RepoNotFound", "Not found")
                )
            )
        elif revision in self.hub.branches[repo]:
            return self.hub.branches[repo][revision]
        elif revision in self.hub.commits:
            return revision
        else:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return None

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if (commit := self._commit(repo, revision)) is None:
            return
        file = self.hub.commits[commit].get(path)
        if file is None:
            self._refuse(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit})
        elif file.lfs:
            linked = {"X-Linked-ETag": f'"{file.sha256}"', "X-Linked-Size": str(len(file.content))}
            location = {"Location": f"{self.hub.storage_url}/{commit}/{file.sha256}"}
            self._send(302, b"", {"X-Repo-Commit": commit, **linked, **location})
        else:
            self._send_content(file, {"X-Repo-Commit": commit})

    def _storage(self) -> None:
        _, commit, digest = (self.path.split("/") + ["", ""])[:3]
        files = [file for file in self.hub.commits.get(commit, {}).values() if file.lfs and file.sha256 == digest]
        if self.headers.get("Authorization"):
            self._send(400, b"credentials were sent to the storage")
        elif self.command == "PUT" and commit == "uploads":
            self._store(digest)
        elif files and self.command in ("GET", "HEAD"):
            self._send_content(files[0], {})
        else:
            self._unknown()

    def _api(self, repo: str, parts: list[str], query: dict[str, str]) -> None:
        action, revision = parts[0] if parts else "", parts[1] if len(parts) > 1 else "main"
        reading = {("GET", ""), ("GET", "revision"), ("GET", "tree"), ("POST", "paths-info")}
        if (self.command, action) not in reading | {("POST", "preupload"), ("POST", "commit")}:
            return self._unknown()
        if (commit := self._commit(repo, revision)) is None:
            return None
        tree = self.hub.commits[commit]
        if action == "preupload":
            return self._preupload(repo, tree)
        if action == "commit":
            return self._commit_files(repo, revision, commit)
        if action == "tree":
            return self._tree(tree, "/".join(parts[2:]), query.get("recursive", "").lower() in ("1", "true"))
        if action == "paths-info":
            asked = parse_qs(self.body.decode()).get("paths", [])
            return self._send_json([entry for path in asked for entry in _entries(tree) if entry["path"] == path])
        siblings = [_sibling(path, file, "blobs" in query) for path, file in sorted(tree.items())]
        return self._send_json(
            {
                "_id": repo,
                "id": repo,
                "modelId": repo,
                "sha": commit,
                "private": repo in self.hub.tokens,
                "tags": [],
                "siblings": siblings,
            }
        )

    def _tree(self, tree: Mapping[str, File], folder: str, recursive: bool) -> None:
        prefix = f"{folder}/" if folder else ""
        inside = [entry for entry in _entries(tree) if str(entry["path"]).startswith(prefix)]
        if not inside:
            return self._refuse(404, "EntryNotFound", f"{folder} does not exist")
        return self._send_json([entry for entry in inside if recursive or "/" not in str(entry["path"])[len(prefix) :]])

    def _send_content(self, file: File, headers: Mapping[str, str]) -> None:
        size = len(file.content)
        content = file.content if self.fault.body is None else self.fault.body
        headers = {
            "ETag": f'"{file.etag}"',
            "Accept-Ranges": "bytes",
            "Content-Type": "application/octet-stream",
            **headers,
        }
        start = (
            0
            if self.fault.ignore_range
            else int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        )
        if start >= size > 0:
            self._send(416, b"", {"Content-Range": f"bytes */{size}"})
        elif start:
            self._send(206, content[start:], {**headers, "Content-Range": f"bytes {start}-{size - 1}/{size}"})
        else:
            self._send(200, content, headers)

    def _refuse(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        self._send(
            status,
            json.dumps({"error": message}).encode(),
            {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})},
        )

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, body: bytes, headers: Mapping[str, str | None] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **(headers or {}), **self.fault.headers}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.fault.cut if status in (200, 206) else None
        self.wfile.write(body[:cut])
        while self.fault.endless:
            self.wfile.write(bytes(1 << 20))
        if cut is not None and cut < len(body):
            if self.fault.stall:
                self.hub.stopped.wait()
            self.close_connection = True


def _entries(tree: Mapping[str, File]) -> list[dict[str, object]]:
    """The tree in the Hub's own form, folders included."""
    folders = {"/".join(path.split("/")[:depth]) for path in tree for depth in range(1, path.count("/") + 1)}
    entries: list[dict[str, object]] = [
        {"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders
    ]
    for path, file in tree.items():
        entry: dict[str, object] = {"type": "file", "path": path, "size": len(file.content), "oid": file.blob_id}
        if file.lfs:
            entry["lfs"] = {"oid": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
        entries.append(entry)
    return sorted(entries, key=lambda entry: str(entry["path"]))


def _sibling(path: str, file: File, blobs: bool) -> dict[str, object]:
    if not blobs:
        return {"rfilename": path}
    sibling: dict[str, object] = {"rfilename": path, "size": len(file.content), "blobId": file.blob_id}
    if file.lfs:
        sibling["lfs"] = {"sha256": file.sha256, "size": len(file.content), "pointerSize": len(file.pointer)}
    return sibling
