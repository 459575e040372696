"""The teachers of a recipe, one by one: what each one's name stands for, its line of the plan, what is said of it.

The data are read once, with the first teacher's tokenizer, and the first teacher writes where
`generate` names nobody else. So of the others only who they are matters, and that they read the same
tokens. Each has a binding of its own, under the names that a recipe with it alone would have.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ...stages.models.fit.processor import compare_processors
from ...stages.models.identity import FileHashes, Identity
from ...stages.models.inputs.same_tokenizer import compare_tokenizers
from ...stages.recipe.sections import OneTeacher, Recipe
from ...stages.recipe.tasks import TASKS
from ...storage.errors import UsageError
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
    hashes = FileHashes(recipe.storage.dir, remember=write)
    found = []
    for number, one in enumerate(recipe.several):
        alone = recipe.of_teacher(one)
        bound = first if number == 0 else _bound(alone, first, store, hashes, write=write)
        found.append(BoundTeacher(name=one.name, recipe=alone, bound=bound))
    _refuse_strangers(found)
    return tuple(found)


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
    binding = replace(
        first.binding,
        teacher_id=teacher.id,
        vocab_size=teacher.outcomes(alone.run.task),
        context_tokens=teacher.context_tokens,
    )
    return replace(first, binding=binding, teacher=teacher)


def _refuse_strangers(teachers: Sequence[BoundTeacher]) -> None:
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
        reason = _stranger(first, one)
        if reason is not None:
            raise UsageError(
                f"{one.field}: {one.recipe.teacher.model} does not go with the first teacher, "
                f"{first.recipe.teacher.model}: {reason}. Name teachers of one vocabulary; another "
                "one can teach a student of its own."
            )


def _stranger(first: BoundTeacher, one: BoundTeacher) -> str | None:
    """Why the distributions of two teachers are over other outcomes; None: they are not."""
    a, b = first.bound.teacher, one.bound.teacher
    labelled = TASKS[one.recipe.run.task].labelled
    if a is not None and b is not None:
        if labelled and a.class_names != b.class_names:
            return f"its classes are {_listed(b)}, those of the first {_listed(a)}"
        images = TASKS[one.recipe.run.task].structure.images
        reason = (compare_processors if images else compare_tokenizers)(a.folder, b.folder)
        if reason is not None:
            return f"{reason} (first: the first teacher, second: this one)"
    sizes = first.bound.binding.vocab_size, one.bound.binding.vocab_size
    if sizes[0] != sizes[1]:
        return f"it tells {sizes[1]} outcomes apart, the first one {sizes[0]}"
    return None


def _listed(teacher: Identity) -> str:
    return ", ".join(teacher.class_names)


def teacher_notes(recipe: Recipe) -> Iterator[str]:
    """What is decided by the order of the teachers, for people."""
    if not recipe.several:
        return
    first = recipe.several[0].name
    yield f"several teachers: the data are read with the tokenizer of the first, {first}"
    if recipe.generate is not None and recipe.generate.model is None:
        yield f"the text is written by the first teacher, {first}"


def teachers_json(teachers: Sequence[BoundTeacher]) -> dict[str, Any]:
    """Of several teachers, who they are: for programs, and for the records of a run."""
    return {one.name: one.id for one in teachers if one.name}
