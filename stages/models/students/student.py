"""The student, with its adapter and its tokenizer.

It is an existing model, layers of the teacher, or fresh weights.

Weights are always float32 here; what a pass computes in is the training loop's choice.
"""

from pathlib import Path

import torch
from torch import nn
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ....storage.errors import answered
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ...recipe.tasks import TASKS
from ..device import evaluating
from ..fit.classes import refuse_other_classes
from ..fit.misfits import shared_norm
from ..head import backbone
from ..identity import find_model
from ..inputs.same_tokenizer import refuse_other_tokenizer
from ..loading import ModelKind
from .copies import copied_from, copied_student
from .factory import factory_student, load_factory_student
from .fresh import fresh_config
from .kinds import kind_of
from .lora import with_lora


def initial_student(recipe: Recipe, teacher_dir: Path) -> nn.Module:
    """The student before training, a pure function of recipe and `run.seed`.

    Args:
        recipe: Its `student` section names a model, or gives changes to the teacher's config.
        teacher_dir: Folder with the teacher's config.json and tokenizer. Weights, where some are
            copied, are those of `teacher.model`.

    Returns:
        A model of the task's kind in float32, inside a PEFT model if `student.lora` is set.

    Raises:
        UsageError: the model, the config or the adapter cannot be made.
    """
    lora = needed(recipe.student, "student").lora
    folder, kind = student_folder(recipe), kind_of(recipe, teacher_dir)
    refuse_other_classes(recipe, folder, kind.classes)
    made_by_code = needed(recipe.student, "student").factory is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        student: nn.Module
        if made_by_code:  # it has no adapter
            return factory_student(recipe, teacher_dir, kind)
        if folder is not None:
            student = kind.student(folder)
        else:
            student = _made(recipe, teacher_dir, kind)
        if lora is None:
            return student
        adapted: nn.Module = with_lora(student, lora, kind.adapter)
        return adapted


def load_student(recipe: Recipe, teacher_dir: Path, folder: Path) -> nn.Module:
    """A student that was trained before, in float32.

    Raises:
        UsageError: the folder holds none.
    """
    kind = kind_of(recipe, teacher_dir)
    if needed(recipe.student, "student").factory is not None:
        # What it draws and no file of weights holds is as it was in training.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(recipe.run.seed)
            return load_factory_student(recipe, teacher_dir, kind, folder)
    return kind.student(folder)


def student_tokenizer(recipe: Recipe, teacher_dir: Path) -> PreTrainedTokenizerBase | None:
    """The student's tokenizer, with the teacher's chat template if the teacher has one.

    It is None where the student reads images.

    The template goes with the text: the student learns to answer prompts as the teacher's template
    writes them.
    """
    if TASKS[recipe.run.task].structure.images:
        return None
    teacher = _tokenizer(teacher_dir)
    folder = student_folder(recipe)
    if folder is None:
        return teacher
    tokenizer = _tokenizer(folder)
    tokenizer.chat_template = teacher.chat_template or tokenizer.chat_template
    return tokenizer


def check_vocabulary(recipe: Recipe, teacher_dir: Path) -> None:
    """Refuse a student whose tokenizer is not the teacher's: the same ids would mean other text.

    Raises:
        UsageError: with both names and the first difference.
    """
    folder = student_folder(recipe)
    if folder is not None:
        refuse_other_tokenizer(recipe, folder, teacher_dir)


def _tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    with answered(f"{folder}: the tokenizer does not load", "Save the model again."):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
    return tokenizer


def student_folder(recipe: Recipe) -> Path | None:
    """The folder of the model that the student begins as.

    It is None where the student is made of the teacher's config.
    """
    student = needed(recipe.student, "student")
    if student.model is None:
        return None
    return find_model(student.model, student.revision, field="student.model", download=True)


def _made(recipe: Recipe, teacher_dir: Path, kind: ModelKind) -> PreTrainedModel:
    """A student made of the teacher's config, with copies of its layers or fresh weights."""
    weights = copied_from(recipe)
    if weights is None:
        model = _fresh(recipe, teacher_dir, kind)
    else:
        model = copied_student(recipe, teacher_dir, weights, kind)
    file = teacher_dir / "generation_config.json"
    if file.is_file():
        with answered(f"{file}: not readable", "Restore it, or delete it."):
            model.generation_config = GenerationConfig.from_pretrained(teacher_dir)
    return model


def _fresh(recipe: Recipe, teacher_dir: Path, kind: ModelKind) -> PreTrainedModel:
    overrides = needed(recipe.student, "student").config or {}
    config = fresh_config(teacher_dir, overrides, task=recipe.run.task)
    # transformers has many kinds of errors for a config that does not hold together.
    with answered(f"student.config: {overrides} does not hold together", "Change the numbers."):
        model = kind.fresh(config)
        # Numbers of heads that do not divide, and images of another size, show up here only.
        with torch.no_grad(), evaluating(model):
            backbone(model)(**kind.example)
    return model


def refuse_fresh_norms(recipe: Recipe, teacher_dir: Path) -> None:
    """`refuse_norms` of a student with fresh weights, before it has any.

    Raises:
        NotTogether: it has batch norms.
    """
    overrides = needed(recipe.student, "student").config or {}
    kind = kind_of(recipe, teacher_dir)
    with torch.device("meta"):
        made = kind.fresh(fresh_config(teacher_dir, overrides, task=recipe.run.task))
    refuse_norms(made)


def refuse_norms(student: nn.Module) -> None:
    """Refuse a student whose statistics would be of a rank's part of a step.

    Raises:
        NotTogether: it has batch norms.
    """
    for name, module in student.named_modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise shared_norm(name)
