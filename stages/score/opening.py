"""What runs the teacher, and opening it.

It is transformers, or an engine that says what follows in texts.
"""

from ...storage.errors import NotLoaded, UsageError
from ...storage.store.bindings import bind_engine, bound_engine
from ...storage.store.store import Store
from ..engines.opening import is_installed, runs
from ..models.identity import Identity
from ..recipe.kinds import HF, VLLM
from ..recipe.tasks import TASKS, module_of
from ..workers.job import Job
from .scorer import Opened


def open_teacher(job: Job, identity: Identity, store: Store, *, longest: int) -> Opened:
    """The teacher in the engine that the recipe names.

    Where it names none, that is the one that the first worker decided on.

    That is transformers where it loads the teacher and the device holds it, else vLLM.

    Args:
        job: The stage's.
        identity: The teacher.
        store: Where the decision is kept.
        longest: Tokens of the longest text.

    Raises:
        UsageError: the teacher does not load, or the engine is not installed.
    """
    named = job.recipe.scoring_engine or _decided(job, identity, store)
    if named is not None:
        return _open(named, job, identity, longest=longest)
    try:
        opened = _open(HF, job, identity, longest=longest)
    except (NotLoaded, MemoryError, RuntimeError) as error:
        if not _may_be_another(error, identity):
            raise
        job.progress.say(f"transformers does not load the teacher, so vllm runs it: {error}")
        opened = None
    # Only here, outside the handler, is the memory of a model that did not fit free.
    opened = opened or _open(VLLM, job, identity, longest=longest)
    decided = bind_engine(store.files, identity.id, opened.engine)
    if decided == opened.engine:
        return opened
    return _open(decided, job, identity, longest=longest)


def _decided(job: Job, identity: Identity, store: Store) -> str | None:
    if not TASKS[job.recipe.run.task].structure.shifted or job.score.features:
        return HF  # nothing else does these
    decided = bound_engine(store.files, identity.id)
    if decided not in (None, HF, VLLM):
        raise UsageError(
            f"score.engine: the store's first worker decided on {decided!r}, which this version "
            f"does not have. Name {HF!r} or {VLLM!r}."
        )
    return decided


def _may_be_another(error: Exception, identity: Identity) -> bool:
    """Whether vLLM may have what transformers does not load, or has no room for."""
    if not (is_installed(VLLM) and runs(VLLM, identity)):
        return False
    no_room = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return isinstance(error, NotLoaded) or no_room


def _open(engine: str, job: Job, identity: Identity, *, longest: int) -> Opened:
    if engine == HF:
        room = module_of(job.recipe.run.task, __package__)
        return Opened(identity, engine, room.Teacher(job, identity))
    from .by_engine import Teacher

    return Opened(identity, engine, Teacher(job, identity, longest=longest))
