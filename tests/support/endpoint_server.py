"""A scripted OpenAI-compatible endpoint on 127.0.0.1.

It answers, refuses, breaks off or hangs as it is told, and counts.

An answer is a function of the prompt alone, so what a store holds shows whose answer it is. A
prompt's faults are used up one a call; then it is answered.
"""

import json
import socket
import threading
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = "the cat sat on a mat and then dog ran under big red tree it was happy".split()
KEY = "tiny-endpoint-key-0123456789"


def answer_to(prompt: str) -> str:
    """Six words that follow from the prompt."""
    start = sum(map(ord, prompt))
    return " " + " ".join(WORDS[(start + 5 * n) % len(WORDS)] for n in range(6))


@dataclass
class Endpoint:
    """What it does, and what it was asked."""

    url: str = ""
    faults: dict[str, deque[str]] = field(default_factory=dict)
    """By prompt: a status with a code (`429 now`, `500`), `half`, `short`, `closed`, `hang`, or an
    answer that is none: `filter`, `empty`, `tools`, `length`."""
    every: Callable[[int], str | None] = lambda number: None
    """The fault of call number n, from 1, of prompts that have none of their own."""
    fingerprint: Callable[[int], str] = lambda number: "fp_one"
    calls: Counter[str] = field(default_factory=Counter)
    """By prompt."""
    answered: Counter[str] = field(default_factory=Counter)
    """By prompt; whole answers that were sent."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    delay: Callable[[int], float] = lambda number: 0.0
    """Seconds that call number n takes."""
    hold_from: float = float("inf")
    """Calls of this number and above wait until it is raised."""
    usage: bool = True
    answer: Callable[[str], str] = lambda prompt: answer_to(prompt)
    tokens: Callable[[dict[str, Any], str, str], dict[str, Any]] | None = None
    """Of a body, prompt and text: what the choice says of its tokens; `usage` in it replaces that
    of the response."""
    renamed: bool = False
    """Whether the limit must be called max_completion_tokens, as by OpenAI's reasoning models."""
    lock: threading.Lock = field(default_factory=threading.Lock)
    ended: threading.Event = field(default_factory=threading.Event)

    def fault(self, prompt: str, number: int) -> str | None:
        own = self.faults.get(prompt)
        return own.popleft() if own else self.every(number)


def prompt_of(body: dict[str, Any]) -> str:
    return str(body["prompt"] if "prompt" in body else body["messages"][-1]["content"])


@contextmanager
def endpoint(**settings: Any) -> Iterator[Endpoint]:
    """An endpoint that is up while the block runs."""
    made = Endpoint(**settings)
    server = _Server(("127.0.0.1", 0), _handler(made))
    made.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield made
    finally:
        made.ended.set()
        server.shutdown()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed has gone; nobody needs to hear of it."""


def _handler(made: Endpoint) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            """No line for each call."""

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(size))
            prompt = prompt_of(body)
            with made.lock:
                made.calls[prompt] += 1
                made.bodies.append(body)
                made.headers.append({k.lower(): v for k, v in self.headers.items()})
                made.at_once += 1
                made.most_at_once = max(made.most_at_once, made.at_once)
                number = made.calls.total()
                fault = made.fault(prompt, number)
            try:
                while number >= made.hold_from and not made.ended.wait(0.01):
                    pass
                made.ended.wait(made.delay(number))
                self._do(prompt, body, number, fault)
            finally:
                with made.lock:
                    made.at_once -= 1

        def _do(self, prompt: str, body: dict[str, Any], number: int, fault: str | None) -> None:
            if fault == "closed":
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True
            elif fault == "hang":
                made.ended.wait(60)
                self.close_connection = True
            elif fault is not None and fault[:3].isdigit():
                self._refuse(int(fault[:3]), fault[4:])
            elif made.renamed and "max_tokens" in body:
                said = "'max_tokens' is not supported, use 'max_completion_tokens' instead"
                self._refuse(400, "unsupported_parameter", said, param="max_tokens")
            else:
                self._answer(prompt, body, number, fault)

        def _refuse(self, status: int, code: str, said: str = "", **more: str) -> None:
            message = said or f"no: {self.headers.get('Authorization')}"
            said_whole = {"error": {"message": message, "code": code or None} | more}
            headers = {"Retry-After": "0.05"} if status == 429 else {}
            self._send(status, json.dumps(said_whole).encode(), **headers)

        def _answer(
            self, prompt: str, body: dict[str, Any], number: int, fault: str | None
        ) -> None:
            reasons = {"filter": "content_filter", "tools": "tool_calls", "length": "length"}
            text = "" if fault in ("empty", "tools") else made.answer(prompt)
            choice: dict[str, Any] = {
                "index": 0,
                "finish_reason": reasons.get(fault or "", "stop"),
                "logprobs": None,
            }
            chat = "messages" in body
            choice |= (
                {"message": {"role": "assistant", "content": text.strip()}}
                if chat
                else {"text": text}
            )
            said = {
                "id": f"call-{number}",
                "object": "chat.completion" if chat else "text_completion",
                "created": 0,
                "model": body["model"],
                "system_fingerprint": made.fingerprint(number),
                "choices": [choice],
            }
            if made.usage:
                used = {
                    "prompt_tokens": len(prompt.split()),
                    "completion_tokens": len(text.split()),
                }
                said["usage"] = used | {"total_tokens": sum(used.values())}
            if made.tokens is not None:
                choice |= made.tokens(body, prompt, text)
                said |= {"usage": choice.pop("usage")} if "usage" in choice else {}
            data = json.dumps(said).encode()
            if fault == "half":  # of the bytes that were promised
                self._send(200, data, cut=len(data) // 2)
                return
            if fault == "short":  # all bytes that were promised, and no whole JSON
                self._send(200, data[: len(data) // 2])
                return
            with made.lock:
                made.answered[prompt] += 1
            self._send(200, data)

        def _send(
            self, status: int, data: bytes, *, cut: int | None = None, **headers: str
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(data[:cut])
            if cut is not None:
                self.wfile.flush()
                self.connection.shutdown(socket.SHUT_RDWR)
                self.close_connection = True

    return Handler
