"""What is wrong with a recipe although each of its fields is right: combinations, and what no stage does yet."""

from typing import Any

from ..stages.sections import COLUMNS, Data, Recipe, Score

# Named by the recipe, done by no stage yet: refused by name, never ignored.
NOT_YET: tuple[tuple[str, tuple[Any, ...]], ...] = (
    ("run.task", ("classification",)),
    ("data.format", ("labelled",)),
    ("generate.engine", ("openai",)),
    ("score.engine", ("vllm",)),
    ("score.targets", ("topp", "sampled", "full")),
    ("loss.divergence", ("jsd", "skew_forward_kl", "skew_reverse_kl", "total_variation", "alpha_beta", "adaptive_kl")),
    ("loss.tail", ("drop", "renormalize", "to_label")),
)

# Fields of `score` that mean something for one kind of targets only.
_ONLY_FOR = {"p": "topp", "k_min": "topp", "rounds": "sampled", "draw": "sampled"}


def lookup(recipe: Recipe, path: str) -> Any:
    """The value at a dotted path, None where a section is absent."""
    value: Any = recipe
    for name in path.split("."):
        value = getattr(value, name, None)
    return value


def check_together(recipe: Recipe) -> list[tuple[str, str]]:
    """Errors that need more than one field: (dotted path, message)."""
    errors = [
        (path, f"{lookup(recipe, path)!r} is planned but no stage does it yet")
        for path, values in NOT_YET
        if lookup(recipe, path) in values
    ]
    errors += _unknown_columns(recipe.data) + (_idle_fields(recipe.score) if recipe.score else [])
    kind = recipe.data.format
    if kind in ("text", "completion") and recipe.generate is not None:
        errors.append(("generate", f"format {kind!r} brings its own text. Remove this section, or use format 'prompt'"))
    if kind == "prompt" and recipe.generate is None:
        errors.append(("generate", f"missing: format {kind!r} has prompts only. Add a `generate` section"))
    if recipe.loss.temperature != 1.0:
        errors.append(("loss.temperature", f"{recipe.loss.temperature} is planned but no stage does it yet. Use 1.0"))
    if recipe.score is not None and list(recipe.score.temperatures) != [1.0]:
        errors.append(
            ("score.temperatures", f"{recipe.score.temperatures} is planned but no stage does it yet. Use [1.0]")
        )
    if recipe.storage.sources:
        errors.append(("storage.sources", "read-only sources are planned but no stage reads them yet. Remove the key"))
    if recipe.loss.soft_weight == 0 and recipe.loss.hard_weight == 0:
        errors.append(("loss.soft_weight", "soft_weight and hard_weight are both 0: nothing to learn. Set one above 0"))
    return errors


def _unknown_columns(data: Data) -> list[tuple[str, str]]:
    if data.format not in COLUMNS:
        return []
    known = [name for names in COLUMNS[data.format] for name in names]
    return [
        ("data.columns", f"unknown name {name!r}. Known for format {data.format!r}: {', '.join(known)}")
        for name in data.columns
        if name not in known
    ]


def _idle_fields(score: Score) -> list[tuple[str, str]]:
    """Settings that these targets would silently ignore."""
    return [
        (f"score.{name}", f"belongs to targets {kind!r}; this recipe has {score.targets!r}. Remove it")
        for name, kind in _ONLY_FOR.items()
        if kind != score.targets and getattr(score, name) != Score.model_fields[name].default
    ]
