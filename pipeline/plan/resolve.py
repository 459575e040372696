"""What a recipe's names stand for right now: teacher, author and data as content hashes.

Stage one writes this down in the store, so that stage two can run where teacher and data are not:
the store is enough.
"""

from dataclasses import dataclass, replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ...stages.data.given_text import given_text
from ...stages.data.stage import inputs_id, stale_rows
from ...stages.data.tokenizing import author_id, earlier_author_id
from ...stages.engines.opening import refuse_engine
from ...stages.ledger.requests import author_context
from ...stages.models.chat.arguments import reads_the_clock
from ...stages.models.fit.adapter import ADAPTER_CONFIG, refuse_adapter
from ...stages.models.fit.misfits import refuse_misfit
from ...stages.models.fit.quantized import refuse_unquantized
from ...stages.models.fit.teacher_layers import FIELD, refuse_uncopied
from ...stages.models.identity import Identity, find_model, identify
from ...stages.models.inputs.same_tokenizer import compare_tokenizers
from ...stages.models.students.factory_file import factory_files, factory_id
from ...stages.models.students.same_layers import refuse_other_layers
from ...stages.recipe.checks.together import stores_of
from ...stages.recipe.evaluate import HELD_OUT_FIELDS
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import needed
from ...storage.errors import UsageError
from ...storage.files.base import Files
from ...storage.files.opening import open_files
from ...storage.joined import Joined
from ...storage.keys import canonical_json, content_id
from ...storage.published.folder import Published
from ...storage.store.bindings import Binding, all_bindings, newest_binding, write_binding
from ...storage.store.hashes import FileHashes
from ...storage.store.store import Store, is_store
from ...storage.tables.heads import head_of
from ...storage.words import counted


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A binding, and the models that it was made from.

    A model is None where it is gone and the store stands in for it.
    """

    binding: Binding
    teacher: Identity | None
    author: Identity | None
    missing: str = ""
    """Why they are gone."""
    published: Published | None = None
    """The read-only source whose rows are the data, as they are."""
    earlier_author_id: str = ""
    """Of given text that is in the store in the tokens of an earlier rule."""
    stale: tuple[int, int] = (0, 0)
    """Of its rows, those whose tokens are others today, and all."""


def bind(recipe: Recipe, store: Store | None = None, *, write: bool) -> Bound:
    """Find and hash teacher, author and source.

    Where they are gone, what the store or a source wrote down stands in for them.

    Where `data.source` names the store or one of its sources, what is written there is all there
    is.

    Args:
        recipe: The recipe.
        store: The recipe's store with its sources, None where there is none yet.
        write: Remember file hashes, and download from the Hub where needed; else only look.

    Raises:
        UsageError: they are not there, and the store never saw them under these names.
    """
    if names_store(recipe):
        return _bind_there(recipe, store)
    try:
        return _bind_here(recipe, store, write=write)
    except UsageError as error:
        for part, _ in store.parts if store else ():
            written = _written(part.files, recipe)
            if written is not None:
                published = part if isinstance(part, Published) else None
                return Bound(
                    binding=written,
                    teacher=None,
                    author=None,
                    missing=str(error),
                    published=published,
                )
        raise error


def names_store(recipe: Recipe) -> bool:
    """Whether the data are what a store holds: the recipe's own, or one of its sources."""
    return recipe.data.source in stores_of(recipe)


def _bind_there(recipe: Recipe, store: Store | None) -> Bound:
    """What a store holds, where it holds the rows of one teacher and one source of prompts."""
    name = recipe.data.source
    part = store
    if isinstance(store, Joined):
        part = store.sources[name] if name in store.sources else store.parts[0][0]
    why = (
        f"data.source: {name} is a store, so its rows are the data; nothing is generated or scored "
        "for it."
    )
    if isinstance(part, Published):
        return Bound(
            binding=_of_published(part), teacher=None, author=None, missing=why, published=part
        )
    if recipe.data.records.brings_text == "never" and recipe.generate is None:
        raise UsageError(
            f"generate: missing: {name} is a store, and of its texts those are taken that the "
            "`generate` section wrote which the recipe gives. Give the one that it was filled "
            "with; for given text set data.format to that."
        )
    found = list(set(all_bindings(part.files).values())) if part else []
    if len(found) != 1:
        raise UsageError(
            f"data.source: {name} is a store with {counted(len(found), 'pair')} of a teacher and "
            "its data, expected one. Use the names that the recipe had which filled it."
        )
    return Bound(binding=found[0], teacher=None, author=None, missing=why)


def _of_published(published: Published) -> Binding:
    """What a published folder says of itself."""
    about = published.about
    classes = about.get("class_names") if head_of(about).classes else None
    found = {
        "teacher_id": about.get("teacher_id") or about.get("author_id"),
        "author_id": published.manifest.about.get("generations", about).get("author_id", ""),
        "vocab_size": len(classes) if classes else about.get("vocab_size", 0),
    }
    unlimited = 2**31 - 1  # nothing is read that was not read before
    return Binding(
        **found,
        data_id=published.manifest.id,
        context_tokens=unlimited,
        author_context_tokens=unlimited,
    )


def write_down(recipe: Recipe, binding: Binding) -> None:
    """Keep a binding in the store under the recipe's names; the newest counts."""
    write_binding(open_files(recipe.storage.dir), _folder(recipe), binding)


def teacher_identity(recipe: Recipe, hashes: FileHashes, *, download: bool) -> Identity:
    """The recipe's teacher, found and hashed."""
    section = recipe.teacher
    folder = find_model(section.model, section.revision, field="teacher.model", download=download)
    trusted = section.trust_remote_code
    refuse_misfit(
        folder, recipe.run.task, field="teacher.model", name=section.model, trusted=trusted
    )
    refuse_unquantized(folder, section.quantize, field="teacher.model", name=section.model)
    adapter = find_adapter(section.adapter) if section.adapter else None
    if adapter is not None:
        refuse_adapter(adapter, folder, task=recipe.run.task, name=section.model)
    return identify(
        folder,
        dtype=section.dtype,
        hashes=hashes,
        adapter=adapter,
        trusted=trusted,
        quantize=section.quantize,
    )


def author_identity(
    recipe: Recipe, teacher: Identity, hashes: FileHashes, *, download: bool
) -> Identity:
    """Who writes the completions: the teacher, or the model that `generate.model` names."""
    generate = recipe.generate
    model = generate.model if generate else None
    if generate is None or model is None:
        return teacher
    if generate.remote:
        return _endpoint(generate.address, model, reads=teacher)
    folder = find_model(model, None, field="generate.model", download=download)
    refuse_misfit(folder, recipe.run.task, field="generate.model", name=model)
    refuse_unquantized(folder, field="generate.model", name=model)
    reason = compare_tokenizers(folder, teacher.folder)
    if reason is not None:
        raise UsageError(
            f"generate.model: {model} writes in other tokens than the teacher "
            f"{recipe.teacher.model} reads: {reason}. Choose an author with the teacher's "
            "tokenizer."
        )
    return identify(folder, dtype=recipe.teacher.dtype, hashes=hashes, field="generate.model")


def _endpoint(address: str, model: str, *, reads: Identity) -> Identity:
    """A model behind an endpoint is known by address and name, and by the tokens of its text.

    Who answers under that name may change. Who did answer is written down as it answers
    (`storage/store/served.py`).

    Args:
        address: Its own.
        model: Its name there.
        reads: Whose tokenizer and template make tokens of its text.
    """
    parts = {
        # No address: what `${NAME}` in it stands for is in no record.
        "endpoint": content_id("url", url=address),
        "model": model,
        "vocab_size": reads.vocab_size,
        "tokenizer": reads.parts["tokenizer"],
        "chat_template": reads.parts["chat_template"],
        "end_tokens": reads.parts["end_tokens"],
    }
    return replace(reads, id=content_id("model", **parts), adapter=None, dtype="", parts=parts)


def student_id(recipe: Recipe, *, write: bool) -> str | None:
    """Identity of an existing student, or hash of the code that makes one.

    It is None for other fresh weights.
    """
    section = recipe.student
    if section is not None and section.factory is not None:
        return factory_id(factory_files(section))
    if section is None or section.model is None:
        return None
    folder = find_model(section.model, section.revision, field="student.model", download=write)
    hashes = FileHashes(recipe.storage.dir, remember=write)
    return identify(folder, dtype="auto", hashes=hashes, field="student.model").id


def copied_id(recipe: Recipe, bound: Bound, *, write: bool) -> str:
    """Identity of the teacher whose layers are copied.

    It is the teacher that taught the rows, with its weights.

    Raises:
        UsageError: its weights are not here.
    """
    if bound.teacher is not None:
        return bound.teacher.id
    hashes = FileHashes(recipe.storage.dir, remember=write)
    what = f"{FIELD}: the teacher's layers are copied, and its weights are not here"
    try:
        found = teacher_identity(recipe, hashes, download=write)
    except UsageError as error:
        raise UsageError(f"{what}: {error}") from error
    if found.id != bound.binding.teacher_id:
        raise UsageError(
            f"{what}: teacher.model is {recipe.teacher.model} ({found.id}), and the rows are of "
            f"{bound.binding.teacher_id}. Put that teacher there again."
        )
    refuse_start(recipe, found, write=write)
    return found.id


def refuse_start(recipe: Recipe, teacher: Identity, *, write: bool) -> None:
    """Refuse layers of a teacher that cannot be copied, or would be others in the student.

    The models are built for it, which takes seconds: once, if the store may remember the answer.

    Raises:
        UsageError: with the reason.
    """
    refuse_uncopied(teacher.folder, recipe.teacher.model)
    student = needed(recipe.student, "student")
    asked = {
        "teacher": teacher.id,
        "student": student.model_dump(mode="json", include={"config", "from_teacher_layers"}),
        "transformers": version("transformers"),
    }
    cache = open_files(recipe.storage.dir).cache
    alike = f"cache/layers/{content_id('layers', **asked)}.json"
    if cache.exists(alike):
        return
    refuse_other_layers(recipe, teacher.folder)
    if write and is_store(recipe.storage.dir):
        cache.put_if_absent(alike, canonical_json(asked))


def find_adapter(adapter: str, *, field: str = "teacher.adapter") -> Path:
    """The folder of a LoRA adapter."""
    folder = Path(adapter).expanduser()
    if not (folder / ADAPTER_CONFIG).is_file():
        raise UsageError(
            f"{field}: {adapter} holds no {ADAPTER_CONFIG}. Name a PEFT adapter's folder."
        )
    return folder


def _bind_here(recipe: Recipe, store: Store | None, *, write: bool) -> Bound:
    hashes = FileHashes(recipe.storage.dir, remember=write)
    teacher = teacher_identity(recipe, hashes, download=write)
    author = author_identity(recipe, teacher, hashes, download=write)
    if recipe.generate is not None:
        refuse_engine(recipe.generate.engine, author)
    refuse_engine(recipe.scoring_engine, teacher, field="score.engine")
    day = _day(recipe, author, store)
    wrote = author.id
    if given_text(recipe):
        wrote = author_id(recipe.data, teacher, day=day, masks=recipe.masks)
    teaches = recipe.generate is not None and recipe.generate.teaches
    binding = Binding(
        teacher_id=author.id if teaches else teacher.id,
        author_id=wrote,
        data_id=inputs_id(recipe, teacher, hashes, author_id=wrote, day=day),
        vocab_size=teacher.outcomes(recipe.run.task),
        context_tokens=teacher.context_tokens,
        author_context_tokens=author_context(recipe.generate, author.context_tokens),
        day=day,
    )
    bound = Bound(binding=binding, teacher=teacher, author=author)
    if (
        store is None
        or recipe.data.records.document
        or not given_text(recipe)
        or store.inputs_about(binding.data_id) is not None
    ):
        return bound
    return _with_earlier(recipe, bound, store, write=write)


def _with_earlier(recipe: Recipe, bound: Bound, store: Store, *, write: bool) -> Bound:
    """What an earlier rule made of given text: all of it serves, or what is equal today."""
    teacher, now = bound.teacher, bound.binding
    assert teacher is not None
    earlier = earlier_author_id(recipe.data, teacher)
    hashes = FileHashes(recipe.storage.dir, remember=write)
    data_id = inputs_id(recipe, teacher, hashes, author_id=earlier)
    if earlier == now.author_id or store.inputs_about(data_id) is None:
        return bound
    # All of it is tokenized for this: once, if the store may remember that nothing has changed.
    cache, equal = store.files.cache, f"cache/tokenized/{now.data_id}.json"
    if not cache.exists(equal):
        stale, of = stale_rows(recipe, teacher, store, author_id=earlier, day=now.day)
        if stale:
            return replace(bound, earlier_author_id=earlier, stale=(stale, of))
        if write and is_store(recipe.storage.dir):
            cache.put_if_absent(equal, canonical_json({"data": data_id, "rows": of}))
    return replace(bound, binding=replace(bound.binding, author_id=earlier, data_id=data_id))


def _day(recipe: Recipe, author: Identity, store: Store | None) -> str | None:
    """The day that a template which reads the clock is told.

    It is the day of the store's first binding that has one.
    """
    if not recipe.data.records.conversation or not reads_the_clock(author.parts["chat_template"]):
        return None
    written = all_bindings(store.files).values() if store else ()
    days = [binding.day for binding in written if binding.day is not None]
    return min(days, default=date.today().isoformat())


def _folder(recipe: Recipe) -> str:
    author: Any = recipe.generate.model if recipe.generate else None
    if recipe.generate is not None and recipe.generate.remote:
        author = [recipe.generate.base_url, author]
        author += ["teaches"] if recipe.generate.teaches else []
    names = {
        "teacher": recipe.teacher.model_dump(exclude=recipe.teacher.unhashed()),
        "data": recipe.data.model_dump(exclude=recipe.data.unhashed()),
        "author": author,
    }
    if recipe.masks is not None:
        names["masks"] = recipe.masks
    if recipe.evaluate.names_rows:
        names["held_out"] = recipe.evaluate.model_dump(include=set(HELD_OUT_FIELDS))
    return f"bindings/{content_id('binding', given=given_text(recipe), **names)}"


def written_binding(recipe: Recipe, store: Store | None) -> Binding | None:
    """What the recipe's names stood for last, as the store or one of its sources has it.

    It is None where nobody knows.
    """
    found = (_written(part.files, recipe) for part, _ in (store.parts if store else ()))
    return next(filter(None, found), None)


def _written(files: Files, recipe: Recipe) -> Binding | None:
    return newest_binding(files, _folder(recipe))
