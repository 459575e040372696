"""What is said of the engines that run a teacher.

It is which engine is to score, and which ones made the stored rows.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec

from ...stages.engines.opening import runs
from ...stages.ledger.books import Books
from ...stages.ledger.teachers import engines_of
from ...stages.recipe.kinds import VLLM
from ...stages.recipe.stages import needed
from ...stages.recipe.tasks import TASKS
from ...storage.store.bindings import bound_engine
from .teachers import BoundTeacher


def engine_notes(one: BoundTeacher, books: Books, *, pending: int) -> Iterator[str]:
    """What people are told of the engines of a teacher with so many texts to do.

    Each finding is one sentence.
    """
    if pending and (found := _to_run(one, books)):
        yield f"{one.line}: the engine is {found}"
    if mixed := mixed_engines(engines_of(books, one.id)):
        yield f"{one.line}: {mixed}"


def _to_run(one: BoundTeacher, books: Books) -> str:
    """Which engine runs a teacher, where it is not plain.

    Transformers runs every teacher that no other engine can.
    """
    score = needed(one.recipe.score, "score")
    if one.recipe.scoring_engine is not None or score.features:
        return ""
    if not TASKS[one.recipe.run.task].structure.shifted or find_spec(VLLM) is None:
        return ""
    if one.bound.teacher is not None and not runs(VLLM, one.bound.teacher):
        return ""
    decided = bound_engine(books.store.files, one.id)
    if decided is None:
        return "chosen by the first worker: hf where transformers loads the teacher, else vllm"
    return "" if decided != VLLM else "vllm, as the first worker decided"


def mixed_engines(rows: Mapping[str, int]) -> str:
    """What is said of rows that several engines made; empty: one did."""
    if len(rows) < 2:
        return ""
    made = " and ".join(f"{count:,} by {engine}" for engine, count in rows.items())
    return (
        f"the store has rows of this teacher from several engines, {made}; score.engine names one"
    )
