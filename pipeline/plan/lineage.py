"""Where a teacher comes from that is itself a student of Stillroom: what it began as, and who taught it.

It is read in the folder of the run that trained it, whatever the recipe calls that folder, and kept
beside the teacher's small files in the store: cards are written when that run may be gone. It is in
no hash, for a teacher is its weights.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

from ...stages.models.fit.files import read_json
from ...stages.models.identity import Identity, find_model
from ...stages.recipe.checks.task import lookup
from ...stages.recipe.run_folder import RUN, SETTINGS, STUDENT, named_run, read_record
from ...stages.recipe.sections import Recipe
from ...storage.bounds import mapping
from ...storage.credentials import shown
from ...storage.errors import IntegrityError, UsageError
from ...storage.keys import canonical_json
from ..text import inline, public_name

LINEAGE = "lineage.json"


class Generation(TypedDict):
    """One run that made a student; names are public ones."""

    run: str
    start: str | None
    """The model that it began as; None: fresh weights, or layers of its teacher."""
    teacher: str


def lineage(folder: Path) -> list[Generation]:
    """The generations behind a model's folder, the latest first; none where no run of Stillroom trained it."""
    training = folder.parent
    if folder.name != STUDENT or not (training / SETTINGS).is_file():
        return []
    try:
        settings = read_record(training / SETTINGS)
        recipe = mapping(settings["recipe"])
        start, teacher = mapping(recipe["student"])["model"], mapping(recipe["teacher"])["model"]
        earlier = _checked(settings.get("lineage", []))
    except (IntegrityError, LookupError, TypeError, ValueError):
        return []  # of another program, or damaged: the weights are what counts
    mine = Generation(
        run=public_name(shown(str(training.parent.resolve()))),
        start=None if start is None else public_name(str(start)),
        teacher=public_name(str(teacher)),
    )
    return [mine, *earlier]


def kept_files(model: Identity) -> dict[str, bytes]:
    """What a store keeps of a model: its small files, and its lineage if it has one."""
    found = lineage(model.folder)
    said = {LINEAGE: canonical_json({"generations": found})} if found else {}
    return model.files_to_keep() | said


def kept_lineage(folder: Path) -> list[Generation]:
    """The lineage that a store keeps in a teacher's folder."""
    record = read_json(folder / LINEAGE, "teacher.model", missing={})
    return _checked(record.get("generations", []))


def came_from(found: Sequence[Generation]) -> str:
    """A lineage in words, as Markdown, the end of a sentence; the licences of the models of others go along."""
    made = ", and before it ".join(
        f"{inline(one['run'])} ({_began(one)}, taught by {inline(one['teacher'])})" for one in found
    )
    named = [name for one in found for name in (one["teacher"], one["start"]) if name is not None]
    others = [inline(name) for name in dict.fromkeys(named) if not name.startswith(RUN)]
    asks = (
        f"; what the licence of {' and of '.join(others)} asks holds for it too" if others else ""
    )
    return f"a student of Stillroom itself: {made}{asks}"


def found_students(recipe: Recipe) -> list[str]:
    """Which student each `run:RUN_DIR` of a recipe stands for now."""
    said = []
    named = [(f"teachers: model of {one.name!r}", one.model) for one in recipe.several]
    named = named or [("teacher.model", recipe.teacher.model)]
    named += [(field, lookup(recipe, field)) for field in ("generate.model", "student.model")]
    for field, model in named:
        if named_run(model) is None:
            continue
        try:
            folder = find_model(model, None, field=field, download=False)
        except UsageError:  # gone, and the store stands in
            continue
        taught = "".join(f", taught by {one['teacher']}" for one in lineage(folder)[:1])
        said.append(f"{field}: {model} is the student in {folder.parent.name}{taught}")
    return said


def _began(one: Generation) -> str:
    return "fresh weights" if one["start"] is None else f"begun as {inline(one['start'])}"


def _checked(found: object) -> list[Generation]:
    if not isinstance(found, list):
        raise IntegrityError(f"{LINEAGE}: holds {type(found).__name__}, expected a list.")
    return [
        Generation(
            run=str(one["run"]),
            start=None if one["start"] is None else str(one["start"]),
            teacher=str(one["teacher"]),
        )
        for one in map(mapping, found)
    ]
