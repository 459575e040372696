"""The student: an existing model or fresh weights, its tokenizer, LoRA, and the plain model folder it ends up in.

Weights are always float32 here; what a pass computes in is the training loop's choice.
"""

import difflib
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from ...storage.errors import StillroomError, UsageError
from ..recipe.sections import Lora, Recipe
from ..recipe.stages import needed
from ..recipe.tasks import module_of
from .classes import refuse_other_classes
from .identity import find_model
from .loading import ModelKind
from .same_tokenizer import refuse_other_tokenizer


def initial_student(recipe: Recipe, teacher_dir: Path) -> nn.Module:
    """The student before training, a pure function of recipe and `run.seed`.

    Args:
        recipe: Its `student` section names a model, or gives changes to the teacher's config.
        teacher_dir: Folder with the teacher's config.json and tokenizer; weights are not needed.

    Returns:
        A model of the task's kind in float32, inside a PEFT model if `student.lora` is set.

    Raises:
        UsageError: the model, the config or the adapter cannot be made.
    """
    section = needed(recipe.student, "student")
    folder, kind = _folder(recipe), kind_of(recipe, teacher_dir)
    refuse_other_classes(recipe, folder, kind.classes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.run.seed)
        student: nn.Module
        if folder is not None:
            student = kind.student(folder)
        else:
            assert section.config is not None
            student = _fresh(teacher_dir, section.config, kind)
        if section.lora is None:
            return student
        adapted = _with_lora(student, section.lora, kind.adapter)
        # As the recipe names it, not where it was found here.
        adapted.peft_config["default"].base_model_name_or_path = section.model
        student = adapted
        return student


def load_student(recipe: Recipe, teacher_dir: Path, folder: Path) -> PreTrainedModel:
    """A student that was trained before, in float32.

    Raises:
        UsageError: the folder holds none.
    """
    return kind_of(recipe, teacher_dir).student(folder)


def kind_of(recipe: Recipe, teacher_dir: Path) -> ModelKind:
    """What the recipe's task makes of a student of this teacher."""
    kind: ModelKind = module_of(recipe.run.task, __package__).student_kind(teacher_dir)
    return kind


def student_tokenizer(recipe: Recipe, teacher_dir: Path) -> PreTrainedTokenizerBase:
    """The student's tokenizer; with the teacher's chat template if the teacher has one.

    The template goes with the text: the student learns to answer prompts as the teacher's template
    writes them.
    """
    teacher = AutoTokenizer.from_pretrained(teacher_dir)
    folder = _folder(recipe)
    if folder is None:
        return teacher
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = teacher.chat_template or tokenizer.chat_template
    return tokenizer


def check_vocabulary(recipe: Recipe, teacher_dir: Path) -> None:
    """Refuse a student whose tokenizer is not the teacher's: the same ids would mean other text.

    Raises:
        UsageError: with both names and the first difference.
    """
    folder = _folder(recipe)
    if folder is not None:
        refuse_other_tokenizer(recipe, folder, teacher_dir)


def save_student(
    model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path, *, adapter: Path | None = None
) -> None:
    """Write a plain model folder that transformers and vLLM load; LoRA is merged into the weights for good.

    Args:
        model: The student as it was trained.
        tokenizer: Saved beside it.
        folder: Appears under its name when it is complete.
        adapter: Where the adapter of a LoRA student is kept by itself, as PEFT loads it onto the
            initial model.
    """
    if adapter is not None:
        _put_folder(model, tokenizer, adapter)
    _put_folder(merged(model), tokenizer, folder)


def _put_folder(model: Any, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    part = folder.with_name(folder.name + ".part")
    for old in (part, folder):
        if old.exists():
            shutil.rmtree(old)
    try:
        model.save_pretrained(part)
        tokenizer.save_pretrained(part)
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise StillroomError(
            f"{folder}: cannot write the student ({error}). Free space or fix permissions there, "
            "and run the same command again; its checkpoint is kept."
        ) from error


def merged(model: Any) -> PreTrainedModel:
    """The plain model: LoRA is added to the weights for good."""
    plain: PreTrainedModel = (
        model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    )
    return plain


def _folder(recipe: Recipe) -> Path | None:
    student = needed(recipe.student, "student")
    if student.model is None:
        return None
    return find_model(student.model, student.revision, field="student.model", download=True)


def _fresh(teacher_dir: Path, overrides: dict[str, Any], kind: ModelKind) -> PreTrainedModel:
    try:
        config = _changed(AutoConfig.from_pretrained(teacher_dir).get_text_config(), overrides)
        model = kind.fresh(config)
        with torch.no_grad():  # numbers of heads that do not divide show up here only
            model.base_model(input_ids=torch.zeros(1, 2, dtype=torch.long))
    except UsageError:
        raise
    # transformers has many kinds for a config that does not hold together.
    except Exception as error:
        raise UsageError(
            f"student.config: {overrides} does not fit the teacher's config ({error}). Change the "
            "numbers."
        ) from error
    if (teacher_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(teacher_dir)
    return model


def _changed(config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    known = config.to_dict()
    for name in overrides:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {near[0]}?"
                if near
                else f"{config.model_type} has: {', '.join(sorted(known))}."
            )
            raise UsageError(f"student.config.{name}: not a field of the teacher's config. {hint}")
    if "num_hidden_layers" in overrides and "layer_types" not in overrides:
        # One entry per layer of the teacher; left out, the architecture's own pattern fills it in.
        known.pop("layer_types", None)
    return type(config).from_dict(known | overrides)


def _with_lora(model: PreTrainedModel, lora: Lora, task: str) -> Any:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        # PEFT divides by r: any number will do
        lora_alpha=lora.scale * lora.rank,  # type: ignore[arg-type]
        lora_dropout=lora.dropout,
        target_modules=lora.target_modules,
        task_type=task,  # a new head over classes trains whole
    )
    try:
        adapted = get_peft_model(model, config)
    except ValueError as error:
        raise UsageError(
            f"student.lora.target_modules: {lora.target_modules} does not fit the model ({error})."
        ) from error
    output = model.get_output_embeddings()
    if (
        hasattr(output, "lora_A")
        and output.get_base_layer().weight is model.get_input_embeddings().weight
    ):
        raise UsageError(
            f"student.lora.target_modules: {lora.target_modules} names the output layer, whose "
            "weight is the input embedding too; merged into it, the update would change both. "
            "Leave the output layer out."
        )
    return adapted
