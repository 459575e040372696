"""A model's processor, which says how an image becomes its input.

This is what its file says, without torch.
"""

from pathlib import Path
from typing import Any

from ....storage.errors import UsageError
from ....storage.keys import content_id
from .files import read_json

PROCESSOR = "preprocessor_config.json"
# Fields that say where the file came from, not what becomes of an image.
_NOT_CONTENT = ("processor_class", "_processor_class", "name_or_path", "_valid_processor_keys")


def processor_config(folder: Path, field: str = "teacher.model") -> dict[str, Any]:
    """What the processor of the model in a folder does; `field`: of the recipe, for messages.

    Raises:
        UsageError: there is none, or it asks for code of its own.
    """
    found = read_json(folder / PROCESSOR, field, missing={})
    if not found:
        raise UsageError(
            f"{field}: {folder} holds no {PROCESSOR}, so nothing says how an image becomes its "
            "input. Save the model's image processor beside it."
        )
    if "auto_map" in found:
        raise UsageError(
            f"{field}: {folder}/{PROCESSOR} asks for code of its own (auto_map), which is never "
            "run. Use a model with a processor that transformers has."
        )
    return {name: value for name, value in found.items() if name not in _NOT_CONTENT}


def processor_id(folder: Path) -> str:
    """Name of what becomes of an image.

    It is made of the processor's config and the channels that the model reads.
    """
    return content_id("processor", config=processor_config(folder), channels=channels_of(folder))


def channels_of(folder: Path, field: str = "teacher.model") -> int:
    """Of the images that the model in a folder reads: 1 is grey, 3 are red, green and blue.

    Raises:
        UsageError: it reads others.
    """
    found = read_json(folder / "config.json", field).get("num_channels", 3)
    if found not in (1, 3):
        raise UsageError(
            f"{field}: {folder} reads images of {found} channels (num_channels), expected 1 (grey) "
            "or 3 (red, green, blue). Use another model."
        )
    return int(found)


def side_of(folder: Path) -> int | None:
    """Height and width of what the processor makes, where its file says one number for both."""
    config = processor_config(folder)
    size = (config.get("crop_size") if config.get("do_center_crop") else None) or config.get("size")
    if isinstance(size, int):
        return size
    sides = {*(size or {}).values()}
    return int(sides.pop()) if len(sides) == 1 else None


def compare_processors(a: Path, b: Path) -> str | None:
    """Why the images that two models read are not the same; None: they are."""
    one, two = channels_of(a), channels_of(b)
    if one != two:
        return f"the first reads images of {one} channels, the second of {two}"
    first, second = processor_config(a), processor_config(b)
    for name in sorted({*first, *second}):
        if first.get(name) != second.get(name):
            return (
                f"their processors differ: {name} is {first.get(name)!r} in the first, "
                f"{second.get(name)!r} in the second"
            )
    return None


def refuse_other_channels(student: Path, teacher: Path) -> None:
    """Refuse a student that cannot read its teacher's images.

    Raises:
        UsageError: it reads images of other channels.
    """
    theirs, own = channels_of(teacher), channels_of(student, "student.model")
    if own != theirs:
        raise UsageError(
            f"student.model: {student} reads images of {own} channels, the teacher's have "
            f"{theirs}. Choose a student with as many, or `student.config` for fresh weights."
        )
