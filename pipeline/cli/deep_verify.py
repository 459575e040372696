"""`verify --deep` finds the teacher whose rows are read again, and tells what was found.

It is told for people and for programs.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from ...stages.audit.stored_rows import TargetShard, choose_rows, target_shards
from ...stages.ledger.books import different
from ...stages.models.fit.quantized import WHILE_LOADING, refuse_unquantized
from ...stages.models.identity import Identity, find_model, identify
from ...stages.recipe.kinds import HF
from ...stages.workers.job import Progress
from ...storage.errors import UsageError
from ...storage.store.hashes import FileHashes
from ...storage.store.store import Store
from ...storage.words import counted, some_are
from ..plan.resolve import find_adapter

if TYPE_CHECKING:
    from ...stages.audit.features import FeaturesRead, OffFeature
    from ...stages.audit.rescore import OffRow, Rescored

SHOWN = 20
_DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True, kw_only=True, slots=True)
class DeepRequest:
    """What is asked for."""

    teacher: str
    """Folder or Hub id."""
    revision: str | None = None
    dtype: str | None = None
    """None: as the checkpoint is stored, or as a teacher of the store had it."""
    adapter: str | None = None
    quantize: str | None = None
    """How its float weights are quantised while they are loaded; None: as a teacher of the store
    had it."""
    device_map: str | None = None
    rows: int = 32
    seed: int = 0


def deeply(teacher: str | None, **how: Any) -> DeepRequest:
    """The options of a command line.

    `teacher` is None where `--deep` and `--teacher` do not come together.

    Raises:
        UsageError: they do not, or there is no such dtype or quantisation.
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
    if how.get("quantize") not in (None, *WHILE_LOADING):
        raise UsageError(
            f"--quantize: {how['quantize']} is none. Use {', '.join(WHILE_LOADING)}, or leave it "
            "out."
        )
    return DeepRequest(teacher=teacher, **how)


def find_teacher(store: Store, asked: DeepRequest) -> Identity:
    """The teacher that is named, if the store has rows of it.

    Raises:
        UsageError: it is not there, or the store has rows of others only.
    """
    rows = _rows_by_teacher(target_shards(store))
    if not rows:
        raise UsageError(
            f"{store.root}: no soft targets, so there is nothing to read again. Run a recipe's "
            "score first."
        )
    folder = find_model(asked.teacher, asked.revision, field="--teacher", download=True)
    adapter = None if asked.adapter is None else find_adapter(asked.adapter, field="--adapter")
    hashes = FileHashes(store.root, remember=False)
    known = {teacher: store.teacher_parts(teacher) for teacher in rows}
    tried = []
    for how in _how_loaded(known.values(), asked):
        found = identify(folder, **how, hashes=hashes, adapter=adapter, field="--teacher")
        if found.id in rows:
            refuse_unquantized(folder, found.quantize, field="--teacher", name=asked.teacher)
            return found
        tried.append(found)
    others = "\n".join(
        f"  {teacher}: {counted(rows[teacher], 'row')}, {_how_other(tried, known[teacher])}"
        for teacher in sorted(rows)
    )
    raise UsageError(
        f"--teacher: {asked.teacher} is {tried[0].id}, and the store has no soft targets of it. "
        f"It has those of\n{others}\n"
        "Name one of these: its folder, and --adapter, --dtype and --quantize as they were."
    )


def _how_loaded(known: Iterable[dict[str, Any]], asked: DeepRequest) -> list[dict[str, Any]]:
    """Dtype and quantisation to be tried, which are both parts of an identity.

    What the checkpoint says comes first, then what the store has.
    """
    parts = list(known)
    stored = sorted({str(part["dtype"]) for part in parts if "dtype" in part})
    named = {
        str(how["name"]) for part in parts if isinstance(how := part.get("quantization"), dict)
    }
    quantized = [None, *sorted(named & WHILE_LOADING.keys())]
    return [
        {"dtype": dtype, "quantize": quantize}
        for quantize in (quantized if asked.quantize is None else [asked.quantize])
        for dtype in (["auto", *stored] if asked.dtype is None else [asked.dtype])
    ]


def deep_verify(
    store: Store,
    teacher: Identity,
    asked: DeepRequest,
    *,
    progress: Progress,
    damaged: Collection[str] = (),
) -> "Rescored":
    """Read a random sample of the teacher's rows again; `damaged`: files of shards to be left out.

    Raises:
        UsageError: there is none that could be read.
    """
    shards = target_shards(store, damaged=damaged)
    mine = [shard for shard in shards if shard.teacher_id == teacher.id]
    placed = [shard for shard in mine if not shard.head.whole_text]
    classes = _count(shard for shard in mine if shard.head.whole_text)
    broken = sum(commit.shard.rows for commit in store.commits("soft_targets")) - _count(shards)
    rows = choose_rows(store, placed, rows=asked.rows, seed=asked.seed)
    from ...stages.audit.features import choose_features, read_again
    from ...stages.audit.matrices import stored_matrices

    features = choose_features(store, teacher.id, rows=asked.rows, seed=asked.seed, damaged=damaged)
    matrices = stored_matrices(store, teacher.id)
    if not rows and not features and not matrices:
        raise UsageError(
            "verify --deep: none of this teacher's rows can be read again, so nothing is known "
            f"of its targets ({classes} are of a classification head, {broken} of the store's are "
            "in damaged shards). Leave --deep out to check the files alone."
        )
    from ...stages.audit.rescore import Rescored, rescore

    found = Rescored.nothing(teacher)
    if rows:
        found = rescore(teacher, rows, device_map=asked.device_map, progress=progress)
    if features or matrices:
        read = read_again(
            teacher,
            features,
            device_map=asked.device_map,
            progress=progress,
            matrices=matrices,
        )
        found = replace(found, features=read)
    others = _rows_by_teacher(shards)
    others.pop(teacher.id, None)
    return replace(found, other_teachers=dict(others), classes=classes, damaged=broken)


def deep_lines(found: "Rescored") -> list[str]:
    """What was found, for people."""
    lines = [*_read_lines(found), *(_quantity_lines(found) if found.rows else ())]
    lines += [f"PROBLEM {_problem(row)}" for row in found.off[:SHOWN]]
    if len(found.off) > SHOWN:
        lines.append(f"... and {len(found.off) - SHOWN} more")
    if found.features is not None:
        lines += _feature_lines(found.features)
    if found.ok:
        return [*lines, "what was read again is what the teacher says"]
    return [
        *lines,
        f"{_how_many(found)}. Do not train on this store: score the prompts again into another one "
        "(storage.dir).",
    ]


def deep_json(found: "Rescored") -> dict[str, Any]:
    """What was found, for programs."""
    return {
        "ok": found.ok,
        "dtype": found.teacher.dtype,
        "quantized": found.teacher.quantized,
        "teacher_id": found.teacher.id,
        "rows": found.rows,
        "tokens": found.tokens,
        "kinds": found.kinds,
        "imported": found.imported,
        "engines": found.engines,
        "quantities": {name: asdict(quantity) for name, quantity in found.quantities.items()},
        "off": [asdict(row) for row in found.off],
        "not_read": {
            "other_teachers": found.other_teachers,
            "classes": found.classes,
            "damaged": found.damaged,
        },
    } | ({"features": asdict(found.features)} if found.features else {})


def _how_many(found: "Rescored") -> str:
    """Of what was read, how much is off."""
    features = found.features
    off: list[OffRow | OffFeature] = [*found.off, *(features.off if features else ())]
    counts = Counter[str](row.fault for row in off).most_common()
    faults = ", ".join(f"{count} {fault}" for fault, count in counts)
    rows = found.rows + (features.rows if features else 0)
    what = some_are(len(off), rows, "row")
    said = [f"{what} not what the teacher says ({faults})"] if off else []
    matrices = features.matrices if features else []
    if wrong := sum(matrix.off > 0 for matrix in matrices):
        what = some_are(wrong, len(matrices), "matrix", "matrices")
        said.append(f"{what} not what the teacher has")
    return ", ".join(said)


def _read_lines(found: "Rescored") -> list[str]:
    """What was read and what was not."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in found.kinds.items())
    read = f"{counted(found.rows, 'row')} ({kinds}), {counted(found.tokens, 'scored token')}"
    lines = [f"read again: {read}, by {found.teacher.folder}"] if found.rows else []
    if others := {engine: rows for engine, rows in found.engines.items() if engine != HF}:
        made = " and ".join(f"{rows} by {engine}" for engine, rows in others.items())
        lines.append(f"engines compared: {made}, read again by {HF}")
    if found.imported:
        lines.append(
            f"imported: {found.imported} of these rows; of them only the entries are compared, "
            "for the entropy, the tail and tokens outside the entries are bounds"
        )
    lines += [
        f"not read: {counted(count, 'row')} of the teacher {other}"
        for other, count in sorted(found.other_teachers.items())
    ]
    if found.classes:
        lines.append(
            f"not read: {counted(found.classes, 'row')} of a classification head, which deep "
            "verification does not know"
        )
    if found.damaged:
        lines.append(f"not read: {counted(found.damaged, 'row')} of shards that are damaged")
    return lines


def _feature_lines(found: "FeaturesRead") -> list[str]:
    """What was read of features, and the rows that are off."""
    lines = []
    if found.rows:
        lines.append(
            f"features: {counted(found.rows, 'row')} read again; those that are right are off by "
            f"{found.worst:.2g} at most, relative, rounding included"
        )
    if found.without_text:
        lines.append(
            f"not read: {counted(found.without_text, 'row')} of features whose text is gone"
        )
    for row in found.off[:SHOWN]:
        where = f"{row.shard}, row {row.row} ({row.key}, {row.kind} of layer {row.layer})"
        lines.append(
            f"PROBLEM {where}: off by {row.error:.3g}, relative (allowed {row.allowed:.2g}). Its "
            f"states are {row.message}"
        )
    if len(found.off) > SHOWN:
        lines.append(f"... and {len(found.off) - SHOWN} more")
    if found.matrices:
        named = Counter(one.what for one in found.matrices)
        lines.append(f"matrices compared: {', '.join(f'{n} {what}' for what, n in named.items())}")
    lines += [
        f"PROBLEM {one.file} ({one.what}): {one.off} numbers are off: {one.message}"
        for one in found.matrices
        if one.off
    ]
    return lines


def _quantity_lines(found: "Rescored") -> list[str]:
    """A table of what was compared."""
    lines = [f"{'nats':<16}{'worst':>11}{'allowed':>11}{'mean':>11}{'noise':>11}"]
    for name, of in found.quantities.items():
        allowed = of.tolerance_worst + of.slack_worst
        numbers = (of.worst, allowed, of.mean, of.noise_worst)
        lines.append(f"{name:<16}" + "".join(f"{number:>11.2g}" for number in numbers))
    return lines


def _problem(row: "OffRow") -> str:
    apart = ", ".join(f"{name} {mean:.3g}" for name, mean in row.quantities.items())
    where = f"{row.shard}, row {row.row} ({row.key}, {row.kind})"
    return f"{where}: off by {apart} nats in the mean. Its targets are {row.message}"


def _rows_by_teacher(shards: Sequence[TargetShard]) -> Counter[str]:
    rows: Counter[str] = Counter()
    for shard in shards:
        rows[shard.teacher_id] += sum(shard.rows.values())
    return rows


def _count(shards: Iterable[TargetShard]) -> int:
    return sum(sum(shard.rows.values()) for shard in shards)


def _how_other(tried: Sequence[Identity], parts: dict[str, Any]) -> str:
    """How a teacher of the store differs from the nearest of those that were tried."""
    if not parts:
        return "about which the store knows nothing"
    if "endpoint" in parts:
        return (
            "of an endpoint, which reads no text again: `verify` without --deep checks all that "
            "can be"
        )
    return "with other " + min((different(identity.parts, parts) for identity in tried), key=len)
