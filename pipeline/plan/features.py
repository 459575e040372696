"""What the features of a teacher will take, and which ones are refused before any work.

Refused are features that a teacher does not have or a student cannot match.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from ...stages.ledger.features import check_narrower, feature_bytes, find_embeddings
from ...stages.models.fit.config import ConfigFacts, config_facts
from ...stages.models.fit.files import read_json
from ...stages.models.fit.processor import channels_of, side_of
from ...stages.models.identity import Identity
from ...stages.recipe.features import (
    EMBEDDINGS,
    Feature,
    FeatureLoss,
    captured,
    embedding_bits,
    layers_for,
)
from ...stages.recipe.sections import Recipe
from ...storage.errors import UsageError
from ...storage.store.store import Store
from ...storage.tables.features import HEADED, POOLED, what_and_how
from ...storage.words import counted
from .attention import REMEDY, config_attention, refuse_unpaired
from .lines import StagePlan
from .resolve import Bound
from .student_config import student_blocks


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
            f"score.features: {recipe.data.source} is published without features. Leave them out, "
            "or name the store that it was made from."
        )
    if bound.teacher is not None:
        _refuse_layers(recipe, bound.teacher)
    if recipe.train is not None and recipe.loss.features:
        _refuse_frozen(recipe)
        _refuse_student_layers(recipe, bound, student)


def _refuse_frozen(recipe: Recipe) -> None:
    lora = recipe.student.lora if recipe.student is not None else None
    if lora is not None and any(asked.match == EMBEDDINGS for asked in recipe.loss.features):
        raise UsageError(
            "loss.features: match 'embeddings' moves the student's input embeddings, which "
            "student.lora freezes. Leave one of them out."
        )


def _refuse_layers(recipe: Recipe, teacher: Identity) -> None:
    assert recipe.score is not None
    if not captured(recipe.score.features):
        return
    facts, folder = _of_teacher(teacher), teacher.folder
    if not facts.blocks or not facts.width:
        raise UsageError(
            f"score.features: {folder} ({facts.model_type}) has not one row of blocks that all "
            "hand on states of one width, so none can be named by a number. Leave them out."
        )
    _refuse_attention(recipe, folder, model_type=facts.model_type)
    for request in recipe.score.features:
        beyond = [layer for layer in request.layers if layer >= facts.blocks]
        if beyond:
            raise UsageError(
                f"score.features: {request.what} of layer {beyond[0]}, but the teacher {folder} "
                f"has {counted(facts.blocks, 'block')}, 0 to {facts.blocks - 1}. Name some of "
                "these."
            )


def _refuse_attention(recipe: Recipe, folder: Path, *, model_type: str) -> None:
    """Refuse a teacher whose queries and keys do not make its attention."""
    assert recipe.score is not None
    asked = [request.what for request in recipe.score.features if request.what in HEADED]
    if not asked:
        return
    found = config_attention(folder, "teacher.model")
    if found.beyond is not None:
        raise UsageError(
            f"score.features: {asked[0]} of {folder} ({model_type}): its attention is not "
            f"softmax(scale q k^T) alone: it has {found.beyond}. {REMEDY}"
        )
    for feature in captured(recipe.score.features):
        check_narrower(feature, found.numbers(what_and_how(feature.kind)[0]))


def _refuse_student_layers(recipe: Recipe, bound: Bound, folder: Path | None) -> None:
    assert recipe.score is not None
    student = student_blocks(recipe, bound, folder)
    if student is None:
        return
    blocks, attention = student
    if blocks == 0 and any(asked.match != EMBEDDINGS for asked in recipe.loss.features):
        raise UsageError(
            "loss.features: the student has not one row of blocks, so none can be matched. Use "
            "another student, or leave loss.features out."
        )
    for number, asked in enumerate(recipe.loss.features):
        path = f"loss.features.{number}"
        _refuse_pairs(f"{path}.layers", asked, layers_for(asked, recipe.score.features), blocks)
        if {what_and_how(kind)[0] for kind in asked.needs} & {*HEADED}:
            folder = bound.teacher.folder if bound.teacher else None
            teacher = config_attention(folder, "teacher.model") if folder else None
            refuse_unpaired(path, asked, teacher, attention)


def _refuse_pairs(path: str, asked: FeatureLoss, stored: list[int], blocks: int) -> None:
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


def teacher_widths(recipe: Recipe, bound: Bound) -> dict[str, int]:
    """How many numbers a vector of each kind of feature of the teacher has.

    It is empty where the teacher is not here, or no feature is asked for.
    """
    if bound.teacher is None or recipe.score is None or not recipe.score.features:
        return {}
    states = dict.fromkeys(("hidden", *POOLED), _of_teacher(bound.teacher).width)
    if not any(request.what in HEADED for request in recipe.score.features):
        return states
    attention = config_attention(bound.teacher.folder, "teacher.model")
    return states | {kind: attention.numbers(kind) for kind in HEADED}


def feature_note(recipe: Recipe, bound: Bound) -> list[str]:
    """What the features of a token take, and those of a text, for people."""
    widths = teacher_widths(recipe, bound)
    if recipe.score is None:
        return []
    found = []
    for of, per_text in (("token", False), ("text", True)):
        features = [f for f in captured(recipe.score.features) if f.of_text == per_text and widths]
        total = sum(feature_bytes(feature, widths) for feature in features)
        if features:
            found.append(f"features: {total:,} bytes a {of} of the rows to train on")
            found += [f"  {line}" for line in _layouts(features, widths, of)]
    if size := embedding_bytes(recipe, bound):
        found.append(f"the teacher's embeddings: {size:,} bytes, once for all texts")
    return found


def image_note(recipe: Recipe, bound: Bound) -> list[str]:
    """What the images of a recipe take, for people.

    It is empty where there are none, or the teacher is not here.
    """
    if not recipe.data.records.image or bound.teacher is None:
        return []
    folder = bound.teacher.folder
    side, channels = side_of(folder), channels_of(folder)
    if side is None:
        return []
    return [
        f"images: {side} x {side} x {channels} as the teacher reads them, at most about "
        f"{side * side * channels:,} bytes each, once for the prompt and once beside each target"
    ]


def _layouts(features: Sequence[Feature], widths: Mapping[str, int], of: str) -> Iterator[str]:
    """A line for what is laid out alike, whatever its block."""
    alike: dict[tuple[str, str], list[Feature]] = {}
    for feature in features:
        alike.setdefault((feature.kind, feature.dtype), []).append(feature)
    for (_, dtype), some in alike.items():
        blocks = ", ".join(str(feature.layer) for feature in some)
        words = some[0].words_of(f"{'block' if len(some) == 1 else 'blocks'} {blocks}")
        size = sum(feature_bytes(feature, widths) for feature in some)
        yield f"{words}: {size:,} bytes a {of}, {dtype}"


def embedding_bytes(recipe: Recipe, bound: Bound) -> int:
    """What the matrix of the teacher's embeddings takes.

    It is 0 where the matrix is not asked for, or the teacher is not here.
    """
    bits = embedding_bits(recipe.score.features) if recipe.score is not None else None
    if bits is None or bound.teacher is None:
        return 0
    facts, config = _of_teacher(bound.teacher), bound.teacher.parts["config"]
    # Of some models they are narrower than the states.
    width = config.get("embedding_size") or config.get("word_embed_proj_dim") or facts.width
    return int(facts.rows * width * bits // 8)


def learnt_embeddings(recipe: Recipe, store: Store, teacher_id: str) -> str:
    """Id of the matrix that the student's embeddings are compared with; empty: they are not."""
    bits = embedding_bits(recipe.score.features) if recipe.score is not None else None
    if bits is None or not any(asked.match == EMBEDDINGS for asked in recipe.loss.features):
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


def _of_teacher(teacher: Identity) -> ConfigFacts:
    return _facts(teacher.folder, "teacher.model", trusted=teacher.runs_code)


def _facts(folder: Path, field: str, *, trusted: bool) -> ConfigFacts:
    raw = read_json(folder / "config.json", field)
    return config_facts(raw, where=f"{field}: {folder}", trusted=trusted)
