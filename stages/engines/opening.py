"""Which engine a recipe gets, and opening it."""

from importlib import import_module
from importlib.util import find_spec

from ...storage.errors import UsageError
from ..models.identity import Identity
from ..recipe.engines import ENGINES, EngineKind, Generate
from ..workers.answers import Answers
from ..workers.clock import Clock
from .base import Engine


def choose_engine(name: str | None) -> str:
    """The engine that the recipe names; where it names none, the first one that is installed.

    Raises:
        UsageError: the engine was asked for by name and is not installed.
    """
    if name is None:
        return next(engine.name for engine in ENGINES if not engine.remote and _installed(engine))
    engine = _named(name)
    if not _installed(engine):
        raise UsageError(
            f"generate.engine: {name!r} is not installed here. Install {engine.install}"
            + ("." if engine.remote else ", or use generate.engine=hf.")
        )
    return name


def open_engine(
    name: str,
    author: Identity,
    settings: Generate,
    clock: Clock | None = None,
    *,
    answers: Answers | None = None,
) -> Engine:
    """Load the author into an engine, which tells `clock` when the model works.

    `answers`: where an engine that asks an endpoint keeps what it hears.
    """
    clock = clock or Clock()
    with clock.span("start"):
        kind = _named(name)
        module, class_name = kind.opened_by.split(".")
        engine_class = getattr(import_module(f".{module}", __package__), class_name)
        own = (answers,) if kind.remote else ()
        engine: Engine = engine_class(author, settings, clock, *own)
    return engine


def _named(name: str) -> EngineKind:
    return next(engine for engine in ENGINES if engine.name == name)


def _installed(engine: EngineKind) -> bool:
    return not engine.needs or find_spec(engine.needs) is not None
