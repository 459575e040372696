"""Answers of an endpoint, kept on disk as they arrive: none is paid for twice.

A process writes a file of its own into `answers/<endpoint>/` of the run folder, a line of JSON for
each event of a call, named by what was asked:

    {"asked": <key>, "tokens": [prompt, completion]}    it is sent; the most that it may be charged
    {"refused": <key>}                                  the endpoint said no: nothing is charged
    {"answered": <key>, "text": ..., ...}               the answer; synced before anybody uses it

A process that dies leaves calls that were sent and came to nothing: whether they are charged nobody
here can know, so a budget counts them in full. A line that a power cut tore is no line. Files are
never changed or removed: they are what the user has paid for, whatever becomes of the store.
"""

import json
import os
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from ...storage.bounds import parsed
from ...storage.files.base import explained
from ...storage.keys import content_id
from ..recipe.engines import Generate
from ..recipe.run_folder import ANSWERS

LOOK_SECONDS = 2.0
"""At least, between two looks at what other processes heard."""


class Tokens(NamedTuple):
    """Of a call, or of many."""

    prompt: int
    completion: int

    def plus(self, other: "Tokens") -> "Tokens":
        """Both together."""
        return Tokens(self.prompt + other.prompt, self.completion + other.completion)

    def minus(self, other: "Tokens") -> "Tokens":
        """Without those."""
        return Tokens(self.prompt - other.prompt, self.completion - other.completion)


NONE = Tokens(0, 0)


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What an endpoint said."""

    text: str
    finish_reason: str
    tokens: Tokens
    """What it counted; where it says nothing, the most that the call may be charged."""
    served: str
    """The model that answered, and its fingerprint where it has one."""
    left_out: tuple[str, ...] = ()
    """What the answer has beside its text, which is not read: reasoning, calls of tools."""
    logprobs: dict[str, Any] | None = None
    """What it says of its tokens, where that was asked for (`engines/said_tokens.py`)."""


def answers_dir(run_dir: Path, generate: Generate) -> Path:
    """Where the answers of a recipe's endpoint are kept."""
    name = content_id("endpoint", url=generate.address, model=generate.model)
    return run_dir / ANSWERS / name


class Answers:
    """All answers of a run folder, of an endpoint's model.

    The file of this process takes what arrives.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"{uuid.uuid4().hex}.jsonl"
        self._lock = threading.Lock()
        self._places: dict[str, tuple[Path, int]] = {}
        self._read: dict[Path, int] = {}
        self._file: int | None = None
        self._next_look = 0.0
        self.count = 0
        """Answers."""
        self.charged = NONE
        """What the endpoint counted of them."""
        self.in_doubt = NONE
        """The most that may be charged for calls that were sent, and of which nothing was heard
        yet."""
        self._open: dict[str, list[Tokens]] = {}

    def __enter__(self) -> Self:
        with explained("cannot write", self._own):
            self._folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._own, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        self.look()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            assert self._file is not None
            empty = os.fstat(self._file).st_size == 0
            os.close(self._file)
            self._file = None
        if empty:
            self._own.unlink(missing_ok=True)

    def look(self) -> None:
        """Read what is new in all files."""
        self._next_look = time.monotonic() + LOOK_SECONDS
        with self._lock:
            for path in sorted(self._folder.glob("*.jsonl")):
                for start, line in self._new_lines(path):
                    self._take(line, (path, start))

    def find(self, key: str) -> Answer | None:
        """The answer to what this key names; None: there is none."""
        if key not in self._places and time.monotonic() >= self._next_look:
            self.look()  # another process may have it, or have died with it
        place = self._places.get(key)
        if place is None:
            return None
        path, start = place
        with path.open("rb") as file:
            file.seek(start)
            found = parsed(file.readline())
        return Answer(
            text=str(found["text"]),
            finish_reason=str(found["finish_reason"]),
            tokens=Tokens(*found["tokens"]),
            served=str(found["served"]),
            left_out=tuple(found["left_out"]),
            logprobs=found.get("logprobs"),
        )

    def asked(self, key: str, most: Tokens) -> None:
        """A call is sent now."""
        self._write({"asked": key, "tokens": most})

    def refused(self, key: str) -> None:
        """The endpoint said no to it."""
        self._write({"refused": key})

    def answered(self, key: str, answer: Answer) -> None:
        """It answered; on disk when this returns."""
        said = asdict(answer)
        if answer.logprobs is None:
            del said["logprobs"]
        self._write({"answered": key} | said, sync=True)

    def _write(self, event: dict[str, Any], *, sync: bool = False) -> None:
        line = json.dumps(event).encode() + b"\n"
        with self._lock, explained("cannot write", self._own):
            if self._file is None:
                return  # the stage has ended, and did not wait for this call
            start = os.fstat(self._file).st_size
            os.write(self._file, line)
            if sync:
                os.fsync(self._file)
            self._read[self._own] = start + len(line)
            self._take(line, (self._own, start))

    def _new_lines(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """Whole lines behind what was read of a file, each with its place."""
        start = self._read.get(path, 0)
        with path.open("rb") as file:
            file.seek(start)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                yield start, line
                start += len(line)
        self._read[path] = start

    def _take(self, line: bytes, place: tuple[Path, int]) -> None:
        try:
            event = json.loads(line)
            if "asked" in event:
                most = Tokens(*event["tokens"])
                self._open.setdefault(event["asked"], []).append(most)
                self.in_doubt = self.in_doubt.plus(most)
                return
            key = event.get("answered") or event["refused"]
            tokens = Tokens(*event["tokens"]) if "answered" in event else NONE
        except (ValueError, LookupError, TypeError):
            return  # torn
        if self._open.get(key):
            self.in_doubt = self.in_doubt.minus(self._open[key].pop())
        if "answered" in event:
            self._places.setdefault(key, place)
            self.count += 1
            self.charged = self.charged.plus(tokens)


def read_answers(folder: Path) -> Answers:
    """What is there, to look at; nothing is written."""
    found = Answers(folder)
    found.look()
    return found
