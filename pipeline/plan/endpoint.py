"""An endpoint that writes, in the plan: who it is, who answered for it, and what the rest costs."""

from collections.abc import Iterator
from pathlib import Path

from ...stages.engines.api_key import api_key
from ...stages.recipe.engines import USUAL_ENTRIES, Generate
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import needed
from ...stages.workers.answers import Answers, Tokens, answers_dir, read_answers
from ...stages.workers.budget import is_reached, limited, usd
from ...storage.credentials import as_written
from ...storage.errors import UsageError
from ...storage.store.served import served_by
from ...storage.store.store import Store
from ...storage.words import counted
from .lines import Plan, StagePlan


def endpoint_of(recipe: Recipe) -> Generate | None:
    """The section of a recipe whose text an endpoint writes; None: none does."""
    return recipe.generate if recipe.generate is not None and recipe.generate.remote else None


def endpoint_notes(recipe: Recipe, author_id: str, store: Store | None) -> Iterator[str]:
    """Who writes, in whose tokens, and who answered so far."""
    generate = endpoint_of(recipe)
    if generate is None:
        return
    yield (
        f"the text is written by {generate.model} at {as_written(str(generate.base_url))}, and is "
        f"read in the tokens of {recipe.teacher.model}"
    )
    if generate.teaches:
        yield (
            f"the teacher is {generate.model} there: its log-probabilities are the soft targets, "
            "held-out rows' too, so KL is over entries and tail, a lower bound"
        )
        entries = needed(generate.keep, "generate.keep").k
        if entries > USUAL_ENTRIES:
            yield (
                f"generate.keep.k: {entries} entries of a token: many endpoints give "
                f"{USUAL_ENTRIES} at most, and vLLM what its --max-logprobs says"
            )
    served = served_by(store.files, author_id) if store is not None else {}
    if len(served) > 1:
        seen = ", ".join(f"{name} (since {day})" for name, day in served.items())
        yield f"the endpoint has answered as {len(served)} models under this one name: {seen}"


def refuse_entries(recipe: Recipe, outcomes: int) -> None:
    """Refuse more entries of a token than there are ids: an endpoint would refuse every call.

    Raises:
        UsageError: `generate.keep.k` is more than the vocabulary has.
    """
    generate = endpoint_of(recipe)
    if generate is not None and generate.keep is not None and generate.keep.k > outcomes:
        raise UsageError(
            f"generate.keep.k: {generate.keep.k:,}, but {recipe.teacher.model}, whose tokens these "
            f"are, has {outcomes:,} of them. Lower it: many endpoints give {USUAL_ENTRIES} at most."
        )


def plan_endpoint(recipe: Recipe, line: StagePlan) -> None:
    """What the rows to do cost.

    A budget that is reached ends the stage, if the recipe may go on with what is there.
    """
    generate = endpoint_of(recipe)
    if generate is None or not line.pending:
        return
    folder = answers_dir(Path(recipe.run.dir), generate)
    answers = read_answers(folder)
    rest = _rest(generate, line, answers)
    line.usd_to_do, line.tokens_to_do = usd(generate, rest), sum(rest)
    line.prompts_priced = rest.prompt > 0
    if not (limited(generate) and is_reached(folder, generate)):
        return
    limit = "generate.max_usd" if generate.max_usd is not None else "generate.max_tokens_total"
    line.why = f"{line.why}; {limit} is reached"
    if generate.accept_partial and line.committed:
        line.state = "done"


def _rest(generate: Generate, line: StagePlan, answers: Answers) -> Tokens:
    """Tokens of the rows to do.

    They go by the mean of what was answered, else by what may be written at most.
    """
    if not answers.count:
        return Tokens(0, line.pending * generate.max_tokens)
    each = (total / answers.count for total in answers.charged)
    return Tokens(*(round(line.pending * tokens) for tokens in each))


def price(plan: Plan) -> str:
    """What the rest of the text costs, for people.

    It is empty where nothing is to be paid or no prices are known.

    It is no note of the plan: those are recorded, and prices are not.
    """
    line = plan.stage("generate")
    if line is None or not line.pending or line.usd_to_do is None:
        return ""
    todo = counted(line.pending, "row to do costs", "rows to do cost")
    rows, cost = f"generate: {todo}", f"${line.usd_to_do:.4g}"
    if line.prompts_priced:
        return f"{rows} about {cost} at the recipe's prices"
    return (
        f"{rows} at most {cost} at the recipe's prices, and their prompts beside: "
        "what those come to is known after the first answers"
    )


def refuse_reading(recipe: Recipe, line: StagePlan) -> None:
    """Refuse texts whose distributions an endpoint is to be asked for.

    An endpoint gives distributions while it writes, and for no text that is there.

    Raises:
        UsageError: there are some.
    """
    generate = endpoint_of(recipe)
    if generate is not None and generate.teaches and line.name == "score":
        raise UsageError(
            f"score: {line.pending} texts of {generate.model} have no distributions that can be "
            f"reused ({line.why}), and an endpoint reads no text again. Name another storage.dir: "
            f"the answers in {answers_dir(Path(recipe.run.dir), generate).parent} are read again, "
            "and none is paid twice."
        )


def refuse_without_key(recipe: Recipe) -> None:
    """Refuse calls without the key that they need.

    Raises:
        UsageError: its environment variable is not set.
    """
    generate = endpoint_of(recipe)
    if generate is not None:
        api_key(generate)
