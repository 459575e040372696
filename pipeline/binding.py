"""What a recipe's names stand for right now: teacher, author and data as content hashes.

Stage one writes this down in the store, so that stage two can run where teacher and data are not: the store is enough.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

from ..stages.data import given_author_id, given_text, inputs_id
from ..stages.identity import FileHashes, Identity, find_model, identify
from ..stages.requests import author_context
from ..stages.sections import Recipe
from ..stages.tokenizers import compare_tokenizers
from ..storage.errors import UsageError
from ..storage.files import Files, open_files
from ..storage.keys import content_id, seal, unseal


@dataclass(frozen=True, kw_only=True, slots=True)
class Binding:
    """The ids behind a recipe."""

    teacher_id: str
    author_id: str
    data_id: str
    vocab_size: int
    """Of the teacher; where texts are classified, how many classes it has."""
    context_tokens: int
    author_context_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """A binding, and the models it was made from (None where they are gone and the store stands in)."""

    binding: Binding
    teacher: Identity | None
    author: Identity | None
    missing: str = ""
    """Why they are gone."""


def bind(recipe: Recipe, *, write: bool) -> Bound:
    """Find and hash teacher, author and source; where they are gone, take what the store wrote down.

    Args:
        recipe: The recipe.
        write: Remember file hashes, and download from the Hub where needed; else only look.

    Raises:
        UsageError: they are not there, and the store never saw them under these names.
    """
    try:
        return _bind_here(recipe, write=write)
    except UsageError as error:
        written = _written(recipe)
        if written is None:
            raise error
        return Bound(binding=written, teacher=None, author=None, missing=str(error))


def write_down(recipe: Recipe, binding: Binding) -> None:
    """Keep a binding in the store under the recipe's names; the newest counts."""
    files = open_files(recipe.storage.dir)
    folder = _folder(recipe)
    record = seal(asdict(binding))
    while _written(recipe) != binding and not files.put_if_absent(_next(files, folder), record):
        pass  # another writer took the number


def _next(files: Files, folder: str) -> str:
    newest = files.names(folder)[-1:]  # not how many there are: one may have been lost
    number = int(newest[0].removesuffix(".json")) + 1 if newest else 0
    return f"{folder}/{number:08d}.json"


def teacher_identity(recipe: Recipe, hashes: FileHashes, *, download: bool) -> Identity:
    """The recipe's teacher, found and hashed."""
    section = recipe.teacher
    folder = find_model(section.model, section.revision, field="teacher.model", download=download)
    adapter = section.adapter and find_adapter(section.adapter)
    return identify(folder, dtype=section.dtype, hashes=hashes, adapter=adapter or None)


def author_identity(recipe: Recipe, teacher: Identity, hashes: FileHashes, *, download: bool) -> Identity:
    """Who writes the completions: the teacher, or the model that `generate.model` names."""
    model = recipe.generate.model if recipe.generate else None
    if model is None:
        return teacher
    folder = find_model(model, None, field="generate.model", download=download)
    reason = compare_tokenizers(folder, teacher.folder)
    if reason is not None:
        raise UsageError(
            f"generate.model: {model} writes in other tokens than the teacher {recipe.teacher.model} reads: {reason}. "
            "Choose an author with the teacher's tokenizer."
        )
    return identify(folder, dtype=recipe.teacher.dtype, hashes=hashes, field="generate.model")


def student_id(recipe: Recipe, *, write: bool) -> str | None:
    """Identity of an existing student; None for fresh weights."""
    section = recipe.student
    if section.model is None:
        return None
    folder = find_model(section.model, section.revision, field="student.model", download=write)
    hashes = FileHashes(recipe.storage.dir, remember=write)
    return identify(folder, dtype="auto", hashes=hashes, field="student.model").id


def find_adapter(adapter: str, *, field: str = "teacher.adapter") -> Path:
    """The folder of a LoRA adapter."""
    folder = Path(adapter).expanduser()
    if not (folder / "adapter_config.json").is_file():
        raise UsageError(f"{field}: {adapter} holds no adapter_config.json. Name a PEFT adapter's folder.")
    return folder


def _bind_here(recipe: Recipe, *, write: bool) -> Bound:
    hashes = FileHashes(recipe.storage.dir, remember=write)
    teacher = teacher_identity(recipe, hashes, download=write)
    author = author_identity(recipe, teacher, hashes, download=write)
    binding = Binding(
        teacher_id=teacher.id,
        author_id=given_author_id(recipe, teacher) if given_text(recipe) else author.id,
        data_id=inputs_id(recipe, teacher, hashes),
        vocab_size=teacher.outcomes(recipe.run.task),
        context_tokens=teacher.context_tokens,
        author_context_tokens=author_context(recipe.generate, author.context_tokens),
    )
    return Bound(binding=binding, teacher=teacher, author=author)


def _folder(recipe: Recipe) -> str:
    author = recipe.generate.model if recipe.generate else None
    names = {"teacher": recipe.teacher.model_dump(), "data": recipe.data.model_dump(), "author": author}
    return f"bindings/{content_id('binding', given=given_text(recipe), **names)}"


def _written(recipe: Recipe) -> Binding | None:
    files = open_files(recipe.storage.dir)
    names = files.names(_folder(recipe))
    if not names:
        return None
    name = f"{_folder(recipe)}/{names[-1]}"
    return Binding(**unseal(files.read(name), name))
