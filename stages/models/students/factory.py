"""A student that is no model of transformers, as the stages know models.

A function of the user's makes it.

The function is called with keywords: `classes`, their number; of images `channels`, `height` and
`width`; of texts `vocab_size` and `padding`, the id that fills rows up; and `student.args`. It
returns a `torch.nn.Module` whose forward takes what transformers' classifiers take (`pixel_values`;
or `input_ids`, `attention_mask` and, where the tokenizer makes them, `token_type_ids`) and returns
logits [B, C].
"""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedConfig

from ....storage.errors import UsageError, answered
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ..classification import Inputs
from ..device import evaluating
from ..fit.files import read_json
from ..loading import ModelKind
from .factory_file import FACTORY, FIELD, factory_file, factory_files, files_of_module

_WEIGHTS = "model.safetensors"
_Config: Any = PreTrainedConfig  # it takes whatever fields a model has


class FactoryStudent(nn.Module):
    """A module of the user's, with what the stages ask of a model of transformers."""

    def __init__(
        self, model: nn.Module, config: Any, told: dict[str, Any], files: dict[str, str]
    ) -> None:
        """`told` is what the function was called with.

        `files` has hashes of what was run, as `factory_files` has them.
        """
        super().__init__()
        self.model, self.config, self.told, self.files = model, config, told, files

    def forward(self, **inputs: Tensor) -> SimpleNamespace:
        """`logits` [B, C]."""
        said: Any = self.model(**inputs)
        return SimpleNamespace(logits=getattr(said, "logits", said))

    @property
    def device(self) -> torch.device:
        """Of its weights."""
        return next(self.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Of its weights."""
        return next(self.parameters()).dtype

    def get_input_embeddings(self) -> SimpleNamespace:
        """Whose `num_embeddings` is the teacher's vocabulary, which it was told."""
        return SimpleNamespace(num_embeddings=self.config.vocab_size)


def factory_student(recipe: Recipe, teacher_dir: Path, kind: ModelKind) -> FactoryStudent:
    """What the recipe's function makes, in float32. Its draws follow from `torch`'s seed.

    Raises:
        UsageError: there is no such function, it fails, or what it makes says nothing of the
            classes.
    """
    student = needed(recipe.student, "student")
    path, name = factory_file(str(student.factory))
    about, config = _about(teacher_dir, kind)
    files, before = factory_files(student), set(sys.modules)
    with answered(f"{FIELD}: {student.factory} makes no student", f"Mend {path}."):
        made_by = getattr(_module(path, files), name, None)
        if made_by is None:
            raise AttributeError(f"it has no {name}")
        told = about | (student.args or {})
        made = made_by(**told)
        if not isinstance(made, nn.Module) or not any(True for _ in made.parameters()):
            raise TypeError(f"{name} returned {type(made).__name__}, not a module with weights")
        found = FactoryStudent(made.float(), config, told, files)
        with torch.no_grad(), evaluating(found):
            said = found(**_example(kind, found, teacher_dir)).logits
        _check_neighbours(path.parent, files, before=before)
        if said.shape != (2, len(kind.classes)):
            raise ValueError(
                f"its logits of two rows are {list(said.shape)}, expected [2, {len(kind.classes)}]"
            )
    return found


def _example(kind: ModelKind, student: FactoryStudent, teacher_dir: Path) -> dict[str, Tensor]:
    """Two rows as the stages give them; texts with all that comes beside their ids."""
    if "pixel_values" in kind.example:
        return {name: torch.cat([row, row]) for name, row in kind.example.items()}
    return Inputs.of(student, teacher_dir).tensors([np.zeros(2, np.int64)] * 2)


def _module(path: Path, files: dict[str, str]) -> ModuleType:
    """What a file is as a module.

    It is run for this, with its folder behind all others that Python looks in.
    """
    folder = path.parent.absolute()
    if str(folder) not in sys.path:
        sys.path.append(str(folder))  # for good: a forward pass may import, too
    for name, file in _of_folder(folder).items():
        if file in files:  # it may have changed
            del sys.modules[name]
    module = ModuleType(f"stillroom_factory_{path.stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # dataclasses, say, look there for where they stand
    exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
    return module


def _of_folder(folder: Path) -> dict[str, str]:
    """The modules that were imported from a folder that Python looks in.

    Each has the name of its file from there.
    """
    there = {}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if file is not None and Path(file) in files_of_module(folder, name):
            there[name] = Path(file).relative_to(folder).as_posix()
    return there


def _check_neighbours(folder: Path, files: dict[str, str], *, before: Collection[str]) -> None:
    """What was imported from the folder is what was hashed, and the other way round.

    `before` has the modules that were imported before.

    Raises:
        ImportError: it is not.
    """
    imported = _of_folder(folder.absolute())
    for name, file in imported.items():
        if file not in files and name not in before:
            raise ImportError(
                f"it imports {file} by no import statement, so that file would be no part of who "
                f"the student is. Write `import {name}`"
            )
    for file in files:
        name = file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        if file.endswith(".py") and name in sys.modules and name not in imported:
            raise ImportError(
                f"`import {name}` finds "
                f"{getattr(sys.modules[name], '__file__', 'a part of Python')} before the file "
                f"{file} beside it. Rename that file"
            )


def load_factory_student(
    recipe: Recipe, teacher_dir: Path, kind: ModelKind, folder: Path
) -> FactoryStudent:
    """One that was trained before: made again, with the weights of its folder.

    Raises:
        UsageError: the function has changed since, or makes another module.
    """
    said, student = read_json(folder / FACTORY, FIELD), needed(recipe.student, "student")
    factory, files = str(student.factory), factory_files(student)
    if said.get("files", {next(iter(files)): said.get("sha256")}) != files:
        raise UsageError(f"{FIELD}: {factory} has changed since {folder} was trained. Train again.")
    made = factory_student(recipe, teacher_dir, kind)
    with answered(f"{folder}: its weights are not those of {factory}", "Train again."):
        made.model.load_state_dict(load_file(folder / _WEIGHTS))
    return made


def save_factory_student(student: FactoryStudent, recipe: Recipe, part: Path) -> None:
    """Its weights, and what made it."""
    state = student.model.state_dict()
    # Tied weights are stored as often as they have a name.
    save_file(
        {name: tensor.contiguous().clone() for name, tensor in state.items()}, part / _WEIGHTS
    )
    factory = str(needed(recipe.student, "student").factory)
    path, function = factory_file(factory)
    record = {
        "factory": f"{path.name}:{function}",
        "sha256": student.files[path.name],  # of what was trained: the file may have changed since
        "files": student.files,
        "arguments": student.told,
        "classes": list(student.config.id2label.values()),
    }
    text = json.dumps(record, indent=2, ensure_ascii=False)
    (part / FACTORY).write_text(f"{text}\n", "utf-8")


def _about(teacher_dir: Path, kind: ModelKind) -> tuple[dict[str, Any], Any]:
    """What the function is told, and what the stages are told of it."""
    names = dict(enumerate(kind.classes))
    said = {"id2label": names, "label2id": {name: index for index, name in names.items()}}
    if "pixel_values" in kind.example:
        channels, height, width = kind.example["pixel_values"].shape[1:]
        shape = {"channels": channels, "height": height, "width": width}
        return {"classes": len(names)} | shape, _Config(vocab_size=1, **said)
    config = read_json(teacher_dir / "config.json", "teacher.model")
    rows, padding = config.get("vocab_size"), config.get("pad_token_id")
    about = {"classes": len(names), "vocab_size": rows, "padding": padding}
    own = _Config(vocab_size=rows, pad_token_id=padding, **said)
    segments = config.get("type_vocab_size")
    if segments is not None:
        own.type_vocab_size = segments
    return about, own
