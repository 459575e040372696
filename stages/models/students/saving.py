"""The plain model folder that a student ends up in, in files that others read.

It holds what was trained, and what the student began as.

Weights come from the training, in the numbers that the base was stored in. Tokenizer and generation
config are the base's own files. What reads the folder later (evaluate, too) reads these.
"""

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from ....storage.errors import StillroomError
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ..fit.parts import parts_of
from ..fit.processor import PROCESSOR
from ..identity import is_here
from .config_file import NotInOlderWords, with_older_words
from .copies import copied_from
from .factory import FactoryStudent, save_factory_student
from .factory_file import FACTORY
from .lora import merged_as_trained
from .stored_tensors import stored_dtype
from .student import student_folder, student_tokenizer
from .tokenizer_files import copy_tokenizer

_CONFIG = "config.json"
_CONFIGS = (_CONFIG, "adapter_config.json", FACTORY)
_GENERATION = "generation_config.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """What became of a student on disk, beside its weights."""

    dtype: str
    """Of the weights in the folder; training kept them in float32."""
    notes: list[str]
    """What is otherwise there than the base had it, for log and card."""


def save_student(
    model: Any, recipe: Recipe, *, teacher_dir: Path, folder: Path, adapter: Path | None = None
) -> Saved:
    """Write a plain model folder that transformers and vLLM load.

    LoRA is merged into the weights for good.

    Args:
        model: The student as it was trained.
        recipe: What it began as, and what its weights are stored in.
        teacher_dir: Holds the teacher's tokenizer.
        folder: Appears under its name when it is complete.
        adapter: Where the adapter of a LoRA student is kept by itself, as PEFT loads it onto the
            initial model.

    Raises:
        StillroomError: the folder cannot be written, the merged model says something else than the
            trained one, or its weights do not fit into the numbers that they are stored in.
    """
    base, tokenizer = student_folder(recipe), student_tokenizer(recipe, teacher_dir)
    source = teacher_dir if base is None else base

    def reads(part: Path) -> None:
        """How text or images become its input; images as they became the teacher's."""
        if tokenizer is None:
            shutil.copyfile(teacher_dir / PROCESSOR, part / PROCESSOR)
        else:
            copy_tokenizer(source, part, tokenizer)

    if adapter is not None:

        def adapter_files(part: Path) -> None:
            model.save_pretrained(part)
            _mend_adapter(part, recipe)
            reads(part)

        _put_folder(adapter, adapter_files)
    if isinstance(model, FactoryStudent):

        def made_files(part: Path) -> None:
            save_factory_student(model, recipe, part)
            reads(part)

        _put_folder(folder, made_files)
        return Saved(dtype="float32", notes=[])
    plain = merged_as_trained(model)
    dtype = _dtype(recipe, base)
    notes: list[str] = []

    def model_files(part: Path) -> None:
        notes.extend(_put_model(plain, part, base=source, dtype=dtype))
        reads(part)

    _put_folder(folder, model_files)
    return Saved(dtype=dtype, notes=notes)


def _put_folder(folder: Path, write: Callable[[Path], None]) -> None:
    part = folder.with_name(folder.name + ".part")
    for old in (part, folder):
        if old.exists():
            shutil.rmtree(old)
    try:
        part.mkdir(parents=True)
        write(part)
        _like_its_config(part)
        part.rename(folder)
    except (OSError, SafetensorError) as error:
        raise StillroomError(
            f"{folder}: cannot write the student ({error}). Free space or fix permissions there, "
            "and run the same command again; its checkpoint is kept."
        ) from error


def _like_its_config(part: Path) -> None:
    """Whoever may read the config may read the weights, which safetensors keeps to their owner."""
    (config,) = (part / name for name in _CONFIGS if (part / name).is_file())
    for file in part.iterdir():
        shutil.copymode(config, file)


def _put_model(plain: PreTrainedModel, part: Path, *, base: Path, dtype: str) -> list[str]:
    """Weights, config.json and generation_config.json; what is to be said of them."""
    weights = _stored(plain, getattr(torch, dtype))
    own: Any = getattr(plain, "generation_config", None)
    try:
        # transformers refuses to save a model beside a generation config that it finds fault with.
        plain.generation_config = own and GenerationConfig()
        plain.save_pretrained(part, state_dict=weights)
    finally:
        plain.generation_config = own
    if own is not None:
        _put_generation(part / _GENERATION, own, base / _GENERATION)
    return _mend_config(part / _CONFIG, dtype)


def _put_generation(path: Path, own: GenerationConfig, base: Path) -> None:
    """Copy the base's file as it is.

    What it says of sampling is its maker's, whatever a check says of it.
    """
    if base.is_file():
        shutil.copyfile(base, path)
    else:
        own.to_json_file(path)


def _mend_config(path: Path, dtype: str) -> list[str]:
    """Make a config readable for transformers 4.57 too, without this machine's folders.

    What could not be done is returned.
    """
    saved = _without(json.loads(path.read_text("utf-8")), "_name_or_path")
    written = _in_dtype(_without(saved, "auto_map"), dtype)  # no student has code of its own
    _write(path, written)
    right = _read(path.parent)
    try:
        _write(path, with_older_words(written))
        found = _read(path.parent)
        if all(found.get(name) == value for name, value in right.items()):
            return []
        why = "what 4.57 reads, 5 would read otherwise"
    except NotInOlderWords as error:
        why = str(error)
    _write(path, written)
    return [f"read it with transformers 5: 4.57 would compute something else ({why})"]


def _read(folder: Path) -> dict[str, Any]:
    """A config as transformers 5 reads it.

    `type` is an older name for `rope_type`, kept beside it.
    """
    config: dict[str, Any] = _without(
        AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict(), "type"
    )
    return config


def _without(config: Any, name: str) -> Any:
    """Without a field, in the parts of a composite model too."""
    if not isinstance(config, dict):
        return config
    return {key: _without(value, name) for key, value in config.items() if key != name}


def _in_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    parts = {name: _in_dtype(part, dtype) for name, part in parts_of(config).items()}
    return config | parts | {"dtype": dtype}


def _mend_adapter(part: Path, recipe: Recipe) -> None:
    """Take PEFT's card and the folders of this machine out of a saved adapter.

    The initial model stays named if it is a Hub id. Of a folder not even the last part stays: it
    could be another model's name on the Hub, and PEFT would load that.
    """
    (part / "README.md").unlink(missing_ok=True)
    path, base = part / "adapter_config.json", needed(recipe.student, "student").model
    config = json.loads(path.read_text("utf-8"))
    on_hub = base is not None and not is_here(base)
    _write(path, config | {"base_model_name_or_path": base if on_hub else None})


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")


def _dtype(recipe: Recipe, base: Path | None) -> str:
    asked = needed(recipe.student, "student").save_dtype
    if asked != "auto":
        return asked
    stored = base or copied_from(recipe)
    return "float32" if stored is None else stored_dtype(stored)


def _stored(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """The weights as they are stored; tied ones stay one tensor.

    Raises:
        StillroomError: a number is too large for it.
    """
    precise = {*(getattr(model, "_keep_in_fp32_modules_strict", None) or ())}
    if dtype == torch.float16:
        precise |= {*(getattr(model, "_keep_in_fp32_modules", None) or ())}
    made: dict[tuple[int, int], Tensor] = {}
    stored = {}
    for name, tensor in model.state_dict().items():
        kept = any(re.search(rf"(^|\.){part}($|\.)", name) for part in precise)
        if kept or not tensor.is_floating_point() or tensor.dtype == dtype:
            stored[name] = tensor
            continue
        memory = tensor.data_ptr(), tensor.numel()
        if memory not in made:
            made[memory] = _cast(name, tensor, dtype)
        stored[name] = made[memory]
    return stored


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to("cpu", dtype)
    if cast.isfinite().all() or not tensor.isfinite().all():
        return cast
    raise StillroomError(
        f"student.save_dtype: {name} has numbers up to {float(tensor.abs().max()):.3g}, more than "
        f"{str(dtype).removeprefix('torch.')} holds. Set student.save_dtype to float32 or "
        "bfloat16, and run again; its checkpoint is kept."
    )
