"""The teachers of a recipe, one by one.

Of each it is what its name stands for, its line of the plan, and what is said of it.

The data are read once, with the first teacher's tokenizer, and the first teacher writes where
`generate` names nobody else. So of the others only who they are matters, and that they read the
same tokens. Each has a binding of its own, under the names that a recipe with it alone would have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ...stages.engines.opening import refuse_engine
from ...stages.models.fit.classes import names_in
from ...stages.models.fit.processor import compare_processors
from ...stages.models.inputs.same_tokenizer import compare_tokenizers
from ...stages.recipe.sections import OneTeacher, Recipe
from ...stages.recipe.tasks import TASKS
from ...storage.errors import UsageError
from ...storage.store.hashes import FileHashes
from ...storage.store.store import Store
from .resolve import Bound, teacher_identity, written_binding


@dataclass(frozen=True, kw_only=True, slots=True)
class BoundTeacher:
    """A teacher, and what its name stands for."""

    name: str
    """Empty: the recipe's only one."""
    recipe: Recipe
    """The recipe as if it had no other teacher."""
    bound: Bound

    @property
    def line(self) -> str:
        """Its line of the plan."""
        return f"score/{self.name}" if self.name else "score"

    @property
    def field(self) -> str:
        """Where the recipe names it."""
        return f"teachers: model of {self.name!r}" if self.name else "teacher.model"

    @property
    def asked(self) -> OneTeacher | None:
        """What it is asked for; None: everything, of the only one."""
        return self.recipe.teachers[0] if self.name else None

    @property
    def id(self) -> str:
        """Its identity."""
        return self.bound.binding.teacher_id


def bind_teachers(
    recipe: Recipe, first: Bound, store: Store | None, *, write: bool
) -> tuple[BoundTeacher, ...]:
    """All teachers of a recipe, in its order.

    Args:
        recipe: The recipe.
        first: What its names stand for, of the first teacher.
        store: As `bind` takes it.
        write: Remember file hashes, and download from the Hub where needed; else only look.

    Raises:
        UsageError: one is not there and the store never saw it, or does not go with the first.
    """
    if not recipe.several:
        return (BoundTeacher(name="", recipe=recipe, bound=first),)
    _refuse_published(first)
    hashes = FileHashes(recipe.storage.dir, remember=write)
    found = []
    for number, one in enumerate(recipe.several):
        alone = recipe.of_teacher(one) if number == 0 else _beside_the_first(recipe, one)
        bound = first if number == 0 else _bound(alone, first, store, hashes, write=write)
        found.append(BoundTeacher(name=one.name, recipe=alone, bound=bound))
    _refuse_strangers(found, store)
    return tuple(found)


def _refuse_published(first: Bound) -> None:
    """Refuse published rows in place of the data.

    They are one teacher's, without the prompts that `where` asks.

    Raises:
        UsageError: with what to do.
    """
    if first.published is not None:
        raise UsageError(
            f"teachers: teacher or data are not here ({first.missing}), and the rows published in "
            f"{first.published.root} are those of one teacher, without prompts. Put the data and "
            "the first teacher there again; or take the folder as teacher.model and data.source, "
            "without `teachers`."
        )


def _beside_the_first(recipe: Recipe, one: OneTeacher) -> Recipe:
    """The recipe with another teacher alone, which scores what the first one writes."""
    alone, generate = recipe.of_teacher(one), recipe.generate
    if generate is None or generate.model is not None:
        return alone
    # Else its binding would say that the other teacher wrote this text.
    author = generate.model_copy(update={"model": recipe.teacher.model})
    return alone.model_copy(update={"generate": author})


def _bound(
    alone: Recipe, first: Bound, store: Store | None, hashes: FileHashes, *, write: bool
) -> Bound:
    """Another teacher on the first one's data; where it is gone, as the store has it."""
    try:
        teacher = teacher_identity(alone, hashes, download=write)
    except UsageError as error:
        written = written_binding(alone, store)
        if written is None:
            raise
        binding = replace(
            first.binding,
            teacher_id=written.teacher_id,
            vocab_size=written.vocab_size,
            context_tokens=written.context_tokens,
        )
        return replace(first, binding=binding, teacher=None, missing=str(error))
    if alone.score is not None:
        refuse_engine(alone.score.named_engine, teacher, field="score.engine")
    binding = replace(
        first.binding,
        teacher_id=teacher.id,
        vocab_size=teacher.outcomes(alone.run.task),
        context_tokens=teacher.context_tokens,
    )
    return replace(first, binding=binding, teacher=teacher)


def _refuse_strangers(teachers: Sequence[BoundTeacher], store: Store | None) -> None:
    """Refuse teachers that are one, or whose distributions are over other outcomes.

    Raises:
        UsageError: with both names and what differs.
    """
    first = teachers[0]
    for number, one in enumerate(teachers):
        for other in teachers[:number]:
            if one.id == other.id:
                raise UsageError(
                    f"{one.field}: is the same model as {other.name!r} ({one.id}). Its rows are "
                    "stored once: name it once, with the weight of both."
                )
        reason = _stranger(first, one, store)
        if reason is not None:
            raise UsageError(
                f"{one.field}: {one.recipe.teacher.model} does not go with the first teacher, "
                f"{first.recipe.teacher.model}: {reason}. Name teachers of one vocabulary; another "
                "one can teach a student of its own."
            )


def _stranger(first: BoundTeacher, one: BoundTeacher, store: Store | None) -> str | None:
    """Why the distributions of two teachers are over other outcomes; None: they are not."""
    task, a, b = TASKS[one.recipe.run.task], _folder(first, store), _folder(one, store)
    if a is not None and b is not None:
        if task.labelled and (names := (_classes(first, a), _classes(one, b)))[0] != names[1]:
            return (
                f"its classes are {', '.join(names[1])}, those of the first {', '.join(names[0])}"
            )
        reason = (compare_processors if task.structure.images else compare_tokenizers)(a, b)
        if reason is not None:
            return f"{reason} (first: the first teacher, second: this one)"
    sizes = first.bound.binding.vocab_size, one.bound.binding.vocab_size
    if sizes[0] != sizes[1]:
        return f"it tells {sizes[1]} outcomes apart, the first one {sizes[0]}"
    return None


def _folder(one: BoundTeacher, store: Store | None) -> Path | None:
    """A teacher's small files: where it is, or what the store keeps of one that is gone.

    It is None where the store keeps nothing of it.
    """
    if one.bound.teacher is not None:
        return one.bound.teacher.folder
    if store is None or not store.teacher_parts(one.id):
        return None
    return store.teacher_dir(one.id)


def _classes(one: BoundTeacher, folder: Path) -> tuple[str, ...]:
    """Its classes; an adapter may name others than the folder."""
    return names_in(folder) if one.bound.teacher is None else one.bound.teacher.class_names


def teacher_notes(recipe: Recipe) -> Iterator[str]:
    """What is decided by the order of the teachers, for people."""
    if not recipe.several:
        return
    first = recipe.several[0].name
    yield f"several teachers: the data are read with the tokenizer of the first, {first}"
    if recipe.generate is not None and recipe.generate.model is None:
        yield f"the text is written by the first teacher, {first}"


def quantized_notes(teachers: Sequence[BoundTeacher]) -> Iterator[str]:
    """How teachers are quantised: by what is here of them, or by the recipe where they are gone."""
    for one in teachers:
        teacher = one.bound.teacher
        how = one.recipe.teacher.quantize if teacher is None else teacher.quantized
        if how:
            yield f"{one.field}: {one.recipe.teacher.model} is quantised: {how}"


def entry_notes(recipe: Recipe, outcomes: int) -> Iterator[str]:
    """Entries and draws that are more than a teacher tells apart, and what is kept then.

    Args:
        recipe: The recipe.
        outcomes: V, of its teachers; 0: nobody knows.
    """
    score, keep = recipe.score, recipe.generate.keep if recipe.generate is not None else None
    if not outcomes:
        return
    whole = f"of the {outcomes:,} outcomes that the teacher tells apart"
    if keep is not None and keep.k > outcomes:
        yield f"generate.keep.k: {keep.k:,} are more than there are: every one {whole} is kept"
    if score is None or score.structure.whole:
        return
    full = "score.targets: full has the whole distribution as well"
    least = score.k_min if "k_min" in score.kind.settings else score.k
    if score.structure.drawn:
        if score.rounds >= outcomes:
            yield f"score.rounds: {score.rounds:,} draws {whole}; {full}, without their noise"
    elif least >= outcomes:
        name = "k_min" if "k_min" in score.kind.settings else "k"
        yield f"score.{name}: {least:,} entries: every one {whole} is kept; {full}, in fewer bytes"
    elif score.k > outcomes:
        yield f"score.k: {score.k:,} limits nothing: it is more than all {whole}"


def teachers_json(teachers: Sequence[BoundTeacher]) -> dict[str, Any]:
    """Who several teachers are, for programs and for the records of a run."""
    return {one.name: one.id for one in teachers if one.name}
