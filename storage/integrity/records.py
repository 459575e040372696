"""Records beside the tables, checked against their own hashes.

These are the records of inputs, teachers, bindings, engines and snapshots.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from ..bounds import mapping, parsed
from ..errors import IntegrityError, UsageError
from ..files.base import Files
from ..keys import content_id, unseal
from ..snapshots.snapshot import SnapshotShard, load_snapshot
from ..store.bindings import ENGINES, bound_engine
from ..store.inputs import inputs_name, read_inputs
from ..store.served import SERVED
from ..store.store import MARKER, TEACHER_FILES, Store
from ..tables.shard import ShardFile, ShardInfo
from .matrices import matrix_problems
from .shards import Problem, shard_problems

# Proved by what the identity says of them, where their hashes are not recorded.
_PROVED = (
    "identity.json",
    "config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)


@dataclass(frozen=True, slots=True)
class Seen:
    """What the checks so far have met."""

    named: set[str] = field(default_factory=lambda: {MARKER})
    """Files that a record names, and the records."""
    sound: dict[str, ShardInfo] = field(default_factory=dict)
    """Shards without a problem, by name."""
    damaged: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)
    """What cannot be checked."""


def kept_problems(store: Store, seen: Seen) -> Iterator[Problem]:
    """Everything that is wrong with it; the tables must have been seen."""
    yield from _inputs_problems(store.files, seen)
    yield from _teacher_problems(store.files, seen)
    yield from _binding_problems(store.files, seen)
    yield from _engine_problems(store.files, seen)
    yield from _snapshot_problems(store, seen)
    yield from matrix_problems(store.files, seen.named, seen.sound)


def _inputs_problems(files: Files, seen: Seen) -> Iterator[Problem]:
    for file in files.names("inputs"):
        data_id = file.removesuffix(".json")
        name = inputs_name(data_id)
        seen.named.add(name)
        try:
            inputs = read_inputs(files, data_id)
        except (IntegrityError, KeyError, TypeError) as error:
            yield Problem(name, None, None, str(error), (name,))
            continue
        if inputs is not None:
            seen.named.add(inputs.shard.name)
            yield from shard_problems(files, inputs.shard, inputs.schema, mend=name)


def _teacher_problems(files: Files, seen: Seen) -> Iterator[Problem]:
    """What is wrong with the folders of teachers.

    A teacher's id is the hash of `identity.json`; `files.json` has the hash of every file.
    """
    folders: dict[str, set[str]] = {}  # names of the files in each
    for name, _, _ in files.walk("teachers"):
        path = PurePosixPath(name)
        if not path.name.startswith("."):
            folders.setdefault(str(path.parent), set()).add(path.name)
    for folder, names in folders.items():
        if not names & {"identity.json", TEACHER_FILES}:
            continue  # its writer was stopped: it does not count yet
        seen.named.update(f"{folder}/{name}" for name in names)
        mend = tuple(f"{folder}/{n}" for n in ("identity.json", TEACHER_FILES) if n in names)
        found: dict[str, str] = {}  # what is wrong with each; the first of several
        for name, message in _folder_problems(files, folder, names, seen.notes):
            found.setdefault(name, message)
        for name, message in found.items():
            there = () if name not in names else (f"{folder}/{name}",)
            yield Problem(f"{folder}/{name}", None, None, message, tuple({*mend, *there}))


def _folder_problems(
    files: Files, folder: str, names: set[str], notes: list[str]
) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of one teacher's folder."""
    parts = _parts(files, folder)
    if parts is None:
        yield "identity.json", "the identity is missing, or not the one its folder is named by"
        return
    if TEACHER_FILES in names:
        if recorded := [*_recorded_problems(files, folder, names, parts)]:
            yield from recorded
            return
    else:
        notes.append(
            f"{folder}: stored before the hashes of its files were; what identity.json does not "
            "say is not checked"
        )
    yield from _file_problems(files, folder, names, parts)


def _parts(files: Files, folder: str) -> dict[str, Any] | None:
    """What the identity is made of; None: it is not that teacher's."""
    try:
        parts = mapping(parsed(files.read(f"{folder}/identity.json")))
        mapping(parts.get("tokenizer", {}))
        right = content_id("model", **parts) == PurePosixPath(folder).name
    except (FileNotFoundError, ValueError, TypeError):
        return None
    return parts if right else None


def _recorded_problems(
    files: Files, folder: str, names: set[str], parts: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    record = f"{folder}/{TEACHER_FILES}"
    try:
        hashes = mapping(unseal(files.read(record), record)["files"])
    except (IntegrityError, KeyError, ValueError) as error:
        yield TEACHER_FILES, str(error)
        return
    for name, sha256 in hashes.items():
        if name not in names:
            yield name, "the file is missing"
        elif files.sha256(f"{folder}/{name}") != sha256:
            yield name, f"the file's sha256 is not the one in {TEACHER_FILES}"
    served = {name for name in names if name.startswith(SERVED)}
    for name in served:
        try:
            unseal(files.read(f"{folder}/{name}"), f"{folder}/{name}")
        except IntegrityError as error:
            yield name, str(error)
    known = {TEACHER_FILES, *hashes, *_PROVED, *parts.get("tokenizer", {}), *served}
    for name in sorted(names - known):
        yield name, f"{TEACHER_FILES} does not name this file, and a tokenizer may read it"


def _file_problems(
    files: Files, folder: str, names: set[str], parts: dict[str, Any]
) -> Iterator[tuple[str, str]]:
    """(file, what is wrong) of the files kept beside an identity.

    A file is asked for its hash where the identity has one, else for its content.
    """
    hashes = {name: h for name, h in parts.get("tokenizer", {}).items() if name != "config"}
    for name, sha256 in hashes.items():
        if name not in names:
            yield name, "the file is missing"
        elif files.sha256(f"{folder}/{name}") != sha256:
            yield name, "the file's sha256 is not the one in identity.json"
    expected = {
        "config.json": parts.get("config"),
        "tokenizer_config.json": parts.get("tokenizer", {}).get("config"),
    }
    if "generation_config.json" in names:
        expected["generation_config.json"] = {"eos_token_id": parts.get("end_tokens")}
    for name, content in expected.items():
        if content and not _holds(files, folder, name, content):
            yield name, "the file does not say what identity.json says of it"
    name, template = _template(files, folder, names)
    if template != parts.get("chat_template"):
        yield name, "the template is not the one in identity.json"


def _template(files: Files, folder: str, names: set[str]) -> tuple[str, Any]:
    """(the file that has it, a teacher's chat template), as an identity reads it."""
    if "chat_template.jinja" in names:
        return "chat_template.jinja", _text(files, f"{folder}/chat_template.jinja")
    name = "tokenizer_config.json"
    try:
        return name, mapping(parsed(files.read(f"{folder}/{name}"))).get("chat_template")
    except (FileNotFoundError, ValueError, AttributeError):
        return name, None


def _holds(files: Files, folder: str, name: str, content: dict[str, Any]) -> bool:
    try:
        return _within(content, parsed(files.read(f"{folder}/{name}")))
    except (FileNotFoundError, ValueError):
        return False


def _within(content: Any, found: Any) -> bool:
    """Whether all that an identity says is there.

    What no identity holds (paths, versions) may stand beside it.
    """
    if isinstance(content, dict) and isinstance(found, dict):
        # A name that is left out says None, as of a model without an end token.
        return all(_within(part, found.get(name)) for name, part in content.items())
    if isinstance(content, list) and isinstance(found, list):
        return len(content) == len(found) and all(map(_within, content, found))
    return bool(content == found)


def _text(files: Files, name: str) -> str:
    return files.read(name).decode(errors="replace").replace("\r\n", "\n")


def _binding_problems(files: Files, seen: Seen) -> Iterator[Problem]:
    """A damaged one takes its whole folder along: the one before it must not count in its place."""
    names = [
        name
        for name, _, _ in files.walk("bindings")
        if not PurePosixPath(name).name.startswith(".")
    ]
    for name in names:
        seen.named.add(name)
        try:
            unseal(files.read(name), name)
        except IntegrityError as error:
            folder = PurePosixPath(name).parent
            together = tuple(other for other in names if PurePosixPath(other).parent == folder)
            yield Problem(name, None, None, str(error), together)


def _engine_problems(files: Files, seen: Seen) -> Iterator[Problem]:
    """Where one is taken away, the next worker decides again."""
    for file in files.names(ENGINES):
        name = f"{ENGINES}/{file}"
        seen.named.add(name)
        try:
            bound_engine(files, file.removesuffix(".json"))
        except IntegrityError as error:
            yield Problem(name, None, None, str(error), (name,))


def _snapshot_problems(store: Store, seen: Seen) -> Iterator[Problem]:
    for file in store.files.names("snapshots"):
        name = f"snapshots/{file}"
        seen.named.add(name)
        try:
            snapshot = load_snapshot(store, file.removesuffix(".json"))
        except UsageError as error:  # long, and of sources
            seen.notes.append(str(error))
            continue
        except (IntegrityError, KeyError, TypeError, ValueError) as error:
            yield Problem(name, None, None, str(error), (name,))
            continue
        for shard in snapshot.shards:
            if shard.source:  # read only, and not this store's to prove
                continue
            seen.named.add(shard.name)
            last = int(shard.rows[-1]) if len(shard.rows) else -1
            if problem := _chosen_problem(store.files, shard, seen):
                yield Problem(name, None, None, f"its shard {shard.name} {problem}")
            elif last >= sum(shard.row_groups):
                message = f"it names row {last} of {shard.name}, which has fewer"
                yield Problem(name, None, None, message)


def _chosen_problem(files: Files, shard: SnapshotShard, seen: Seen) -> str | None:
    """What is wrong with a shard that a snapshot names.

    Live shards are checked already, withdrawn ones are not.
    """
    name, row_groups = shard.name, shard.row_groups
    if name in seen.damaged:
        return "is damaged"
    if name in seen.sound:
        return None if seen.sound[name].row_groups == row_groups else "has other row groups"
    try:
        if files.sha256(name) != shard.sha256:
            return "is damaged"
        if ShardFile(files, name).rows_per_group != row_groups:
            return "has other row groups"
    except FileNotFoundError:
        return "is missing"
    seen.sound[name] = ShardInfo(name, shard.sha256, files.size(name), sum(row_groups), row_groups)
    return None
