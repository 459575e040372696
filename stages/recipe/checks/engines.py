"""Whether the engines can do what the recipe asks.

It may ask to read with vLLM, or to keep distributions while writing.
"""

from ..engines import ENGINES
from ..kinds import HF, VLLM, Score
from ..sections import Recipe, Teacher
from ..tasks import TASKS

Errors = list[tuple[str, str]]


def check_reader(recipe: Recipe) -> Errors:
    """What is wrong with `score.engine`: (dotted path, message)."""
    score = recipe.score
    assert score is not None
    errors: Errors = []
    if score.engine == HF and score.engine_args:
        message = f"belongs to engine {VLLM!r}; this recipe names {HF!r}. Remove it"
        errors.append(("score.engine_args", message))
    if score.engine != VLLM:
        return errors
    if not TASKS[recipe.run.task].structure.shifted:
        message = (
            f"{VLLM!r} says what follows in a text, and the targets of {recipe.run.task} are none "
            f"of that. Use {HF!r}"
        )
        errors.append(("score.engine", message))
    if score.kernel is not None:
        errors.append(("score.kernel", f"belongs to engine {HF!r}. Remove it"))
    message = (
        f"belongs to engine {HF!r}. Spread the teacher by score.engine_args: "
        "{tensor_parallel_size: N}"
    )
    teachers: dict[str, Teacher] = {f"teachers.{n}": one for n, one in enumerate(recipe.several)}
    for where, one in (teachers or {"teacher": recipe.teacher}).items():
        if one.device_map is not None:
            errors.append((f"{where}.device_map", message))
    return errors


def check_kept(recipe: Recipe) -> Errors:
    """What `generate.keep` would keep for nothing: (dotted path, message)."""
    generate = recipe.generate
    if generate is None or generate.keep is None or generate.teaches:
        return []  # of an endpoint: `check_teaching`
    path, score, errors = "generate.keep", recipe.score, []
    keeps = [engine.name for engine in ENGINES if engine.keeps]
    if generate.engine not in (None, *keeps):
        why = f"engine {generate.engine!r} keeps no distributions. Use {' or '.join(keeps)}"
        errors.append((path, f"{why}, or remove it"))
    if score is None:
        return [*errors, (path, "there is no section `score` that would find them. Remove it")]
    if generate.model not in (None, recipe.teacher.model):
        message = (
            f"{generate.model} writes, and score asks for the distributions of "
            f"{recipe.teacher.model}. Remove it, or let the teacher write"
        )
        errors.append((path, message))
    if "logprobs_mode" in generate.engine_args:
        message = (
            "what is kept is of the whole vocabulary, before temperature and top_p, and "
            "generate.engine_args names a logprobs_mode. Remove it there"
        )
        errors.append((path, message))
    if recipe.data.turns == "all":
        message = (
            "keeps no distributions of a prompt's own turns, which data.turns: all scores. Remove "
            "one"
        )
        errors.append((path, message))
    if unfit := unfit_to_keep(score, generate.keep.k):
        errors.append((path, f"{unfit}, so the teacher would read every text again. {_MEND}"))
    if recipe.scoring_engine not in (None, generate.engine):
        message = (
            f"score by engine {recipe.scoring_engine!r} takes its own rows alone, and "
            f"generate.engine is {generate.engine or 'not named'}. Name the same one in both, or "
            "leave score.engine out"
        )
        errors.append((path, message))
    return errors


_MEND = "Set that, or remove generate.keep"


def unfit_to_keep(score: Score, k: int) -> str:
    """Why what is kept serves no text of a recipe's `score`; empty: it does."""
    if "topk" not in (score.targets, *score.kind.served_by):
        return (
            f"keeps the best entries, and score.targets is {score.targets!r}, expected 'topk' or "
            "'topp'"
        )
    if score.k > k:
        return f"k {k} is less than score.k {score.k}, expected as many or more"
    if set(score.temperatures) != {1.0}:
        return (
            f"keeps temperature 1 alone, and score.temperatures is {score.temperatures}, expected "
            "[1.0]"
        )
    if score.features:
        return "keeps no features, and score.features asks for some, expected none"
    return ""
