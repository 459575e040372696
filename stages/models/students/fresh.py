"""The config of a student with fresh weights.

It is the teacher's with changes, or that of another architecture.
"""

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError, answered
from ...recipe.tasks import MODELS, TASKS
from ..fit.config import loaded_config
from ..fit.files import read_json
from ..fit.light import config_classes, knows, light_transformers
from ..fit.misfits import refuse_special_without_row, refuse_token_without_row, special_ids
from ..fit.parts import text_config
from ..fit.processor import channels_of, side_of
from ..fit.teacher_layers import COUNT, of_layers, refuse_other_architecture
from ..fit.uses import heads_of, reads_ahead, refusal, use_of

_FIELD = "student.config"
# What a student shares with its teacher whatever its architecture: the ids, and what some mean.
_OF_THE_TOKENIZER = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")


# What models of images make of the number of their stages; and how the teacher's weights are
# quantised, where a student's are floats.
_NOT_OF_A_STUDENT = ("out_features", "out_indices", "stage_names", "quantization_config")


def fresh_config(
    teacher_dir: Path,
    overrides: dict[str, Any],
    *,
    task: str,
    layers: Sequence[int] | None = None,
) -> Any:
    """The config itself, as transformers has it.

    Without torch it is made only inside `light_transformers`.

    Args:
        teacher_dir: Folder with the teacher's config.json.
        overrides: `student.config`. With a `model_type` that is not the teacher's, they are changes
            to the defaults of that type; ids and special tokens stay the teacher's.
        task: `run.task`.
        layers: `student.from_teacher_layers`: the student has these of the teacher's.

    Raises:
        UsageError: a field that there is not, a value that its class refuses, another kind of
            model.
    """
    raw = read_json(teacher_dir / "config.json", "teacher.model")
    whole = loaded_config(raw, where=f"teacher.model: {teacher_dir}")
    teacher = text_config(whole)
    kind = overrides.get("model_type", teacher.model_type)
    own = kind == teacher.model_type
    if not own and not knows(kind):
        near = difflib.get_close_matches(str(kind), list(config_classes()), n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise UsageError(f"{_FIELD}.model_type: transformers has no {kind!r}.{hint}")
    made = type(teacher) if own else type(text_config(config_classes()[kind]()))
    names = made.attribute_map
    changes = {names.get(name, name): value for name, value in overrides.items()}
    base = teacher.to_dict() if own else _defaults(made, teacher, teacher_dir, task)
    _refuse_unknown(changes, made, base)
    if layers is not None:
        refuse_other_architecture(whole, teacher, kind)
        base = of_layers(base, changes, layers, count=names.get(COUNT, COUNT))
    elif own and COUNT in changes and "layer_types" not in changes:
        # One entry per layer of the teacher; left out, the architecture's own pattern fills it in.
        base.pop("layer_types", None)
    base = {name: value for name, value in base.items() if name not in _NOT_OF_A_STUDENT}
    with answered(f"{_FIELD}: {overrides} does not hold together", "Change the numbers."):
        config = made.from_dict(base | changes)
    _refuse_other_kind(config, task)
    return config


def refuse_fresh(
    teacher_dir: Path, overrides: dict[str, Any], task: str, layers: Sequence[int] | None = None
) -> None:
    """Refuse a config that cannot be made, sees the future or lacks rows for tokens; without torch.

    Raises:
        UsageError: as of `fresh_config`, a causal student that is none, or too few ids.
    """
    with light_transformers():
        made = fresh_config(teacher_dir, overrides, task=task, layers=layers)
        rows, ahead, special = (
            int(getattr(made, "vocab_size", None) or 0),
            reads_ahead(made),
            special_ids(made.to_dict()),
        )
    if TASKS[task].head == "lm" and ahead is not None:
        raise UsageError(refusal(_FIELD, f"it says {ahead}"))
    where, action = f"{_FIELD}.vocab_size", "Leave it out: then it is the teacher's."
    refuse_token_without_row(teacher_dir, rows, where=where, action=action)
    refuse_special_without_row(special, rows, where=_FIELD)


def _defaults(made: Any, teacher: Any, teacher_dir: Path, task: str) -> dict[str, Any]:
    """Of another architecture: its model type, and what the tokenizer or the processor decides."""
    shared = {name: getattr(teacher, name, None) for name in _OF_THE_TOKENIZER}
    if TASKS[task].structure.images:
        side = side_of(teacher_dir)
        shared = {"num_channels": channels_of(teacher_dir)}
        shared |= {} if side is None else {"image_size": side}
    return {"model_type": made.model_type} | shared


def _refuse_unknown(changes: dict[str, Any], made: Any, base: dict[str, Any]) -> None:
    if changes.keys() <= base.keys():
        return
    known = base.keys() | made().to_dict().keys()
    for name in changes:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = (
                f"Did you mean {near[0]}?"
                if near
                else f"{made.model_type} has: {', '.join(sorted(known))}."
            )
            raise UsageError(f"{_FIELD}.{name}: not a field of a {made.model_type} config. {hint}")


def _refuse_other_kind(config: Any, task: str) -> None:
    head = TASKS[task].head
    if head not in heads_of({}, config):
        raise UsageError(
            f"{_FIELD}.model_type: {config.model_type} is {use_of({}, config)}, and run.task "
            f"{task} distils another kind. Use {MODELS[head].words}."
        )
