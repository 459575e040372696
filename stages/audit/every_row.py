"""Every shard of what is about to be learnt from or judged on, checked once on each machine.

Each row by itself (`storage/integrity/checked.py`), and whether the first rows of a shard have
their own targets: what is moved by a row or a position may agree with itself in every row.
"""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import numpy as np

from ...storage.errors import IntegrityError
from ...storage.integrity.checked import HELP, Held, Memory, check_file, files_of, held
from ...storage.integrity.matrices import check_matrices
from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ...storage.tables.heads import head_of
from ...storage.tables.rows import Rows
from ...storage.tables.schema import TableName
from ...storage.tables.shard import ShardFile, StoredFile
from ...storage.words import counted
from ..models.inputs.reads import check_ids
from ..workers.job import Job
from .misplaced_targets import Row, shifted

ROWS = 32
"""Of a shard, that are asked whose targets they have."""
VALUES = 1 << 22
"""Numbers after which no more rows are asked: whole distributions have as many in a few."""
_ASKED_AT_ONCE = 8  # files: on an object store each is a round trip


def check_rows(
    store: Store, snapshots: Sequence[Snapshot], job: Job, *, lenient: bool = False
) -> dict[str, Held]:
    """Check the files that this machine has not checked yet.

    With `lenient`, numbers that cannot be a teacher's are reported, and the check goes on. Rows
    that cannot be read are refused.

    Returns:
        What is known of each file, by its hash.

    Raises:
        IntegrityError: a row cannot be right; names file, row and column. Or a matrix that rows
            name is not there as they say.
        Stopped: a signal came. What was checked by then is remembered.
    """
    memory = Memory.of_user()
    files = _files(store, snapshots)
    known, fresh = {}, []
    with job.clock.span("disk"), ThreadPoolExecutor(_ASKED_AT_ONCE) as pool:
        before = list(pool.map(lambda one: held(one[0], one[1], memory), files))
    for (file, table), found in zip(files, before, strict=True):
        if found is None:
            fresh.append((file, table))
        else:
            known[file.sha256] = found
    if fresh:
        job.progress.start(total=len(fresh), unit="shards")
    rows, said = 0, []
    for file, table in fresh:
        with job.clock.span("disk"):
            found, doubt = check_file(file, table, memory, lenient=lenient)
        known[file.sha256] = found
        rows += found.rows
        said += [doubt] if doubt else []
        job.progress.advance(note="checking every row, once on this machine")
        job.stop.check()
    if fresh:
        again = len(files) - len(fresh)
        job.progress.say(
            f"checked {counted(len(fresh), 'shard')}, {counted(rows, 'row')}"
            + (f"; checked before: {counted(again, 'shard')}" if again else "")
        )
    for snapshot in snapshots:
        if snapshot.table == "features":
            check_matrices(store, snapshot)
    _say(said, job)
    return known


def _files(store: Store, snapshots: Sequence[Snapshot]) -> list[tuple[StoredFile, TableName]]:
    """The files of all, each once: splits share shards."""
    found: dict[tuple[str, str], tuple[StoredFile, TableName]] = {}
    for snapshot in snapshots:
        for file in files_of(store, snapshot):
            found.setdefault((file.name, file.sha256), (file, snapshot.table))
    return list(found.values())


def check_vocabulary(
    store: Store, snapshot: Snapshot, known: dict[str, Held], *, vocab_size: int
) -> None:
    """Refuse texts with a token that the student does not have.

    A shard may hold rows that this student is not to learn from: they are asked only where the
    whole has a higher id.

    Raises:
        UsageError: a row has one; names it.
    """
    for part in snapshot.shards:
        files = store.stored(snapshot.table, part.sha256)
        if max(known[file.sha256].highest for file in files) < vocab_size:
            continue
        rows = Rows(
            store.shard(snapshot.table, part.sha256).select(part.rows, ["key", "token_ids"])
        )
        offsets, ids = rows.flat("token_ids")
        if not (ids >= vocab_size).any():
            continue
        first = int((ids >= vocab_size).argmax())
        row = int(np.searchsorted(offsets, first, side="right")) - 1
        where = f" (row {part.rows[row]} of {part.name}, {rows.value('key', row).hex()})"
        check_ids(int(ids[first]), vocab_size, "the text has", where=where)


def check_places(
    store: Store, snapshots: Sequence[Snapshot], job: Job, *, lenient: bool = False
) -> None:
    """Ask the first rows of each shard that this machine has not asked yet whose targets they have.

    It is to be called after `check_rows`. `lenient`: say what is found, and go on.

    Raises:
        IntegrityError: they have those of the position or the row beside their own; names the file.
    """
    memory, said = Memory.of_user(), []
    for file in chain.from_iterable(files_of(store, one) for one in snapshots):
        name = f"place {file.sha256}"
        if memory.known(name):
            continue
        job.stop.check()
        with job.clock.span("disk"):
            opened = file.open()
        head = head_of(opened.about)
        rows = [] if head.whole_text else list(_first_rows(opened))
        if found := shifted(rows, head):
            said.append(
                f"{file.files.root}/{file.name}: rows 0 to {len(rows) - 1} (from "
                f"{rows[0]['key'].hex()} on): the targets are {found}. Expected each position's "
                "own."
            )
        else:
            memory.keep(name, "own")
        if said and not lenient:
            raise IntegrityError(
                f"{said[0]} {HELP} If the rows are meant as they are, set train.audit: warn."
            )
    _say(said, job)


def _say(said: Sequence[str], job: Job) -> None:
    more = f" ({counted(len(said) - 1, 'more shard')})" if len(said) > 1 else ""
    if said:
        job.progress.say(f"audit: {said[0]}{more}")


def _first_rows(shard: ShardFile) -> Iterator[Row]:
    values = 0
    for row in shard.take(range(min(ROWS, shard.rows))):
        yield row
        values += sum(len(row[name]) for name in ("logprobs", "ids") if row[name] is not None)
        if values > VALUES:
            return
