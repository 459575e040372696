"""What would only fail after the teacher's work, and can be seen in small files before it."""

from pathlib import Path

from ...stages.models.fit.classes import refuse_other_classes, refuse_other_head
from ...stages.models.fit.misfits import refuse_misfit, refuse_quantised, refuse_shared_norms
from ...stages.models.identity import Identity, find_model, is_here, refuse_without_weights
from ...stages.models.inputs.same_tokenizer import refuse_other_tokenizer
from ...stages.models.students.fresh import refuse_fresh
from ...stages.models.students.stored_tensors import refuse_lora
from ...stages.recipe.sections import Recipe, Student
from ...stages.recipe.stages import needed
from ...stages.recipe.tasks import TASKS
from ...stages.targets.masks import masks_of
from ...storage.errors import UsageError
from ...storage.words import counted
from .endpoint import refuse_entries
from .features import refuse_features
from .lengths import refuse_unread
from .resolve import Bound, refuse_start
from .teachers import BoundTeacher


def refuse_early(recipe: Recipe, bound: Bound, *, write: bool) -> None:
    """What would only fail after the teacher's work, and can be seen in small files before it."""
    folder = student_folder(recipe.student, write=write)
    refuse_features(recipe, bound, folder)
    if recipe.student is not None and folder is not None:
        field, name = "student.model", str(recipe.student.model)
        refuse_quantised(folder, field=field, name=name)
        refuse_misfit(folder, recipe.run.task, field=field, name=name)
    if bound.teacher is None or bound.author is None:
        return
    generate = recipe.generate
    keeps = generate is not None and generate.keep is not None and not generate.teaches
    if keeps and bound.author.id != bound.teacher.id:
        raise UsageError(
            f"generate.keep: the model that writes ({bound.author.id}) is not the teacher that "
            f"score names ({bound.teacher.id}), whose distributions are wanted. Remove "
            "generate.keep, or generate.model."
        )
    refuse_entries(recipe, bound.binding.vocab_size)
    refuse_other_head(recipe, bound.teacher.parts["config"])
    masks_of(recipe, bound.teacher.folder)  # refuses a tokenizer that has none
    refuse_unread(recipe, bound)
    if recipe.data.records.conversation and not bound.author.parts["chat_template"]:
        raise UsageError(
            f"data.format: {recipe.data.format!r} needs a chat template, and "
            f"{bound.author.folder} has none. Save one in the model's folder "
            "(chat_template.jinja), or use format 'prompt' or 'completion'."
        )
    if recipe.student is not None:
        _refuse_student(recipe, folder, bound.teacher, write=write)


def refuse_another(one: BoundTeacher) -> None:
    """What a teacher beside the first cannot do; the student begins from the first one."""
    if one.bound.teacher is not None:
        refuse_features(one.recipe, one.bound, None)
        refuse_other_head(one.recipe, one.bound.teacher.parts["config"])
        refuse_unread(one.recipe, one.bound)


def refuse_all_aside(recipe: Recipe, prompts: int) -> None:
    """Refuse to set all prompts to train on aside for validation.

    Raises:
        UsageError: there are no more than `train.validation_prompts`.
    """
    train = recipe.train
    if train is None or train.evaluate_every_tokens is None or train.snapshot is not None:
        return
    if prompts <= train.validation_prompts:
        aside = counted(train.validation_prompts, "prompt is", "prompts are")
        there = f"there {'is' if prompts == 1 else 'are'} {prompts:,} to train on"
        fewer = f"Set it to less than {prompts:,} (a tenth is usual), or leave"
        raise UsageError(
            f"{aside} to be set aside (train.validation_prompts), and {there}. "
            f"{fewer if prompts > 1 else 'Leave'} train.evaluate_every_tokens out."
        )


def _refuse_student(recipe: Recipe, folder: Path | None, teacher: Identity, *, write: bool) -> None:
    """Refuse a student that does not go with this teacher.

    Of one that is not here yet nothing is known.
    """
    student = needed(recipe.student, "student")
    if student.model is None and student.factory is None:
        layers = student.from_teacher_layers
        refuse_fresh(teacher.folder, student.config or {}, recipe.run.task, layers)
        _refuse_fresh_norms(recipe, teacher)
    if folder is not None or student.model is None:
        refuse_other_classes(recipe, folder, teacher.class_names)
    if folder is not None:
        refuse_other_tokenizer(recipe, folder, teacher.folder)
        refuse_shared_norms(folder, recipe.compute.processes)
        if is_here(str(student.model)):  # of the Hub's only small files are here
            refuse_without_weights(folder, "student.model")
        refuse_lora(recipe, folder)
    if student.from_teacher_layers is not None:
        refuse_start(recipe, teacher, write=write)
        refuse_lora(recipe, teacher.folder)


def _refuse_fresh_norms(recipe: Recipe, teacher: Identity) -> None:
    """Batch norms of a student with new weights, whatever architecture its teacher has."""
    several = recipe.compute.processes not in ("auto", 1)
    if several and TASKS[recipe.run.task].structure.images:
        from ...stages.models.students.student import refuse_fresh_norms

        refuse_fresh_norms(recipe, teacher.folder)


def student_folder(student: Student | None, *, write: bool) -> Path | None:
    """Where an existing student is; None if it is not here, for stage one needs none."""
    if student is None or student.model is None:
        return None
    name, revision = student.model, student.revision
    try:
        return find_model(name, revision, field="student.model", download=write, weights=False)
    except UsageError:
        if is_here(name):
            raise
        return None
