"""An S3 server for tests: moto in a process of its own, on 127.0.0.1.

It fails and counts requests when told to.

It prints its port, and `POST /_fault {"kind": ..., "number": ..., "times": ...}` sets what happens
from the given upload on (1 is the next): "lost" does it and closes the connection, "unheard" closes
it without doing it, "500", "503" and "409" refuse it, "500 done" does it and says 500; "ignore" is
a service that never heard of If-None-Match, "slow" one that takes its time. With `"methods":
["GET", ...]` requests of these methods are counted in place of uploads. `POST /_log` gives the
requests since the last time, as "METHOD key status".
"""

import json
import socket
import sys
import threading
import time
from typing import Any

from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

Answer = tuple[str, list[tuple[str, str]], bytes]
PAUSE = 0.05
"""Seconds before each answer of a slow service."""
CODES = {
    "500": ("500 Internal Server Error", "InternalError"),
    "503": ("503 Slow Down", "SlowDown"),
    "409": ("409 Conflict", "ConditionalRequestConflict"),
}


class Service:
    """moto behind a lock: it looks for a key and stores it in two steps, S3 in one."""

    def __init__(self) -> None:
        self._app = DomainDispatcherApplication(create_backend_app)
        self._lock = threading.Lock()
        self._fault: dict[str, Any] = {}
        self._uploads = 0
        self._log: list[str] = []

    def __call__(self, environ: dict[str, Any], start_response: Any) -> list[bytes]:
        size = int(environ.get("CONTENT_LENGTH") or 0)
        with self._lock:
            told = {"/_fault": self._set_fault, "/_log": self._take_log}.get(environ["PATH_INFO"])
            status, headers, body = (
                told(environ["wsgi.input"].read(size)) if told else self._serve(environ)
            )
        start_response(status, headers)
        return [body]

    def _set_fault(self, body: bytes) -> Answer:
        self._fault, self._uploads = json.loads(body), 0
        return "200 OK", [], b""

    def _take_log(self, body: bytes) -> Answer:
        taken, self._log = self._log, []
        return "200 OK", [], json.dumps(taken).encode()

    def _serve(self, environ: dict[str, Any]) -> Answer:
        kind = self._due(environ)
        if kind == "ignore":
            environ.pop("HTTP_IF_NONE_MATCH", None)
        if kind == "slow":
            time.sleep(PAUSE)
        if kind in ("unheard", *CODES):
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        answer = (
            self._refusal(kind)
            if kind in CODES
            else ("", [], b"")
            if kind == "unheard"
            else self._ask(environ)
        )
        answer = self._refusal("500") if kind == "500 done" else answer
        self._log.append(
            f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']} {kind or answer[0][:3]}"
        )
        if kind in ("lost", "unheard"):
            environ["werkzeug.socket"].shutdown(socket.SHUT_RDWR)
        return answer

    def _due(self, environ: dict[str, Any]) -> str:
        method, bucket_only = environ["REQUEST_METHOD"], environ["PATH_INFO"].count("/") == 1
        makes_bucket = method == "PUT" and bucket_only
        if method not in self._fault.get("methods", ["PUT"]) or makes_bucket or not self._fault:
            return ""
        self._uploads += 1
        first, times = self._fault["number"], self._fault["times"]
        return self._fault["kind"] if first <= self._uploads < first + times else ""

    def _ask(self, environ: dict[str, Any]) -> Answer:
        found: list[Any] = []
        body = b"".join(
            self._app(
                environ, lambda status, headers, exc_info=None: found.extend((status, headers))
            )
        )
        return found[0], found[1], body

    def _refusal(self, kind: str) -> Answer:
        status, code = CODES[kind]
        error = f"<Error><Code>{code}</Code><Message>on purpose</Message></Error>"
        body = f"<?xml version='1.0'?>{error}".encode()
        return (
            status,
            [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))],
            body,
        )


if __name__ == "__main__":
    server = make_server("127.0.0.1", 0, Service(), threaded=True)
    sys.stdout.write(f"{server.port}\n")
    sys.stdout.flush()
    server.serve_forever()
