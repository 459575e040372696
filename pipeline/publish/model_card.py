"""The model card of a student: what it was distilled from, how, and what came of it.

It is made by the Hub's own classes.

It lies in the student's folder as README.md, from when the student is trained, and in that of its
adapter where the recipe keeps one; its results come with the evaluation.
"""

import re
from collections.abc import Iterable, Mapping
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from ...stages.recipe.formats import FORMATS
from ...stages.recipe.run_folder import (
    ADAPTER,
    EVALUATED,
    SETTINGS,
    STUDENT,
    TRAINED,
    as_a_run_writes,
    read_record,
)
from ...stages.recipe.sections import Recipe
from ...stages.recipe.tasks import TASKS
from ...stages.workers.shard_about import versions
from ...storage.files.local import LocalFiles
from ...storage.published.export import put
from ...storage.published.manifest import CARD
from ...storage.words import counted
from ..plan.lineage import came_from, written_by
from ..printing.numbers import count, teacher_layers
from ..printing.text import HUB_NAME, escaped, fenced, inline, one_line, prose, public_name, table
from ..report.report import outcome
from ..report.results import measures, result_headers, result_rows, unit_of
from ..report.sections import begins_as, student_of, taught_by
from .model_card_code import adapter_code, student_code
from .provenance import public_recipe

_HUB_DATA = re.compile(r"hf://datasets/([^/]+/[^/@]+)")


def write_student_cards(train_dirs: Iterable[Path]) -> None:
    """Write README.md into the `student/` of each training run that has ended.

    A run that has an `adapter/` gets one there too.

    Args:
        train_dirs: Each holds settings.json; train.json where it ended; evaluation.json where that
            arm was evaluated.
    """
    for folder in train_dirs:
        found = {path.name: read_record(path) for path in folder.glob("*.json")}
        if TRAINED not in found:
            continue
        with as_a_run_writes(f"{folder}: {', '.join(sorted(found))}"):
            facts = found[SETTINGS], found[TRAINED], found.get(EVALUATED)
            put(LocalFiles(folder / STUDENT), CARD, student_card(*facts).encode())
            if (folder / ADAPTER).is_dir():
                card = student_card(*facts, adapter=True)
                put(LocalFiles(folder / ADAPTER), CARD, card.encode())


def student_card(
    settings: Mapping[str, Any],
    trained: Mapping[str, Any],
    evaluation: Mapping[str, Any] | None,
    *,
    adapter: bool = False,
) -> str:
    """The card, front matter and text.

    Args:
        settings: `settings.json` of the training run: recipe, arm, teacher.
        trained: Its `train.json`.
        evaluation: Its `evaluation.json`; None: not evaluated yet, or another arm's.
        adapter: Of the LoRA alone, which goes onto the initial model.
    """
    from huggingface_hub import ModelCard

    recipe = settings["recipe"]
    shown = public_recipe(recipe)
    student = shown["student"]
    distilled = settings["arm"] == "student" and recipe.get("score") is not None
    learnt = "the teacher's distributions" if distilled else "the teacher's text"
    library = _library(student, adapter=adapter)
    card = ModelCard.from_template(
        _card_data(recipe, settings["arm"], _index(shown, evaluation), library=library),
        template_str=package_files("stillroom.pipeline.templates")
        .joinpath("model_card.md.jinja")
        .read_text("utf-8"),
        title=("Adapter: " if adapter else "")
        + escaped(f"{_name(shown)}, distilled from {taught_by(shown)}"),
        summary=prose(
            f"A student of {student_of(shown)}: {begins_as(student)}, trained by Stillroom on "
            f"{learnt}." + (_ADAPTER.format(inline(student["model"])) if adapter else "")
        ),
        outcome=prose(outcome(evaluation)) if evaluation else "",
        results=_results(evaluation) if evaluation else "",
        measured=prose(_measured(evaluation)) if evaluation else "",
        **(adapter_code(shown) if adapter else student_code(recipe)),
        made=prose(_made(settings, trained)),
        recipe=fenced(
            yaml.safe_dump(
                _without_defaults(shown), sort_keys=False, default_flow_style=None, width=100
            ).rstrip(),
            "yaml",
        ),
        versions=", ".join(f"{name} {number}" for name, number in versions().items()),
        limits=[
            *_limits(recipe, student),
            *(prose(_sentence(n)) for n in trained.get("notes", ())),
        ],
    )
    return f"{str(card).rstrip()}\n"


def _library(student: Mapping[str, Any], *, adapter: bool) -> str:
    """What loads it."""
    if student.get("factory"):
        return "pytorch"
    return "peft" if adapter else "transformers"


_ADAPTER = " This folder holds its LoRA alone, for {}; the results are those of the two together."


def _sentence(note: str) -> str:
    return f"{note[:1].upper()}{note[1:]}."


def _name(shown: Mapping[str, Any]) -> str:
    model = shown["student"]["model"]
    return model.rpartition("/")[2] if model else "A small model"


def _index(shown: Mapping[str, Any], evaluation: Mapping[str, Any] | None) -> dict[str, Any]:
    """A classifier's numbers for the Hub's model index; nothing where no text had a label."""
    from huggingface_hub import EvalResult

    result = evaluation["results"]["student"] if evaluation else {}
    if result.get("f1_macro") is None:
        return {}
    judged, task = shown["evaluate"], TASKS[shown["run"]["task"]]
    data = one_line(judged.get("source") or shown["data"]["source"])
    found = [
        EvalResult(
            task_type=task.hub_name,
            dataset_type=data,
            dataset_name=f"{data}, held-out texts",
            dataset_split=judged.get("split"),
            metric_type=metric,
            metric_name=words,
            metric_value=result[name],
        )
        for name, (metric, words) in _INDEXED.items()
        if result.get(name) is not None
    ]
    return {"model_name": one_line(_name(shown)), "eval_results": found}


_INDEXED = {
    "accuracy": ("accuracy", "Accuracy"),
    "f1_macro": ("f1", "Macro F1"),
    "f1_weighted": ("f1", "Weighted F1"),
    "precision_macro": ("precision", "Macro precision"),
    "recall_macro": ("recall", "Macro recall"),
    "entity_f1": ("f1", "Entity F1"),
    "entity_precision": ("precision", "Entity precision"),
    "entity_recall": ("recall", "Entity recall"),
}
"""Number -> the Hub's name of its kind, and words."""


def _card_data(
    recipe: Mapping[str, Any], arm: str, index: Mapping[str, Any], *, library: str
) -> Any:
    from huggingface_hub import ModelCardData

    copies = recipe["student"].get("from_teacher_layers")
    base = recipe["teacher"]["model"] if copies else recipe["student"]["model"]
    on_hub = base if base and public_name(base) == base and HUB_NAME.fullmatch(base) else None
    return ModelCardData(
        base_model=on_hub,
        base_model_relation="finetune"
        if on_hub
        else None,  # LoRA too: its update is merged into the weights
        datasets=_datasets(recipe) or None,
        library_name=library,
        pipeline_tag=TASKS[recipe["run"]["task"]].hub_name,
        tags=["knowledge-distillation", "stillroom", *(["baseline"] if arm == "baseline" else [])],
        **index,
    )


def _datasets(recipe: Mapping[str, Any]) -> list[str]:
    """Those that the Hub knows by name."""
    places = [*recipe["storage"]["sources"], recipe["data"]["source"]]
    names = [match[1] for place in places if (match := _HUB_DATA.match(place))]
    source = recipe["data"]["source"]
    if (
        HUB_NAME.fullmatch(source)
        and public_name(source) == source
        and "." not in source.rpartition("/")[2]
    ):
        names.append(source)
    return list(dict.fromkeys(names))


def _results(evaluation: Mapping[str, Any]) -> str:
    columns = measures(evaluation["results"].values())
    on = evaluation["measured_on"]
    headers = result_headers(columns, bound=on["kl_is_lower_bound"], unit=unit_of(on))
    return table(headers, result_rows(evaluation["results"], columns))


def _measured(evaluation: Mapping[str, Any]) -> str:
    on = evaluation["measured_on"]
    labelled = on.get("labelled")
    which = "" if labelled in (None, on["tokens"]) else f", {count(labelled)} of them with a label"
    prompts = counted(on["prompts"], "held-out prompt")
    return (
        f"On {count(on['tokens'])} {on['of']} of {prompts}{which}, "
        "which the student was not trained on. ± is one standard error."
    )


def _made(settings: Mapping[str, Any], trained: Mapping[str, Any]) -> str:
    scored = count(trained["scored_tokens"])
    parts = [
        f"{counted(trained['steps'], 'step')}, {count(trained['tokens'])} tokens of which {scored} "
        f"were scored, {trained['epochs']:g} epochs of snapshot {inline(trained['snapshot'])}; "
        f"{count(trained['parameters'])} parameters, {count(trained['trained_parameters'])} of "
        f"them trained{_stored(trained)}.",
        _identities(settings),
    ]
    if said := written_by(settings["recipe"]):
        parts.append(said)
    if "code" in settings:
        whose = "a teacher" if "teachers" in settings else "the teacher"
        parts.append(f"To load {whose}, its own code was run ({inline(settings['code'])}).")
    if lineage := settings.get("lineage"):
        parts.append(f"The teacher is {came_from(lineage)}.")
    parts += [
        f"The teacher {inline(name)} is {came_from(lineage)}."
        for name, lineage in settings.get("lineages", {}).items()
    ]
    if settings["arm"] == "baseline":
        parts.insert(
            0,
            "This is the baseline: cross-entropy alone, same start, order and tokens as the "
            "distilled one.",
        )
    return " ".join(parts)


def _identities(settings: Mapping[str, Any]) -> str:
    """Who taught it."""
    several = settings.get("teachers")
    if not several:
        return f"The teacher's identity, a hash of its content: {inline(settings['teacher_id'])}."
    licences = {one["name"]: one.get("license") for one in settings["recipe"]["teachers"]}
    found = [
        f"{inline(name)} {inline(teacher_id)} (licence: {inline(known) if known else 'not stated'})"
        for name, teacher_id in several.items()
        for known in [licences[name]]
    ]
    return f"The teachers' identities, hashes of their content: {', '.join(found)}."


def _stored(trained: Mapping[str, Any]) -> str:
    dtype = trained.get("saved_dtype")
    return f"; trained in float32, stored in {dtype} and judged as stored" if dtype else ""


def _without_defaults(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """What the recipe says beside the defaults.

    Folders of the machine where it was made are left out.
    """
    try:
        said = Recipe.model_validate(recipe).model_dump(mode="json", exclude_defaults=True)
    except ValidationError:  # of another version
        said = dict(recipe)
    if said.get("teachers"):
        del said["teacher"]  # the first of them
    for section in ("run", "storage"):
        said[section] = {
            name: value for name, value in said.get(section, {}).items() if name != "dir"
        }
    return {section: fields for section, fields in said.items() if fields}


def _limits(recipe: Mapping[str, Any], student: Mapping[str, Any]) -> list[str]:
    whose = "teachers" if recipe.get("teachers") else "teacher"
    found = [
        "It knows what its teacher said of this data; outside of it nobody measured it.",
        "It inherits the teacher's mistakes and biases, and adds its own.",
        f"Before you publish it, see what the licences of the {whose}, of the data"
        + (" and of the initial model" if student["model"] else "")
        + " ask"
        + ("." if recipe.get("teachers") or written_by(recipe) else "; none is stated here."),
    ]
    if layers := student.get("from_teacher_layers"):
        found.append(
            f"It began as {teacher_layers(layers)}, so its weights are derived from the teacher's, "
            "and the teacher's licence holds for them."
        )
    records = FORMATS[recipe["data"]["format"]]
    if TASKS[recipe["run"]["task"]].structure.masked:
        return [*found, "It guesses hidden tokens; it was not taught to continue text."]
    if not (records.conversation or records.labelled):
        found.append(
            "It continues text; it was not taught to follow instructions or to hold a conversation."
        )
    return found
