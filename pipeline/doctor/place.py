"""What the place of a store can do: tried in a folder that is made there and removed again."""

import os
import re
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from ...stages.recipe.kinds import KINDS
from ...storage.errors import StillroomError
from ...storage.files.base import Files
from ...storage.files.opening import open_files
from ...storage.store.store import MARKER, Store
from ..printing.numbers import human, size
from .finding import Finding, fault, ok, warning

WRITERS = 4
"""That put one name at once."""
DISK_BYTES, SERVICE_BYTES = 32 << 20, 4 << 20
"""Written to see how fast that is: about what a shard has; less over a network."""
SLOW_BYTES = 10e6
"""A second: scoring at 20,000 tokens/s writes 3.5 MB/s with k: 64, and reading back is beside
it."""
SLOW_SECONDS = 1.0
"""For a record: every commit makes one."""
LITTLE_BYTES = 2 << 30
"""Free: below this a run of more than about 10 million tokens is at risk."""
ANSWER_SECONDS = 30.0
"""For all that a service is asked: its driver waits and tries again for minutes, and nobody waits
so long."""
_TRIAL = re.compile(r"/\.doctor-\w+(/\.tmp-\w+)?")
"""Names of what is tried, which tell nobody anything."""
_READS = "Reading works (inspect, query, verify, and as storage.sources); no run can add rows"


def look(address: str) -> Iterator[Finding]:
    """Whether a store is there, whether a run could write to it, how fast, and how much."""
    try:
        files = open_files(address)
    except StillroomError as error:
        yield fault("store", str(error), "", "Name a folder, or a URL that can be read")
        return
    if isinstance(files.root, Path):
        yield _what_is_there(files)
        yield from _on_disk(files.root)
    else:
        yield from _on_service(files)


def _what_is_there(files: Files) -> Finding:
    try:
        if files.empty():
            return ok("store", f"nothing in {files.root} yet", "A run makes the store")
        if files.exists(MARKER):
            Store.from_files(files)
            return ok("store", f"there is one in {files.root}")
    except StillroomError as error:
        return fault("store", str(error), "", "See `stillroom verify` where there should be one")
    means = "A run makes no store among other files"
    do = "Name a new folder, or an empty one"
    return fault("store", f"{files.root} has files and no {MARKER}", means, do)


def _on_disk(root: Path) -> Iterator[Finding]:
    """In the store's folder, or where it would be made."""
    base = next(folder for folder in (root, *root.absolute().parents) if folder.is_dir())
    trial = base / f".doctor-{uuid.uuid4().hex}"
    try:
        yield from _tried(open_files(trial), "hard links", DISK_BYTES)
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    yield _free("free space", base, "")


def _on_service(files: Files) -> Iterator[Finding]:
    """Below the URL; a service that does not answer is not waited for."""
    found: list[Finding] = []

    def ask() -> None:
        found.append(_what_is_there(files))
        trial = open_files(f"{files.root}/.doctor-{uuid.uuid4().hex}")
        found.extend(_tried(trial, "", SERVICE_BYTES))
        found.extend(_cleared(trial))

    asking = threading.Thread(target=ask, daemon=True)
    asking.start()
    asking.join(ANSWER_SECONDS)
    yield from list(found)
    if asking.is_alive():
        means = "Reads and commits would wait as long"
        do = "Check address, endpoint, network and credentials"
        yield fault("service", f"no answer within {ANSWER_SECONDS:.0f} s", means, do)
    temporary = Path(tempfile.gettempdir())
    yield _free("temporary space", temporary, "Shards are made here first (TMPDIR)")


def _cleared(files: Files) -> Iterator[Finding]:
    """Remove what was tried, and say so where that cannot be."""
    try:
        for name, _, _ in list(files.walk()):
            files.remove(name)
    except FileNotFoundError:
        return  # no bucket, which was said
    except StillroomError as error:
        means = f"`repair` and `vacuum` delete, and the trial stays: {files.root}"
        yield warning("deleting", str(error), means, "Give these credentials the right to delete")


def _tried(files: Files, links: str, many: int) -> Iterator[Finding]:
    """Put-if-absent by several writers at once, then how fast a record and a shard are written."""
    began = time.monotonic()
    try:
        files.prove_exclusive()
        files.put_if_absent("first", b"0")
        seconds = time.monotonic() - began
        if links:
            yield ok(links, "work here")
        yield _race(files)
    except StillroomError as error:
        where = links or "put-if-absent"
        yield fault(where, _TRIAL.sub("", str(error)), _READS, "")  # it says what to do itself
        return
    yield _speed(files, many, record=seconds)


def _race(files: Files) -> Finding:
    """One name, several writers: it must have one winner, and that one's content."""
    ready, won = threading.Barrier(WRITERS), dict.fromkeys(range(WRITERS), False)

    def put(number: int) -> None:
        ready.wait()
        with suppress(StillroomError):
            won[number] = files.put_if_absent("name", str(number).encode())

    writers = [threading.Thread(target=put, args=(number,)) for number in won]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    winners = [str(number).encode() for number, is_winner in won.items() if is_winner]
    if winners == [files.read("name")]:
        return ok("put-if-absent", f"{WRITERS} writers of one name, one winner")
    found = f"{WRITERS} writers of one name: {len(winners)} believe they have won"
    means = "Writers would lose each other's rows without an error"
    return fault("put-if-absent", found, means, "Choose another place for storage.dir")


def _speed(files: Files, many: int, *, record: float) -> Finding:
    block = os.urandom(1 << 20)

    def write(path: Path) -> None:
        with path.open("wb") as file:
            for _ in range(many >> 20):
                file.write(block)

    began = time.monotonic()
    try:
        files.put_content("data", write, suffix="")
    except StillroomError as error:
        do = "Free space, or choose another place for storage.dir"
        return fault("write speed", str(error), "A shard cannot be written", do)
    speed = many / (time.monotonic() - began)
    found = f"about {size(speed)}/s ({size(many)}, synced), a record in {1000 * record:.0f} ms"
    if speed < SLOW_BYTES or record > SLOW_SECONDS:
        means = "The teacher may have to wait for it"
        do = "Choose a faster place, or raise storage.commit_rows and commit_seconds"
        return warning("write speed", found, means, do)
    return ok("write speed", found, "A rough figure of one trial")


def _free(name: str, folder: Path, means: str) -> Finding:
    """With what it is enough for: the table of kinds says about what a token takes."""
    left = shutil.disk_usage(folder).free
    kind = KINDS["topk"]
    tokens = left / (64 * kind.bytes_per_entry + kind.bytes_per_token)
    found = f"{size(left)}, about {human(tokens, digits=0)} scored tokens of topk, k: 64"
    do = "`stillroom plan RECIPE` says what yours takes"
    if left < LITTLE_BYTES:
        return warning(
            name, found, means or "A run ends where the disk is full, and goes on later", do
        )
    return ok(name, found, means, do)
