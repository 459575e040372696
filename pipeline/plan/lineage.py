"""Where a teacher comes from that is itself a student of Stillroom.

A lineage says what the student began as, and who taught it. It is read in the folder of the run
that trained it, whatever the recipe calls that folder, and kept beside the teacher's small files in
the store: cards are written when that run may be gone. It is in no hash, for a teacher is its
weights.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from ...stages.models.fit.files import read_json
from ...stages.models.identity import Identity, find_model
from ...stages.recipe.checks.task import lookup
from ...stages.recipe.run_folder import RUN, SETTINGS, STUDENT, named_run, read_record
from ...stages.recipe.sections import Recipe
from ...storage.bounds import mapping
from ...storage.credentials import shown
from ...storage.errors import IntegrityError, UsageError
from ...storage.joined import open_store
from ...storage.keys import canonical_json
from ..printing.text import inline, public_name
from .teachers import BoundTeacher

LINEAGE = "lineage.json"


class Generation(TypedDict):
    """One run that made a student; names are public ones."""

    run: str
    start: str | None
    """The model that it began as; None: fresh weights, or layers of its teacher."""
    teacher: str
    beside: NotRequired[list[str]]
    """The teachers after the first one, where it had several."""


def lineage(folder: Path) -> list[Generation]:
    """The generations behind a model's folder, the latest first.

    There are none where no run of Stillroom trained it.
    """
    training = folder.parent
    if folder.name != STUDENT or not (training / SETTINGS).is_file():
        return []
    try:
        settings = read_record(training / SETTINGS)
        recipe = mapping(settings["recipe"])
        start = mapping(recipe["student"])["model"]
        taught = [mapping(one)["model"] for one in recipe.get("teachers") or [recipe["teacher"]]]
        earlier = _earlier(settings)
    except (IntegrityError, LookupError, TypeError, ValueError):
        return []  # of another program, or damaged: the weights are what counts
    mine = Generation(
        run=public_name(shown(str(training.parent.resolve()))),
        start=None if start is None else public_name(str(start)),
        teacher=public_name(str(taught[0])),
    )
    if beside := [public_name(str(one)) for one in taught[1:]]:
        mine["beside"] = beside
    return [mine, *earlier]


def lineages(recipe: Recipe, teachers: Sequence[BoundTeacher]) -> dict[str, Any]:
    """What the record of a training has of its teachers.

    It is the `lineage` of the only one, or of several the `lineages` by name.
    """
    found = {one.name: before for one in teachers if (before := _of_teacher(recipe, one))}
    if not found:
        return {}
    return {"lineages": found} if len(teachers) > 1 else {"lineage": found[teachers[0].name]}


def _of_teacher(recipe: Recipe, one: BoundTeacher) -> list[Generation]:
    """Of a teacher; where it is gone, as the store keeps it; of an endpoint nothing is known."""
    if recipe.generate is not None and recipe.generate.teaches:
        return []
    if one.bound.teacher is not None:
        return lineage(one.bound.teacher.folder)
    store = open_store(recipe.storage.dir, recipe.storage.sources)
    return kept_lineage(store.teacher_dir(one.id)) if store.teacher_parts(one.id) else []


def _earlier(settings: dict[str, Any]) -> list[Generation]:
    """The generations before a training's own, each once: of one teacher, or of all of several."""
    told = [settings.get("lineage", []), *mapping(settings.get("lineages", {})).values()]
    found: list[Generation] = []
    for one in (generation for part in told for generation in _checked(part)):
        if one not in found:
            found.append(one)
    return found


def kept_files(model: Identity) -> dict[str, bytes]:
    """What a store keeps of a model: its small files, and its lineage if it has one."""
    found = [] if "endpoint" in model.parts else lineage(model.folder)
    said = {LINEAGE: canonical_json({"generations": found})} if found else {}
    return model.files_to_keep() | said


def kept_lineage(folder: Path) -> list[Generation]:
    """The lineage that a store keeps in a teacher's folder."""
    record = read_json(folder / LINEAGE, "teacher.model", missing={})
    return _checked(record.get("generations", []))


def came_from(found: Sequence[Generation]) -> str:
    """A lineage in words, as Markdown: the end of a sentence.

    The licences of the models of others go along.
    """
    made = ", and before it ".join(
        f"{inline(one['run'])} ({_began(one)}, taught by "
        f"{' and '.join(map(inline, _taught_by(one)))})"
        for one in found
    )
    named = [name for one in found for name in (*_taught_by(one), one["start"]) if name is not None]
    others = [inline(name) for name in dict.fromkeys(named) if not name.startswith(RUN)]
    asks = (
        f"; what the licence of {' and of '.join(others)} asks holds for it too" if others else ""
    )
    return f"a student of Stillroom itself: {made}{asks}"


def endpoint_teacher(recipe: Mapping[str, Any]) -> str | None:
    """The model behind an endpoint whose log-probabilities are the soft targets.

    It is None where they are not.
    """
    generate = recipe.get("generate") or {}
    teaches = generate.get("base_url") and generate.get("keep") and recipe.get("score")
    return str(generate["model"]) if teaches else None


def written_by(recipe: Mapping[str, Any]) -> str:
    """Who wrote the text, where an endpoint did, in words, as Markdown; empty: none did."""
    found = recipe.get("generate") or {}
    if not found.get("base_url"):
        return ""
    license_id = inline(found["license"]) if found.get("license") else "not stated"
    what = (
        "The text, and the distributions at its tokens, are"
        if found.get("keep")
        else "The text was written"
    )
    return (
        f"{what} by {inline(found['model'])} at {inline(public_name(found['base_url']))} "
        f"(its licence or terms: {license_id})."
    )


def found_students(recipe: Recipe) -> list[str]:
    """Which student each `run:RUN_DIR` of a recipe stands for now."""
    said = []
    named = [(f"teachers: model of {one.name!r}", one.model) for one in recipe.several]
    named = named or [("teacher.model", recipe.teacher.model)]
    named += [(field, lookup(recipe, field)) for field in ("generate.model", "student.model")]
    for field, model in named:
        if field == "generate.model" and recipe.generate is not None and recipe.generate.remote:
            continue
        if named_run(model) is None:
            continue
        try:
            folder = find_model(model, None, field=field, download=False)
        except UsageError:  # gone, and the store stands in
            continue
        taught = "".join(
            f", taught by {' and '.join(_taught_by(one))}" for one in lineage(folder)[:1]
        )
        said.append(f"{field}: {model} is the student in {folder.parent.name}{taught}")
    return said


def _taught_by(one: Generation) -> list[str]:
    return [one["teacher"], *one.get("beside", [])]


def _began(one: Generation) -> str:
    return "fresh weights" if one["start"] is None else f"begun as {inline(one['start'])}"


def _checked(found: object) -> list[Generation]:
    if not isinstance(found, list):
        raise IntegrityError(f"{LINEAGE}: holds {type(found).__name__}, expected a list.")
    return [_checked_one(one) for one in map(mapping, found)]


def _checked_one(one: dict[str, Any]) -> Generation:
    checked = Generation(
        run=str(one["run"]),
        start=None if one["start"] is None else str(one["start"]),
        teacher=str(one["teacher"]),
    )
    if one.get("beside"):
        checked["beside"] = [str(name) for name in one["beside"]]
    return checked
