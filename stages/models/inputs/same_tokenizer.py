"""Whether two tokenizers are one: the same ids for the same text.

Then one model's targets mean the same to another.

They are one when they map the same ids to the same tokens over the range of ids that both have, and
split text the same way: normaliser, pre-tokeniser, merges (or scores) and the options that decide
ids. Chat templates, the special tokens put around a text, truncation, padding and the bytes of the
files may differ. No torch here: the plan asks too.
"""

import json
from pathlib import Path
from typing import Any

from ....storage.errors import UsageError
from ...recipe.sections import Recipe
from ...recipe.stages import needed
from ...recipe.tasks import TASKS
from ..fit.processor import refuse_other_channels

_FILE = "tokenizer.json"
_OPTIONS = (
    "byte_fallback",
    "ignore_merges",
    "unk_token",
    "continuing_subword_prefix",
    "end_of_word_suffix",
)
# What decides offsets only, and what a file may leave out because it is the default.
_WITHOUT_EFFECT = {"trim_offsets": (True, False), "use_regex": (True,)}


def compare_tokenizers(a: Path, b: Path) -> str | None:
    """Why the tokenizers in two model folders are not one; None if they are.

    Raises:
        UsageError: a folder has no readable tokenizer.json.
    """
    return compare_specs(_read(a), _read(b))


def compare_specs(a: dict[str, Any], b: dict[str, Any]) -> str | None:
    """The same for two parsed tokenizer.json files.

    The reason speaks of the first and the second.
    """
    one, two = a["model"], b["model"]
    kinds = one.get("type"), two.get("type")
    if kinds[0] != kinds[1]:
        return f"the first is {kinds[0]}, the second {kinds[1]}"
    differences = (
        _different_ids(_tokens(a), _tokens(b)),
        _different_part(a, b, "normalizer", name="normaliser"),
        _different_part(a, b, "pre_tokenizer", name="pre-tokeniser"),
        _different_merges(one, two),
        _different_scores(one, two),
        _different_options(one, two),
    )
    return next((found for found in differences if found is not None), None)


def _different_ids(a: dict[int, str], b: dict[int, str]) -> str | None:
    shared = min(max(a, default=-1), max(b, default=-1)) + 1
    for index in range(shared):
        if a.get(index) != b.get(index):
            return f"id {index} is {a.get(index)!r} in the first, {b.get(index)!r} in the second"
    return None


def _different_part(a: dict[str, Any], b: dict[str, Any], key: str, *, name: str) -> str | None:
    return None if _canonical(a.get(key)) == _canonical(b.get(key)) else f"their {name}s differ"


def _different_merges(one: dict[str, Any], two: dict[str, Any]) -> str | None:
    a, b = _merges(one), _merges(two)
    if a == b:
        return None
    # Where one list is the beginning of the other, they differ from its end on.
    number = min(len(a), len(b))
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            number = i
            break
    return f"their merges differ from number {number} on ({len(a)} and {len(b)} merges)"


def _different_scores(one: dict[str, Any], two: dict[str, Any]) -> str | None:
    if one.get("type") != "Unigram":
        return None
    for index, (a, b) in enumerate(zip(one["vocab"], two["vocab"], strict=False)):
        (_, score), (_, other) = a, b
        if score != other:
            return f"the score of id {index} differs"
    return None


def _different_options(one: dict[str, Any], two: dict[str, Any]) -> str | None:
    for option in _OPTIONS:
        a, b = one.get(option), two.get(option)
        # Absent, null, false and "" say the same: without it.
        if (a or None) != (b or None):
            return f"{option} is {a!r} in the first, {b!r} in the second"
    return None


def _tokens(spec: dict[str, Any]) -> dict[int, str]:
    """Id -> token, the added ones too."""
    vocab = spec["model"]["vocab"]
    if isinstance(vocab, dict):
        found = {index: token for token, index in vocab.items()}
    else:
        # Unigram: a list of (token, score) in the order of ids.
        found = {index: token for index, (token, _) in enumerate(vocab)}
    added = spec.get("added_tokens") or []
    return found | {token["id"]: token["content"] for token in added}


def _merges(model: dict[str, Any]) -> list[tuple[str, ...]]:
    # Written as "a b" by older versions, as ["a", "b"] by newer ones.
    return [
        tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge)
        for merge in model.get("merges") or []
    ]


def _canonical(part: Any) -> Any:
    """A part without fields that decide nothing, a sequence of one step as that step."""
    if isinstance(part, list):
        return [_canonical(item) for item in part]
    if not isinstance(part, dict):
        return part
    kept = {
        key: _canonical(value)
        for key, value in part.items()
        if value is not None and value not in _WITHOUT_EFFECT.get(key, ())
    }
    steps = kept.get("normalizers") or kept.get("pretokenizers")
    one_step = kept.get("type") == "Sequence" and steps and len(steps) == 1
    return steps[0] if steps and one_step else kept


def _read(folder: Path) -> dict[str, Any]:
    path = folder / _FILE
    try:
        spec: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        spec["model"]["vocab"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"{path}: not a readable tokenizer file ({type(error).__name__}: {error}). "
            f"Save the tokenizer with its fast version, which writes {_FILE}."
        ) from error
    return spec


def refuse_other_tokenizer(recipe: Recipe, student: Path, teacher: Path) -> None:
    """Raise UsageError, with both names and the first difference, if a student reads other tokens.

    Of a student that reads images: where it reads other channels.
    """
    if TASKS[recipe.run.task].structure.images:
        refuse_other_channels(student, teacher)
        return
    reason = compare_tokenizers(teacher, student)
    if reason is not None:
        name = needed(recipe.student, "student").model
        raise UsageError(
            f"student.model: the tokenizer of {name} is not that of the teacher "
            f"{recipe.teacher.model}: {reason} (first: teacher, second: student). Choose a "
            "student of its family, or `student.config` for fresh weights with the teacher's "
            "tokenizer. Else let the teacher write, and give its text as data to a recipe whose "
            "teacher.model has the student's tokenizer."
        )
