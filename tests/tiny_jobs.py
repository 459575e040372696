"""A small `generate` to be done in this process."""

from collections.abc import Callable, Mapping
from pathlib import Path

from kit import prompts, recipe_tree, write_jsonl
from tiny_store import SilentProgress

from stillroom.pipeline.binding import bind
from stillroom.stages import data
from stillroom.stages.identity import Identity
from stillroom.stages.job import Job, StopFlag
from stillroom.stages.sections import Recipe
from stillroom.storage.store import Store


def generation_job(
    tiny_llama: Callable[..., Path], folder: Path, *, rows: int = 12, storage: Mapping[str, object] | None = None
) -> tuple[Job, Identity]:
    """Prompts in a store, to be written in batches of four and ten steps each; the model never ends a text."""
    settings = {"engine": "hf", "temperature": 0.0, "max_tokens": 10, "engine_args": {"batch_size": 4}}
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
    job = Job(recipe=recipe, progress=SilentProgress(), stop=StopFlag(), context_tokens=author.context_tokens, **ids)
    data.run(job)
    return job, author
