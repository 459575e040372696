"""`verify --deep`: finding the teacher whose rows are read again, and what was found, for people and for programs."""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ...stages.audit.rescore import OffRow, Rescored, rescore
from ...stages.audit.stored_rows import Shelf, choose_rows, shelves
from ...stages.ledger.books import different
from ...stages.models.identity import FileHashes, Identity, find_model, identify
from ...stages.workers.job import Progress
from ...storage.errors import UsageError
from ...storage.store.store import Store
from ..plan.resolve import find_adapter

SHOWN = 20
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class Deep:
    """What is asked for."""

    teacher: str
    """Folder or Hub id."""
    revision: str | None = None
    dtype: str | None = None
    """None: as the checkpoint is stored, or as a teacher of the store had it."""
    adapter: str | None = None
    device_map: str | None = None
    rows: int = 32
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepReport:
    """What was found, and what was not looked at."""

    teacher: Identity
    found: Rescored
    others: dict[str, int]
    """Other teachers -> their rows."""
    classes: int
    """Rows of a classification head."""
    damaged: int
    """Rows of shards that are damaged."""

    @property
    def ok(self) -> bool:
        """Whether what was read is right."""
        return self.found.ok


def deeply(teacher: str | None, **how: Any) -> Deep:
    """The options of a command line; `teacher` is None where `--deep` and `--teacher` do not come together.

    Raises:
        UsageError: they do not, or the dtype is none.
    """
    if teacher is None:
        raise UsageError(
            "verify: --deep and --teacher MODEL go together, and the options about a teacher "
            "need them. Give both, or none of them."
        )
    if how.get("dtype") not in (None, *_DTYPES):
        raise UsageError(
            f"--dtype: {how['dtype']} is no dtype of a teacher. Use {', '.join(_DTYPES)}, or "
            "leave it out."
        )
    return Deep(teacher=teacher, **how)


def find_teacher(store: Store, asked: Deep) -> Identity:
    """The teacher that is named, if the store has rows of it.

    Raises:
        UsageError: it is not there, or the store has rows of others only.
    """
    rows = _rows_by_teacher(shelves(store))
    if not rows:
        raise UsageError(
            f"{store.root}: no soft targets, so there is nothing to read again. Run a recipe's "
            "score first."
        )
    folder = find_model(asked.teacher, asked.revision, field="--teacher", download=True)
    adapter = None if asked.adapter is None else find_adapter(asked.adapter, field="--adapter")
    hashes = FileHashes(store.root, remember=False)
    known = {teacher: store.teacher_parts(teacher) for teacher in rows}
    stored = sorted({str(parts["dtype"]) for parts in known.values() if "dtype" in parts})
    tried = []
    for dtype in ["auto", *stored] if asked.dtype is None else [asked.dtype]:
        tried.append(
            identify(folder, dtype=dtype, hashes=hashes, adapter=adapter, field="--teacher")
        )
        if tried[-1].id in rows:
            return tried[-1]
    lines = [
        f"  {teacher}: {rows[teacher]} rows, {_how_other(tried, known[teacher])}"
        for teacher in sorted(rows)
    ]
    raise UsageError(
        f"--teacher: {asked.teacher} is {tried[0].id}, and the store has no soft targets of it. It has those of\n"
        + "\n".join(lines)
        + "\nName one of these: its folder, and --adapter and --dtype as they were."
    )


def deep_verify(
    store: Store,
    teacher: Identity,
    asked: Deep,
    *,
    progress: Progress,
    damaged: Collection[str] = (),
) -> DeepReport:
    """Read a random sample of the teacher's rows again; `damaged`: files of shards to be left out.

    Raises:
        UsageError: there is none that could be read.
    """
    found = shelves(store, damaged=damaged)
    mine = [shelf for shelf in found if shelf.teacher_id == teacher.id]
    language = [shelf for shelf in mine if shelf.head == "lm"]
    classes = _count(shelf for shelf in mine if shelf.head != "lm")
    broken = sum(commit.shard.rows for commit in store.commits("soft_targets")) - _count(found)
    rows = choose_rows(store, language, rows=asked.rows, seed=asked.seed)
    if not rows:
        raise UsageError(
            "verify --deep: none of this teacher's rows can be read again, so nothing is known "
            f"of its targets ({classes} are of a classification head, {broken} of the store's are "
            "in damaged shards). Leave --deep out to check the files alone."
        )
    others = _rows_by_teacher(found)
    others.pop(teacher.id, None)
    rescored = rescore(store, teacher, rows, device_map=asked.device_map, progress=progress)
    return DeepReport(
        teacher=teacher, found=rescored, others=dict(others), classes=classes, damaged=broken
    )


def deep_lines(report: DeepReport) -> list[str]:
    """What was found, for people."""
    found, teacher = report.found, report.teacher
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items())
    lines = [
        f"read again: {found.rows} rows ({kinds}), {found.tokens} scored tokens, by {teacher.folder}"
    ]
    if found.imported:
        lines.append(
            f"imported: {found.imported} of these rows; of them only the entries are compared, "
            "for the entropy, the tail and tokens outside the entries are bounds"
        )
    lines += [
        f"not read: {count} rows of the teacher {other}"
        for other, count in sorted(report.others.items())
    ]
    if report.classes:
        lines.append(
            f"not read: {report.classes} rows of a classification head, which deep verification "
            "does not know"
        )
    if report.damaged:
        lines.append(f"not read: {report.damaged} rows of shards that are damaged")
    if found.quantities:
        lines.append(f"{'nats':<16}{'worst':>11}{'allowed':>11}{'mean':>11}{'noise':>11}")
    for name, q in found.quantities.items():
        allowed = q.tolerance_worst + q.slack_worst
        lines.append(
            f"{name:<16}{q.worst:>11.2g}{allowed:>11.2g}{q.mean:>11.2g}{q.noise_worst:>11.2g}"
        )
    lines += [f"PROBLEM {_problem(row)}" for row in found.off[:SHOWN]]
    if len(found.off) > SHOWN:
        lines.append(f"... and {len(found.off) - SHOWN} more")
    if found.ok:
        return [*lines, "what was read again is what the teacher says"]
    faults = ", ".join(
        f"{count} {fault}" for fault, count in Counter(row.fault for row in found.off).most_common()
    )
    return [
        *lines,
        f"{len(found.off)} of {found.rows} rows are not what the teacher says ({faults}). Do not "
        "train on this store: score the prompts again into another one (storage.dir).",
    ]


def deep_json(report: DeepReport) -> dict[str, Any]:
    """What was found, for programs."""
    left_out = {
        "other_teachers": report.others,
        "classes": report.classes,
        "damaged": report.damaged,
    }
    return {
        "ok": report.ok,
        "dtype": report.teacher.dtype,
        **asdict(report.found),
        "not_read": left_out,
    }


def _problem(row: OffRow) -> str:
    apart = ", ".join(f"{name} {mean:.3g}" for name, mean in row.quantities.items())
    where = f"{row.shard}, row {row.row} ({row.key}, {row.kind})"
    return f"{where}: off by {apart} nats in the mean. Its targets are {row.message}"


def _rows_by_teacher(found: Sequence[Shelf]) -> Counter[str]:
    rows: Counter[str] = Counter()
    for shelf in found:
        rows[shelf.teacher_id] += sum(shelf.rows.values())
    return rows


def _count(found: Iterable[Shelf]) -> int:
    return sum(sum(shelf.rows.values()) for shelf in found)


def _how_other(tried: Sequence[Identity], parts: dict[str, Any]) -> str:
    if not parts:
        return "about which the store knows nothing"
    return "with other " + min((different(identity.parts, parts) for identity in tried), key=len)
