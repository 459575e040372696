"""Lengths that do not go together.

They are what the data may have, what the teacher reads, and what the student reads, or sees of what
it reads.
"""

from collections.abc import Iterator
from pathlib import Path

from ...stages.data.given_text import given_text
from ...stages.ledger.books import Books
from ...stages.ledger.requests import author_context
from ...stages.models.fit.config import config_facts, usable_positions
from ...stages.models.fit.files import read_json
from ...stages.models.fit.parts import text_config
from ...stages.models.identity import find_model
from ...stages.recipe.features import layers_for
from ...stages.recipe.sections import Recipe
from ...stages.recipe.stages import needed
from ...storage.errors import UsageError
from .attention import config_attention
from .resolve import Bound
from .student_config import of_fresh_student, student_blocks


def refuse_unread(recipe: Recipe, bound: Bound) -> None:
    """Refuse rows that may be longer than who reads them can read.

    Raises:
        UsageError: `data.max_tokens` is more than the teacher, or the author of the text, reads.
    """
    most = recipe.data.max_tokens
    if most is None or bound.teacher is None or bound.author is None:
        return
    reads, room = bound.teacher.context_tokens, "Lower it, or leave it out: then that is the limit"
    who = f"the teacher reads {reads} tokens at once"
    if not given_text(recipe):
        context = author_context(recipe.generate, bound.author.context_tokens)
        if recipe.score is not None:
            context = min(context, reads)  # what is written is read by the teacher too
        reads, room = context - 1, "Lower it, so that there is room for an answer"
        who = f"prompt and answer together have {context} tokens at most"
    if most > reads:
        raise UsageError(f"data.max_tokens: {most}, but {who}. {room}.")


def window_notes(recipe: Recipe, bound: Bound) -> list[str]:
    """What becomes of windows that are larger than the teacher reads."""
    asked = recipe.data.window_tokens
    if asked is None or bound.teacher is None or asked <= bound.teacher.context_tokens:
        return []
    reads = bound.teacher.context_tokens
    return [f"data.window_tokens: {asked} is more than the teacher reads: windows have {reads}"]


def answer_notes(recipe: Recipe, bound: Bound) -> list[str]:
    """What becomes of answers that may be longer than who writes or reads them can have."""
    generate, binding = recipe.generate, bound.binding
    if generate is None or bound.author is None:
        return []
    said = f"generate.max_tokens: {generate.max_tokens:,}, and"
    writes, reads = binding.author_context_tokens, binding.context_tokens
    if generate.remote and generate.max_tokens >= writes:
        return [
            f"{said} {recipe.teacher.model}, in whose tokens it is read, reads {writes:,} at once: "
            "an answer that is longer is paid for and rejected"
        ]
    if generate.max_tokens >= writes:
        return [f"{said} prompt and answer have {writes:,} tokens at most: an answer ends there"]
    if recipe.score is not None and generate.max_tokens >= reads:
        return [f"{said} the teacher reads {reads:,} at once: longer texts are not scored"]
    return []


def unread_by_student(recipe: Recipe, bound: Bound, books: Books) -> str:
    """What to say of rows that the student cannot read, after `choose_generations`.

    It is empty where the student reads all of them.
    """
    if recipe.student is None or recipe.train is None:
        return ""
    limits = {"train.row_tokens": recipe.train.row_tokens, "student": _student_reads(recipe, bound)}
    known = {name: limit for name, limit in limits.items() if limit is not None}
    name = min(known, key=lambda name: known[name], default="")
    if not known or known[name] >= bound.binding.context_tokens:
        return ""
    trained = (
        "" if recipe.train.snapshot else "SELECT key, tokens FROM chosen WHERE NOT held_out UNION "
    )
    ((rows, longest),) = books.index.rows(f"""
        SELECT count(*), max(tokens) FROM ({trained}SELECT key, tokens FROM judged)
        WHERE tokens > {known[name]} AND tokens <= {bound.binding.context_tokens}""")
    if not rows:
        return ""
    longer = f"{rows:,} of the rows to train and judge on have more, the longest {longest}"
    if name == "train.row_tokens":
        return f"{name}: {known[name]}, but {longer}. Set it to {longest} or more, or leave it out."
    return (
        f"student: reads {known[name]} tokens at once, but {longer}. "
        f"{_shorter(recipe, known[name])}, or take a student with a longer context."
    )


def _shorter(recipe: Recipe, most: int) -> str:
    """How rows can be had that are short enough."""
    if not given_text(recipe):
        return f"Set select.where to 'prompt_tokens + completion_tokens <= {most}'"
    if recipe.data.records.document:
        return f"Set data.window_tokens to {most}"
    return (
        f"Set data.max_tokens to {most}: longer rows are rejected, or with data.too_long: cut lose "
        "their end, where their prompt leaves any of the answer"
    )


def _student_reads(recipe: Recipe, bound: Bound) -> int | None:
    """How many tokens the student reads at once.

    It is None where there is no limit, or where the student or its teacher is not here.
    """
    student = needed(recipe.student, "student")
    if student.model is not None:
        name, field = student.model, "student.model"
        try:
            folder = find_model(name, student.revision, field=field, download=False, weights=False)
        except UsageError:
            return None  # downloaded later, by `run`
        config = read_json(folder / "config.json", field)
        return config_facts(config, where=f"{field}: {name}").context_tokens
    if student.factory is not None:
        return None
    return of_fresh_student(recipe, bound, lambda made: usable_positions(text_config(made)))


def unseen_by_student(recipe: Recipe, bound: Bound, books: Books, student: Path | None) -> str:
    """What to say of rows longer than a window of the student that is narrower than the teacher's.

    It is empty where there are no such rows.

    Args:
        recipe: The recipe.
        bound: Its teacher; where it is not here, training says the same before its first step.
        books: After `choose_generations`.
        student: Folder of an existing student; None: fresh weights, or not here yet.
    """
    for path, teacher, block, window in _narrower(recipe, bound, student):
        ((rows, longest),) = books.index.rows(f"""
            SELECT count(*), max(tokens) FROM chosen WHERE NOT held_out
            AND tokens > {window} AND tokens <= {bound.binding.context_tokens}""")
        if rows:
            return (
                f"{path}: block {block} of the student sees tokens less than {window} away, layer "
                f"{teacher} of the teacher further, and {rows:,} of the rows to train on have "
                f"more, the longest {longest}: KL is infinite where the teacher looks at what the "
                "student cannot see. Choose layers of which the student's sees as much, or match: "
                "relations."
            )
    return ""


def _narrower(
    recipe: Recipe, bound: Bound, folder: Path | None
) -> Iterator[tuple[str, int, int, int]]:
    """The pairs of layers whose student sees less than the teacher.

    Of each it gives its entry, the teacher's layer, the student's block and its window.
    """
    entries = [(n, a) for n, a in enumerate(recipe.loss.features) if a.match == "attention"]
    if recipe.score is None or recipe.train is None or not entries or bound.teacher is None:
        return
    found = student_blocks(recipe, bound, folder)
    if found is None or recipe.train.snapshot is not None:
        return
    blocks, mine = found
    theirs = config_attention(bound.teacher.folder, "teacher.model")
    for number, asked in entries:
        stored = layers_for(asked, recipe.score.features)
        for teacher, block in asked.pairs(stored, blocks):
            window, sees = mine.window(block), theirs.window(teacher)
            if window is not None and (sees is None or sees > window):
                yield f"loss.features.{number}", teacher, block, window
