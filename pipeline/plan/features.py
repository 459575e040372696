"""Features that a teacher does not have or a student cannot match, refused before any work; and what they will take."""

from pathlib import Path

from ...stages.ledger.features import feature_bytes
from ...stages.models.fit.config import ConfigFacts, blocks_of, config_facts
from ...stages.models.fit.files import read_json
from ...stages.models.fit.fresh import fresh_config
from ...stages.models.fit.light import light_transformers
from ...stages.models.fit.parts import text_config
from ...stages.recipe.features import captured, layers_for
from ...stages.recipe.sections import Recipe
from ...storage.errors import UsageError
from .resolve import Bound


def refuse_features(recipe: Recipe, bound: Bound, student: Path | None) -> None:
    """Refuse layers that there are not.

    Args:
        recipe: The recipe.
        bound: Its teacher may be gone: what is stored serves, and nothing can be captured.
        student: Folder of an existing student; None: fresh weights, or not here yet.

    Raises:
        UsageError: teacher or student has no such block, or the rows are published ones.
    """
    score = recipe.score
    if score is None or not score.features:
        return
    if bound.published is not None:
        raise UsageError(
            f"score.features: {recipe.data.source} is published, and published folders hold no "
            "features. Leave them out, or name the store that it was made from."
        )
    if bound.teacher is not None:
        _refuse_layers(recipe, bound.teacher.folder)
    if recipe.train is not None and recipe.loss.features:
        _refuse_student_layers(recipe, bound, student)


def _refuse_layers(recipe: Recipe, folder: Path) -> None:
    assert recipe.score is not None
    facts = _facts(folder, "teacher.model")
    if not facts.blocks or not facts.width:
        raise UsageError(
            f"score.features: {folder} ({facts.model_type}) has not one row of blocks that all hand "
            "on states of one width, so none can be named by a number. Leave them out."
        )
    for request in recipe.score.features:
        beyond = [layer for layer in request.layers if layer >= facts.blocks]
        if beyond:
            raise UsageError(
                f"score.features: {request.what} of layer {beyond[0]}, but the teacher {folder} has "
                f"{facts.blocks} blocks, 0 to {facts.blocks - 1}. Name some of these."
            )


def _refuse_student_layers(recipe: Recipe, bound: Bound, folder: Path | None) -> None:
    assert recipe.score is not None
    blocks = _student_blocks(recipe, bound, folder)
    if blocks is None:
        return
    if blocks == 0:
        raise UsageError(
            "loss.features: the student has not one row of blocks, so none can be matched. Use "
            "another student, or leave loss.features out."
        )
    for number, asked in enumerate(recipe.loss.features):
        stored = layers_for(asked, recipe.score.features)
        path = f"loss.features.{number}.layers"
        if asked.layers == "uniform" and len(stored) > blocks:
            raise UsageError(
                f"{path}: 'uniform' gives each of the {len(stored)} stored layers a block of its "
                f"own, and the student has {blocks}. Store fewer, or name pairs."
            )
        for teacher, student in asked.pairs(stored, blocks):
            if student >= blocks:
                raise UsageError(
                    f"{path}: layer {teacher} of the teacher with block {student} of the student, "
                    f"which has {blocks}, 0 to {blocks - 1}. Name one of these."
                )


def _student_blocks(recipe: Recipe, bound: Bound, folder: Path | None) -> int | None:
    """None where the student, or the teacher whose config it gets, is not here."""
    if folder is not None:
        return _facts(folder, "student.model").blocks
    if bound.teacher is None or recipe.student is None or recipe.student.config is None:
        return None
    with light_transformers():
        made = fresh_config(bound.teacher.folder, recipe.student.config, task=recipe.run.task)
        return blocks_of(text_config(made))


def teacher_width(bound: Bound) -> int:
    """Numbers of a state that a block of the teacher hands on; 0 where it is not here."""
    return _facts(bound.teacher.folder, "teacher.model").width if bound.teacher else 0


def feature_note(recipe: Recipe, bound: Bound) -> list[str]:
    """What the features of a token take, and those of a text, for people."""
    width = teacher_width(bound)
    if recipe.score is None or not recipe.score.features or not width:
        return []
    found = []
    for of, per_text in (("token", False), ("text", True)):
        features = [f for f in captured(recipe.score.features) if f.of_text == per_text]
        total = sum(feature_bytes(feature, width) for feature in features)
        parts = ", ".join(f"{f.words} {feature_bytes(f, width)} ({f.dtype})" for f in features)
        if features:
            found.append(f"features: {total} bytes a {of} of the rows to train on: {parts}")
    return found


def _facts(folder: Path, field: str) -> ConfigFacts:
    return config_facts(read_json(folder / "config.json", field), where=f"{field}: {folder}")
