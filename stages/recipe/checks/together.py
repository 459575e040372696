"""What is wrong with a recipe although each of its fields is right.

That is combinations, and what no stage does yet.
"""

from pathlib import Path
from typing import Any

from ..engines import Generate
from ..evaluate import HELD_OUT_FIELDS, Evaluate
from ..fields import Section
from ..kinds import Score, kinds_with
from ..run_folder import named_run
from ..sections import Data, Loss, Recipe, Run, Teacher
from ..stages import Compute
from .endpoint import check_endpoint, check_teaching
from .engines import check_kept, check_reader
from .features import check_captured, check_matched
from .loss import check_loss
from .task import check_task, lookup, targets_fit
from .teachers import check_teachers

# What only a student makes use of: whole sections, and fields of others. Of `evaluate` stage one
# reads which rows are held out, and how many of their tokens get reference targets.
_OF_STAGE_ONE = {"tokens", "source", "split", "limit"}
_OF_A_STUDENT = (
    "run.seed",
    "compute.processes",
    "compute.sharding",
    *(f"loss.{name}" for name in Loss.model_fields),
    *(f"evaluate.{name}" for name in Evaluate.model_fields if name not in _OF_STAGE_ONE),
)

# How a teacher is loaded and data are read: a store that is named for both has been filled already.
_NOT_OF_A_STORE = (
    "teacher.revision",
    "teacher.dtype",
    "teacher.adapter",
    "teacher.trust_remote_code",
    "teacher.quantize",
    "teacher.device_map",
    "data.split",
    "data.columns",
    "data.turns",
    "data.window_tokens",
    "data.max_tokens",
    "data.too_long",
    "data.limit",
    *(f"evaluate.{name}" for name in HELD_OUT_FIELDS),
)


# What only models of the Hub, or of others, have.
_NOT_OF_A_RUN = {
    "revision": "Remove it",
    "trust_remote_code": "No student has code of its own. Remove it",
}


def check_together(recipe: Recipe) -> list[tuple[str, str]]:
    """Errors that need more than one field: (dotted path, message)."""
    errors = _unknown_columns(recipe.data)
    if recipe.score is not None:
        errors += _targets(recipe.score) + check_captured(recipe.score, recipe.run.task)
        errors += check_reader(recipe)
    errors += check_kept(recipe) + check_teaching(recipe)
    kind, records = recipe.data.format, recipe.data.records
    # Of a labelled text the task says it (`check_task`).
    brings_text = records.brings_text == "always" and not records.labelled
    if brings_text and recipe.generate is not None:
        errors.append(
            (
                "generate",
                f"format {kind!r} brings its own text. Remove this section, or use format 'prompt'",
            )
        )
    if recipe.generate is not None and recipe.generate.temperature == 0:
        errors += _greedy(recipe.generate)
    errors += check_endpoint(recipe.generate) if recipe.generate is not None else []
    if recipe.data.turns is not None and not records.conversation:
        errors.append(("data.turns", f"format {kind!r} has no turns. Remove it"))
    errors += _lengths(recipe) + check_task(recipe) + _held_out(recipe)
    needs_text = records.brings_text == "never" and recipe.data.source not in stores_of(recipe)
    if needs_text and recipe.generate is None:
        errors.append(
            ("generate", f"missing: format {kind!r} has prompts only. Add a `generate` section")
        )
    errors += _sources(recipe) + _alone(recipe) + _copies(recipe) + _runs(recipe)
    errors += check_teachers(recipe)
    learns = recipe.train is not None and targets_fit(recipe)
    if learns:
        errors += check_loss(recipe.loss, recipe.score)
        errors += check_matched(recipe.loss, recipe.score)
    return errors


def _alone(recipe: Recipe) -> list[tuple[str, str]]:
    """A recipe has both `student` and `train`, or it is stage one alone.

    A recipe of stage one alone says nothing of a student.
    """
    missing = [name for name in ("student", "train") if lookup(recipe, name) is None]
    if len(missing) == 1:
        there = "train" if missing == ["student"] else "student"
        message = (
            f"missing, and there is a section `{there}`. Add it to train a student, or leave both "
            "out: then the recipe is stage one alone, whose rows can be exported"
        )
        return [(missing[0], message)]
    message = "has no meaning without `student` and `train`. Remove it, or add them"
    return [
        (path, message)
        for path in _OF_A_STUDENT
        if missing and lookup(recipe, path) != _default(path)
    ]


def _copies(recipe: Recipe) -> list[tuple[str, str]]:
    """Layers of the teacher that a student cannot begin with."""
    student = recipe.student
    if student is None or student.from_teacher_layers is None:
        return []
    field, layers, errors = "student.from_teacher_layers", student.from_teacher_layers, []
    if layers != (right := sorted(set(layers))):
        message = f"must name each layer once, in ascending order (got {layers}). Write {right}"
        errors.append((field, message))
    if recipe.teacher.adapter is not None:
        message = (
            "teacher.adapter changes the layers that teach, and these would be copied without it. "
            "Merge the adapter into the teacher first, or name another start"
        )
        errors.append((field, message))
    if student.lora is not None and student.lora.keep_adapter:
        message = (
            "an adapter alone goes onto the initial model, and copied layers are in no folder. "
            "Remove it, or name an existing student"
        )
        errors.append(("student.lora.keep_adapter", message))
    return errors


def _runs(recipe: Recipe) -> list[tuple[str, str]]:
    """Students of other runs, named `run:RUN_DIR`."""
    errors = []
    sections = {name: lookup(recipe, name) for name in ("teacher", "student", "generate")}
    sections |= {f"teachers.{n}": one for n, one in enumerate(recipe.teachers) if n}
    for where, section in sections.items():
        run_dir = named_run(section.model) if section is not None else None
        if run_dir is None:
            continue
        if run_dir.resolve() == Path(recipe.run.dir).resolve():
            message = (
                "names this recipe's own run.dir, whose student is what it trains. Give this "
                "recipe another run.dir"
            )
            errors.append((f"{where}.model", message))
        errors += [
            (f"{where}.{name}", f"has no meaning for the student of a run. {why}")
            for name, why in _NOT_OF_A_RUN.items()
            if getattr(section, name, None)
        ]
    return errors


def _greedy(generate: Generate) -> list[tuple[str, str]]:
    if generate.samples == 1:
        return []
    message = (
        f"{generate.samples} completions of a prompt are all the same at generate.temperature 0. "
        "Use samples: 1, or a temperature above 0"
    )
    return [("generate.samples", message)]


def _held_out(recipe: Recipe) -> list[tuple[str, str]]:
    """Whether it is clear which rows judge."""
    data, evaluate = recipe.data, recipe.evaluate
    if not evaluate.names_rows:
        why = "there are no rows of your own to limit. Name evaluate.source or evaluate.split too"
        return [] if evaluate.limit is None else [("evaluate.limit", why)]
    errors = []
    # A recipe that was written out whole, a settings.json say, has the default in it.
    if data.holdout not in (0, _default("data.holdout")):
        message = "evaluate names the held-out rows, so none of the data's are kept. Remove one"
        errors.append(("data.holdout", message))
    if evaluate.source is None and evaluate.split == data.split:
        message = f"{data.split!r} is what is trained on. Name another split, or evaluate.source"
        errors.append(("evaluate.split", message))
    if evaluate.source in stores_of(recipe):
        message = "names a store; held-out rows come from files or the Hub"
        errors.append(("evaluate.source", message))
    return errors


def _lengths(recipe: Recipe) -> list[tuple[str, str]]:
    """Limits that this format has no use for, and a cut that would change the question."""
    data, errors = recipe.data, []
    if data.records.document:
        windows = f"format {data.format!r} is cut into windows, whatever its length"
        if data.max_tokens is not None:
            errors.append(("data.max_tokens", f"{windows}. Set data.window_tokens instead"))
        if data.too_long != "reject":
            errors.append(("data.too_long", f"{windows}. Remove it"))
        return errors
    if data.records.image and data.too_long != "reject":
        errors.append(("data.too_long", "an image has no tokens to cut. Remove it"))
    if data.window_tokens is not None:
        message = f"format {data.format!r} is not cut into windows. Set data.max_tokens instead"
        errors.append(("data.window_tokens", message))
    if data.too_long == "cut" and recipe.generate is not None:
        message = (
            "'cut' would take the end of a prompt, where the question or the assistant's header "
            "stands, and `generate` would answer another one. Use 'reject', or shorten the prompts"
        )
        errors.append(("data.too_long", message))
    return errors


def stores_of(recipe: Recipe) -> list[str]:
    """The recipe's stores, its own one first."""
    return [recipe.storage.dir, *recipe.storage.sources]


def _sources(recipe: Recipe) -> list[tuple[str, str]]:
    """Stores that are named as a teacher, as data or as read-only sources."""
    stores, errors = stores_of(recipe), []
    if repeated := [name for name in stores if stores.count(name) > 1]:
        errors.append(
            (
                "storage.sources",
                f"{repeated[0]} is named twice. Name each store once, storage.dir not at all",
            )
        )
    if (recipe.teacher.model in stores) != (recipe.data.source in stores):
        named = "teacher.model" if recipe.teacher.model in stores else "data.source"
        message = (
            "names a store, whose rows stand for teacher and data alike. Name it in both, "
            "teacher.model and data.source"
        )
        errors.append((named, message))
    elif recipe.data.source in stores:
        message = (
            f"has no meaning where {recipe.data.source} is teacher and data: its rows are as they "
            "are. Remove it"
        )
        errors += [
            (path, message) for path in _NOT_OF_A_STORE if lookup(recipe, path) != _default(path)
        ]
    return errors


_SECTIONS: dict[str, type[Section]] = {
    "run": Run,
    "teacher": Teacher,
    "data": Data,
    "loss": Loss,
    "evaluate": Evaluate,
    "compute": Compute,
}


def _default(path: str) -> Any:
    section, name = path.split(".")
    return _SECTIONS[section].model_fields[name].get_default(call_default_factory=True)


def _unknown_columns(data: Data) -> list[tuple[str, str]]:
    known = data.records.columns
    return [
        (
            "data.columns",
            f"unknown name {name!r}. Known for format {data.format!r}: {', '.join(known)}",
        )
        for name in data.columns
        if name not in known
    ]


def _targets(score: Score) -> list[tuple[str, str]]:
    """Settings that these targets would silently ignore, or cannot do without."""
    errors = [
        (
            f"score.{name}",
            f"belongs to targets {' and '.join(map(repr, kinds))}; this recipe has "
            f"{score.targets!r}. Remove it",
        )
        for name, field in Score.model_fields.items()
        if (kinds := kinds_with(name))
        and score.targets not in kinds
        and getattr(score, name) != field.default
    ]
    errors += [
        (f"score.{name}", f"missing: targets {score.targets!r} {why}")
        for name, why in score.kind.needs.items()
        if getattr(score, name) is None
    ]
    if "k_min" in score.kind.settings and score.k_min > score.k:
        errors.append(
            (
                "score.k_min",
                f"{score.k_min} entries at least are more than score.k, {score.k} at most",
            )
        )
    if score.structure.drawn and len(set(score.temperatures)) > 1:
        message = (
            "sampled targets are drawn at one temperature, and serve no other (got "
            f"{score.temperatures}). Name the one that loss.temperature has, or use targets 'topk'"
        )
        errors.append(("score.temperatures", message))
    return errors
