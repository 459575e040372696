"""A stand-in for the Hub's HTTP interface, as much of it as publishing a dataset uses.

It is in memory, on a port of its own.

What huggingface_hub asks of it is real HTTP; that it answers as the Hub does was checked by nobody
but this library: repositories, files by path with their sha256, preupload, LFS transfers, commits
in one step with a parent to hold on to, tags, the card's check. Without xet: `HF_HUB_DISABLE_XET`
makes the library transfer by LFS.
"""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

LFS = 5000
"""Files from this size on, and Parquet files, are large."""


@dataclass
class Hub:
    """One dataset repository."""

    url: str = ""
    exists: bool = False
    private: bool = False
    commits: list[dict[str, bytes]] = field(default_factory=lambda: [{}])
    """The files after each commit."""
    titles: list[str] = field(default_factory=lambda: ["initial commit"])
    tags: dict[str, str] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)
    """Large files by sha256, committed or not."""
    sent: int = 0
    """Bytes of large files that came in."""
    requests: list[str] = field(default_factory=list)
    fault: tuple[int, str] | None = None
    """Request n is refused `before` it is done, or its answer is lost `after`."""
    busy_from: int | None = None
    """From this request on each is answered with 503."""
    pause: float = 0.0
    """Seconds before each answer."""
    after_each: Callable[["Hub"], None] = lambda hub: None
    wrong: list[str] = field(default_factory=list)
    """What `after_each` found."""

    @property
    def head(self) -> str:
        return f"{len(self.commits):040x}"

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON (or bytes) of one request."""
        for verb, pattern, do in _ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path.split("?")[0])):
                return do(self, body, *match.groups())
        return 404, {"error": f"{method} {path} is not known here"}


def _create(hub: Hub, body: bytes) -> tuple[int, Any]:
    url = {
        "url": f"{hub.url}/datasets/{json.loads(body)['organization']}/{json.loads(body)['name']}"
    }
    if hub.exists:
        return 409, {"error": "exists", **url}
    asked = json.loads(body)
    hub.exists, hub.private = (
        True,
        asked.get("private") is True or asked.get("visibility") == "private",
    )
    return 200, url


def _valid(hub: Hub, body: bytes) -> tuple[int, Any]:
    front = json.loads(body)["content"].split("---")[1]
    return (
        (200, {})
        if "license:" in front
        else (400, {"errors": [{"message": "license is missing"}], "warnings": []})
    )


def _info(hub: Hub, body: bytes, *_: str) -> tuple[int, Any]:
    return 200, {
        "id": "user/name",
        "sha": hub.head,
        "siblings": [],
        "private": hub.private,
        "downloads": 0,
        "likes": 0,
    }


def _paths(hub: Hub, body: bytes, *_: str) -> tuple[int, Any]:
    asked = (
        json.loads(body)["paths"]
        if body.startswith(b"{")
        else re.findall(r"paths=([^&]+)", body.decode())
    )
    found = []
    for name in map(unquote, asked):
        if name in hub.files:
            content = hub.files[name]
            info = {"type": "file", "path": name, "size": len(content), "oid": _git(content)}
            if _large(name, len(content)):
                info["lfs"] = {
                    "oid": hashlib.sha256(content).hexdigest(),
                    "size": len(content),
                    "pointerSize": 130,
                }
            found.append(info)
    return 200, found


def _preupload(hub: Hub, body: bytes, *_: str) -> tuple[int, Any]:
    files = []
    for file in json.loads(body)["files"]:
        mode = "lfs" if _large(file["path"], file["size"]) else "regular"
        content = hub.files.get(file["path"])
        oid = None
        if content is not None:
            oid = hashlib.sha256(content).hexdigest() if mode == "lfs" else _git(content)
        files.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
    return 200, {"files": files}


def _batch(hub: Hub, body: bytes, *_: str) -> tuple[int, Any]:
    objects = []
    for wanted in json.loads(body)["objects"]:
        actions = {"upload": {"href": f"{hub.url}/lfs/{wanted['oid']}"}}
        objects.append(
            {
                **wanted,
                "authenticated": True,
                **({} if wanted["oid"] in hub.stored else {"actions": actions}),
            }
        )
    return 200, {"transfer": "basic", "objects": objects}


def _put(hub: Hub, body: bytes, oid: str) -> tuple[int, Any]:
    assert hashlib.sha256(body).hexdigest() == oid
    hub.stored[oid] = body
    hub.sent += len(body)
    return 200, {}


def _commit(hub: Hub, body: bytes, *_: str) -> tuple[int, Any]:
    lines = [json.loads(line) for line in body.splitlines()]
    header = lines[0]["value"]
    if header.get("parentCommit") not in (None, hub.head):
        return 412, {"error": "A commit has happened since."}
    files = dict(hub.files)
    for line in lines[1:]:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.stored[value["oid"]]
        else:
            return 400, {"error": line["key"]}
    hub.commits.append(files)
    hub.titles.append(header["summary"])
    url = f"{hub.url}/datasets/user/name/commit/{hub.head}"
    return 200, {"success": True, "commitUrl": url, "commitOid": hub.head, "hookOutput": ""}


def _tag(hub: Hub, body: bytes, revision: str) -> tuple[int, Any]:
    tag = json.loads(body)["tag"]
    if tag in hub.tags:
        return 409, {"error": "exists"}
    hub.tags[tag] = hub.head if revision == "main" else revision
    return 200, {}


def _file(hub: Hub, body: bytes, name: str) -> tuple[int, Any]:
    return (200, hub.files[name]) if name in hub.files else (404, {"error": "no such file"})


def _told(hub: Hub, body: bytes) -> tuple[int, Any]:
    told = json.loads(body)
    hub.busy_from, hub.pause = told["busy_from"], told["pause"]
    asked = len(hub.requests)
    hub.requests.clear()
    return 200, {"requests": asked}


def _hashes(hub: Hub, body: bytes) -> tuple[int, Any]:
    return 200, {name: hashlib.sha256(content).hexdigest() for name, content in hub.files.items()}


_REPO = r"/api/datasets/user/name"
_ROUTES: list[tuple[str, str, Callable[..., tuple[int, Any]]]] = [
    # To the stand-in itself, by who started it in another process.
    ("POST", "/_told", _told),
    ("GET", "/_hashes", _hashes),
    ("POST", "/api/repos/create", _create),
    ("POST", "/api/validate-yaml", _valid),
    ("GET", rf"{_REPO}(?:/revision/.+)?", _info),
    ("POST", rf"{_REPO}/paths-info/(\w+)", _paths),
    ("POST", rf"{_REPO}/preupload/(\w+)", _preupload),
    ("POST", r"/datasets/user/name\.git/info/lfs/objects/batch", _batch),
    ("PUT", r"/lfs/(\w+)", _put),
    ("POST", rf"{_REPO}/commit/(?:\w+)", _commit),
    ("POST", rf"{_REPO}/tag/(\w+)", _tag),
    ("HEAD", r"/datasets/user/name/resolve/\w+/(.+)", _file),
    ("GET", r"/datasets/user/name/resolve/\w+/(.+)", _file),
]


def _large(name: str, size: int) -> bool:
    return name.endswith(".parquet") or (size >= LFS and not name.endswith(".md"))


def _git(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits for an acknowledgement
    wbufsize = -1
    hub: Hub
    lock: threading.Lock

    def _handle(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        with self.lock:
            hub = self.hub
            hub.requests.append(f"{self.command} {self.path.split('?')[0]}")
            when = hub.fault[1] if hub.fault and hub.fault[0] == len(hub.requests) else ""
            status, content = self._answer(body, refused=when == "before")
            hub.after_each(hub)
            if when:
                status, content = 403, {"error": "the stand-in was told to fail here"}
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        if "/resolve/" in self.path and status == 200:
            self.send_header("ETag", f'"{_git(data)}"')
            self.send_header("X-Repo-Commit", hub.head)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)
        self.wfile.flush()

    def _answer(self, body: bytes, *, refused: bool) -> tuple[int, Any]:
        hub = self.hub
        if self.path.startswith("/_"):
            hub.requests.pop()
            return hub.answer(self.command, self.path, body)
        time.sleep(hub.pause)
        if hub.busy_from is not None and len(hub.requests) >= hub.busy_from:
            return 503, {"error": "busy"}
        return (403, {}) if refused else hub.answer(self.command, self.path, body)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *_: Any) -> None:
        pass


@contextmanager
def serve() -> Iterator[Hub]:
    """A stand-in that answers while the block runs."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub, "lock": threading.Lock()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
