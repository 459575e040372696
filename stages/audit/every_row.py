"""Every row of what is about to be learnt from or judged on, once on each machine (`storage/integrity/checked.py`)."""

from collections.abc import Sequence

import numpy as np

from ...storage.integrity.checked import Held, Memory, check_file, files_of, held
from ...storage.snapshots.snapshot import Snapshot
from ...storage.store.store import Store
from ...storage.tables.rows import Rows
from ..models.reads import check_ids
from ..workers.job import Job


def check_rows(
    store: Store, snapshots: Sequence[Snapshot], job: Job, *, lenient: bool = False
) -> dict[str, Held]:
    """Check the files that this machine has not checked yet; what is known of each, by name.

    `lenient`: say what cannot be a teacher's numbers and go on; rows that cannot be read are refused.

    Raises:
        IntegrityError: a row cannot be right; names file, row and column.
        Stopped: a signal came. What was checked by then is remembered.
    """
    memory = Memory.of_user()
    files = [(file, each.table) for each in snapshots for file in files_of(store, each)]
    with job.clock.span("disk"):
        known = {file.name: held(file, table, memory) for file, table in files}
    fresh = [(file, table) for file, table in files if known[file.name] is None]
    if fresh:
        job.progress.start(total=len(fresh), unit="shards")
    rows, said = 0, []
    for file, table in fresh:
        with job.clock.span("disk"):
            found, doubt = check_file(file, table, memory, lenient=lenient)
        known[file.name] = found
        rows += found.rows
        said += [doubt] if doubt else []
        job.progress.advance(note="checking every row, once on this machine")
        job.stop.check()
    if fresh:
        before = len(files) - len(fresh)
        job.progress.say(
            f"checked {len(fresh)} shards, {rows} rows"
            + (f"; {before} shards were checked before" if before else "")
        )
    if said:
        job.progress.say(f"audit: {said[0]}" + f" ({len(said) - 1} more shards)" * (len(said) > 1))
    return {name: one for name, one in known.items() if one is not None}


def check_vocabulary(
    store: Store, snapshot: Snapshot, known: dict[str, Held], *, vocab_size: int
) -> None:
    """Refuse texts with a token that the student does not have.

    A shard may hold rows that this student is not to learn from: they are asked only where the whole
    has a higher id.

    Raises:
        UsageError: a row has one; names it.
    """
    for part in snapshot.shards:
        files = store.stored(snapshot.table, part.sha256)
        if max(known[file.name].highest for file in files) < vocab_size:
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
