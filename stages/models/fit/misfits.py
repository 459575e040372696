"""Models that a recipe cannot use: of another kind, quantised, or with ids that have no row."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ....storage.errors import NotTogether, UsageError
from ...recipe.tasks import MODELS, TASKS, task_of
from .config import ConfigFacts, config_facts
from .files import read_json
from .quantized import method_of
from .tensors import stored_tensors
from .token_ids import highest_id
from .uses import refusal

_SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
# Where the families keep the table of token embeddings; a name ends so.
_EMBEDDINGS = tuple(
    f"{name}.weight"
    for name in ("embed_tokens", "wte", "word_embeddings", "embed_in", "tokens_embed")
)

# Classes that have a head for hidden tokens among others.
_WITH_MORE_HEADS = ("ForPreTraining", "WithLMHeadModel")

_RESIZE = (
    "Resize the embeddings to the tokenizer, or take the tokenizer that belongs to these weights."
)


def refuse_misfit(
    folder: Path, task: str, *, field: str, name: str, trusted: bool = False
) -> ConfigFacts:
    """Refuse a teacher, author or student that the task cannot use, by what its small files say.

    Args:
        folder: Of the model.
        task: `run.task`.
        field: Where the recipe names it.
        name: As the recipe names it.
        trusted: Whether its own code may be run.

    Returns:
        What its config says.

    Raises:
        UsageError: it is of another kind, asks for code of its own, or has ids without a row.
    """
    raw, where = read_json(folder / "config.json", field), f"{field}: {name}"
    facts = config_facts(raw, where=where, trusted=trusted)
    head = TASKS[task].head
    if head not in facts.heads:
        fitting = [task_of(name) for name, models in MODELS.items() if models.use == facts.use]
        other = f"Set run.task to {fitting[0]}, or use" if fitting else "Use"
        raise UsageError(
            f"{where} is {facts.use} ({facts.model_type}), which run.task {task} cannot distil. "
            f"{other} {MODELS[head].words}."
        )
    if head == "lm" and facts.ahead is not None:
        raise UsageError(refusal(where, f"its config says {facts.ahead}"))
    if TASKS[task].structure.masked:
        _refuse_unmasked(raw, where, suffix=MODELS[head].suffix)
    refuse_ids_without_row(folder, facts.rows, where=where)
    if not raw.get("quantization_config"):  # else its tensors have other shapes
        _refuse_other_rows(folder, facts.rows, where=where)
    return facts


def _refuse_unmasked(raw: Mapping[str, Any], where: str, *, suffix: str) -> None:
    """Refuse a model that was not trained to guess hidden tokens, or that sees none behind them."""
    named = [str(name) for name in raw.get("architectures") or ()]
    if named and not any(name.endswith((suffix, *_WITH_MORE_HEADS)) for name in named):
        raise UsageError(
            f"{where} has no head that guesses hidden tokens (config.json names "
            f"{', '.join(named)}, expected one that ends in {suffix}). Use a model that was "
            "trained with it, and saved whole."
        )
    if raw.get("is_decoder"):
        raise UsageError(
            f"{where} sees no later token (is_decoder: true in its config.json), so it cannot "
            "guess what is hidden from both sides. Use a masked language model."
        )


def refuse_quantised(folder: Path, *, field: str, name: str) -> None:
    """Refuse a student whose weights are quantised.

    Raises:
        UsageError: they are.
    """
    how = method_of(read_json(folder / "config.json", field))
    if how is not None:
        raise UsageError(
            f"{field}: {name} is quantised ({how} in its config.json), and "
            "quantised weights are not trained, with LoRA or without. Name the model that it was "
            "made from, and quantise the student afterwards."
        )


def refuse_shared_norms(folder: Path, processes: object) -> None:
    """Refuse several processes for a student that is seen to have batch norms.

    They are seen in its weights, or in those that it is like.

    Args:
        folder: Of the model that it begins as, or of its teacher.
        processes: `compute.processes`; how many auto is, is known where it trains.

    Raises:
        UsageError: it has some.
    """
    if type(processes) is int and processes > 1:
        for name in stored_tensors(folder, where="student"):
            if name.endswith(".running_mean"):
                raise shared_norm(name.removesuffix(".running_mean"))


def shared_norm(name: str) -> NotTogether:
    """What is said of a batch norm of a student that several ranks train."""
    return NotTogether(
        f"compute.processes: {name} of the student is a batch norm, whose statistics would depend "
        "on how many processes share a step. Set compute.processes to 1."
    )


def refuse_ids_without_row(folder: Path, rows: int, *, where: str) -> None:
    """Refuse a tokenizer, or special tokens, with ids beyond the table of token embeddings.

    Args:
        folder: With tokenizer, config and generation config.
        rows: Of the table; 0: the model has none.
        where: Field and model, for messages.

    Raises:
        UsageError: one has an id of `rows` or more.
    """
    refuse_special_without_row(_special_ids_in(folder, where), rows, where=where)
    refuse_token_without_row(folder, rows, where=where)


def refuse_special_without_row(ids: Iterable[tuple[str, int]], rows: int, *, where: str) -> None:
    """Refuse special tokens with ids beyond the table of token embeddings.

    `ids` has what each token is, and its id.

    Raises:
        UsageError: one has an id of `rows` or more.
    """
    for what, found in ids:
        if 0 < rows <= found:
            raise UsageError(
                f"{where}: {what} is {found}, but its table of token embeddings has {rows} rows "
                f"(vocab_size), for ids 0 to {rows - 1}. Name a token that the model has."
            )


def refuse_token_without_row(folder: Path, rows: int, *, where: str, action: str = _RESIZE) -> None:
    """Refuse a tokenizer with ids beyond the table of token embeddings; `action`: what to do then.

    Raises:
        UsageError: it has.
    """
    highest = highest_id(folder, where, of_text=True)
    if highest is not None and 0 < rows <= highest:
        raise UsageError(
            f"{where}: the tokenizer has ids up to {highest}, but the table of token embeddings "
            f"has {rows} rows (vocab_size), for ids 0 to {rows - 1}. {action}"
        )


def special_ids(config: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """The fields of a config that name special tokens, and their ids."""
    for name in _SPECIAL:
        for value in _listed(config.get(name)):
            yield name, value


def _special_ids_in(folder: Path, where: str) -> Iterator[tuple[str, int]]:
    for file in ("config.json", "generation_config.json"):
        content = read_json(folder / file, where, missing={})
        for part in (content, content.get("text_config") or {}):
            yield from ((f"{name} in {file}", value) for name, value in special_ids(part))


def _listed(value: Any) -> list[int]:
    return [v for v in (value if isinstance(value, list) else [value]) if type(v) is int]


def _refuse_other_rows(folder: Path, rows: int, *, where: str) -> None:
    """Refuse a config that asks for another table of embeddings than the weights have.

    No library loads the two together.
    """
    for name, tensor in stored_tensors(folder, where=where).items():
        if rows and name.endswith(_EMBEDDINGS) and tensor.shape[:1] != (rows,):
            raise UsageError(
                f"{where}: its config.json asks for {rows} rows (vocab_size), but {name} in its "
                f"weights has shape {list(tensor.shape)}. Save the model again."
            )
