"""Small jobs done in this process: a `generate` that is still to do, a store that is scored."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from kit import prompts, recipe_tree, write_jsonl
from planting import copied
from tiny_store import SilentProgress

from stillroom.pipeline.plan.resolve import bind
from stillroom.stages.data import stage as data
from stillroom.stages.generate import stage as generate
from stillroom.stages.ledger.requests import tokens_key
from stillroom.stages.models.identity import Identity
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.score import stage as score
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.store.store import Store


def generation_job(
    tiny_llama: Callable[..., Path],
    folder: Path,
    *,
    rows: int = 12,
    storage: Mapping[str, object] | None = None,
) -> tuple[Job, Identity]:
    """Prompts in a store, to be written in batches of four and ten steps each.

    The model never ends a text.
    """
    settings = {
        "engine": "hf",
        "temperature": 0.0,
        "max_tokens": 10,
        "engine_args": {"batch_size": 4},
    }
    source = write_jsonl(folder / "prompts.jsonl", prompts(rows))
    tree = recipe_tree(folder, tiny_llama("teacher", eos_token_id=None), source, generate=settings)
    tree["storage"] = {"dir": str(folder / "store")} | dict(storage or {})
    recipe = Recipe.model_validate(tree)
    store = Store.open(folder / "store", create=True)
    bound = bind(recipe, write=True)
    author = bound.author
    assert author is not None
    store.put_teacher(author.id, author.files_to_keep())
    ids = {"data_id": bound.binding.data_id, "teacher_id": author.id, "author_id": author.id}
    job = Job(
        recipe=recipe,
        progress=SilentProgress(),
        stop=StopFlag(),
        context_tokens=author.context_tokens,
        **ids,
    )
    data.run(job)
    return job, author


def scored_store(
    folder: Path, teacher: Path, /, *, rows: int = 30, **sections: object
) -> tuple[Recipe, Store, Identity]:
    """A small recipe whose teacher drew the text (temperature 1) and scored it.

    The stages run in this process.
    """
    source = write_jsonl(folder / "prompts.jsonl", prompts(rows))
    spoken = {"engine": "hf", "temperature": 1.0, "max_tokens": 16}
    recipe = Recipe.model_validate(recipe_tree(folder, teacher, source, generate=spoken) | sections)
    return recipe, *done_until_score(recipe)


def scored_in_spans(
    folder: Path, teacher: Path, /, *, rows: int = 30, **sections: object
) -> tuple[Recipe, Store, Identity]:
    """`scored_store`, but three spans of what the teacher drew are scored.

    They are like a conversation's turns.
    """
    source = write_jsonl(folder / "prompts.jsonl", prompts(rows))
    spoken = {"engine": "hf", "temperature": 1.0, "max_tokens": 30}
    recipe = Recipe.model_validate(recipe_tree(folder, teacher, source, generate=spoken) | sections)
    store, job, identity = teacher_job(recipe)
    data.run(job)
    generate.run(job, identity)
    copy = copied(store, folder / "spans", _in_spans, table="generations")
    storage = recipe.storage.model_copy(update={"dir": str(copy.root)})
    recipe = recipe.model_copy(update={"storage": storage})
    score.run(replace(job, recipe=recipe), identity)
    return recipe, copy, identity


def _in_spans(row: dict[str, Any]) -> dict[str, Any]:
    """Two fifths of what was written are passed over; a short text stays as it is."""
    start, total = row["prompt_tokens"], row["prompt_tokens"] + row["completion_tokens"]
    part = row["completion_tokens"] // 5
    if part < 3:
        return row
    spans = np.array(
        [[start, part], [start + 2 * part, part], [start + 4 * part, total - start - 4 * part]]
    )
    asked = tokens_key(row["token_ids"], start, spans)
    return row | {"spans": spans.reshape(-1), "tokens_key": asked}


def done_until_score(recipe: Recipe) -> tuple[Store, Identity]:
    """A recipe's text and targets, made by the stages in this process."""
    store, job, teacher = teacher_job(recipe)
    data.run(job)
    if recipe.generate is not None:
        generate.run(job, teacher)
    score.run(job, teacher)
    return store, teacher


def teacher_job(recipe: Recipe) -> tuple[Store, Job, Identity]:
    """The job of a recipe's teacher, who is here, in a store of the recipe's own."""
    store = Store.open(recipe.storage.dir, create=True)
    bound = bind(recipe, write=True)
    assert bound.teacher is not None
    store.put_teacher(bound.teacher.id, bound.teacher.files_to_keep())
    b = bound.binding
    ids = {"data_id": b.data_id, "teacher_id": b.teacher_id, "author_id": b.author_id}
    job = Job(
        recipe=recipe,
        progress=SilentProgress(),
        stop=StopFlag(),
        context_tokens=b.context_tokens,
        **ids,
    )
    return store, job, bound.teacher
