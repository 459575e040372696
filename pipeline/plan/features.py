"""Features that a teacher does not have or a student cannot match, refused before any work; and what they will take."""

from pathlib import Path

from ...stages.ledger.features import feature_bytes, find_embeddings
from ...stages.models.fit.config import ConfigFacts, blocks_of, config_facts
from ...stages.models.fit.files import read_json
from ...stages.models.fit.fresh import fresh_config
from ...stages.models.fit.light import light_transformers
from ...stages.models.fit.parts import text_config
from ...stages.recipe.features import EMBEDDINGS, captured, embedding_bits, layers_of
from ...stages.recipe.sections import Recipe
from ...storage.errors import UsageError
from ...storage.store.store import Store
from .lines import StagePlan
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
    published = bound.published
    if published is not None and captured(score.features) and not published.shards("features"):
        raise UsageError(
            f"score.features: {recipe.data.source} is published without features. Leave them out, or "
            "name the store that it was made from."
        )
    if bound.teacher is not None:
        _refuse_layers(recipe, bound.teacher.folder)
    if recipe.train is not None and recipe.loss.features:
        _refuse_frozen(recipe)
        _refuse_student_layers(recipe, bound, student)


def _refuse_frozen(recipe: Recipe) -> None:
    lora = recipe.student.lora if recipe.student is not None else None
    if lora is not None and any(asked.kind == EMBEDDINGS for asked in recipe.loss.features):
        raise UsageError(
            "loss.features: match 'embeddings' moves the student's input embeddings, which "
            "student.lora freezes. Leave one of them out."
        )


def _refuse_layers(recipe: Recipe, folder: Path) -> None:
    assert recipe.score is not None
    facts = _facts(folder, "teacher.model")
    if not captured(recipe.score.features):
        return
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
    if blocks == 0 and any(asked.kind != EMBEDDINGS for asked in recipe.loss.features):
        raise UsageError(
            "loss.features: the student has not one row of blocks, so none can be matched. Use "
            "another student, or leave loss.features out."
        )
    for number, asked in enumerate(recipe.loss.features):
        stored = layers_of(recipe.score.features, asked.kind)
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
    """What the features of a token take, for people."""
    width = teacher_width(bound)
    if recipe.score is None or not recipe.score.features or not width:
        return []
    features = captured(recipe.score.features)
    total = sum(feature_bytes(feature, width) for feature in features)
    parts = ", ".join(f"{f.words} {feature_bytes(f, width)} ({f.dtype})" for f in features)
    said = [f"features: {total} bytes a token of the rows to train on: {parts}"] if features else []
    if size := embedding_bytes(recipe, bound):
        said.append(f"the teacher's embeddings: {size:,} bytes, once for all texts")
    return said


def embedding_bytes(recipe: Recipe, bound: Bound) -> int:
    """What the matrix of the teacher's embeddings takes; 0: it is not asked for, or the teacher is not here."""
    bits = embedding_bits(recipe.score.features) if recipe.score is not None else None
    if bits is None or bound.teacher is None:
        return 0
    facts, config = _facts(bound.teacher.folder, "teacher.model"), bound.teacher.parts["config"]
    # Of some models they are narrower than the states.
    width = config.get("embedding_size") or config.get("word_embed_proj_dim") or facts.width
    return int(facts.rows * width * bits // 8)


def learnt_embeddings(recipe: Recipe, store: Store, teacher_id: str) -> str:
    """Id of the matrix that the student's embeddings are compared with; empty: they are not."""
    bits = embedding_bits(recipe.score.features) if recipe.score is not None else None
    if bits is None or not any(asked.kind == EMBEDDINGS for asked in recipe.loss.features):
        return ""
    kept = find_embeddings(store, teacher_id, bits)
    return kept.id if kept is not None else ""


def plan_embeddings(line: StagePlan, recipe: Recipe, bound: Bound, store: Store) -> None:
    """Where the teacher's embeddings are asked for and not kept yet, `score` has them to do."""
    bits = embedding_bits(recipe.score.features) if recipe.score is not None else None
    if bits is None or find_embeddings(store, bound.binding.teacher_id, bits) is not None:
        return
    line.why = ", ".join(filter(None, [line.why, "the teacher's embeddings to keep"]))
    line.bytes_to_do += embedding_bytes(recipe, bound)
    if line.state == "done":
        line.state = "to do"


def _facts(folder: Path, field: str) -> ConfigFacts:
    return config_facts(read_json(folder / "config.json", field), where=f"{field}: {folder}")
