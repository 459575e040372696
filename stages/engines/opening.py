"""Which engine a recipe gets, and opening it, to write or to read."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ...storage.errors import UsageError
from ..models.fit.quantized import by_bitsandbytes
from ..models.identity import Identity
from ..recipe.engines import ENGINES, EngineKind, Generate
from ..workers.answers import Answers
from ..workers.clock import Clock
from .base import Engine, Reader


def choose_engine(name: str | None, author: Identity, *, field: str = "generate.engine") -> str:
    """The engine that the recipe names, or the first one that can run the author.

    Where it names none, that is the first one that is installed and runs the author.

    Raises:
        UsageError: the engine was asked for by name, and is not installed or does not run the
            author.
    """
    if name is None:
        built = (engine.name for engine in ENGINES if not engine.remote and _installed(engine))
        return next(engine for engine in built if runs(engine, author))
    refuse_engine(name, author, field=field)
    engine = _named(name)
    if not _installed(engine):
        raise UsageError(
            f"{field}: {name!r} is not installed here. Install {engine.install}"
            + ("." if engine.remote else f", or use {field}=hf.")
        )
    return name


def refuse_engine(name: str | None, author: Identity, *, field: str = "generate.engine") -> None:
    """Refuse an engine that is asked for by name and does not run a model that is quantised so.

    Raises:
        UsageError: it does not.
    """
    if name is not None and not runs(name, author):
        raise UsageError(
            f"{field}: {name!r} does not run {author.folder}, which is quantised: "
            f"{author.quantized}. Use {field}=hf, or another model."
        )


def runs(name: str, author: Identity) -> bool:
    """Whether an engine runs a model that is quantised so."""
    engine = _named(name)
    return engine.remote or engine.bitsandbytes or not by_bitsandbytes(author.parts)


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


def open_reader(
    name: str, teacher: Identity, given: Mapping[str, Any], *, longest: int, clock: Clock
) -> Reader:
    """Load a teacher into the engine that is to read texts, the longest of so many tokens.

    Raises:
        UsageError: the engine is not installed, or refuses the teacher or its arguments.
    """
    from .vllm import VllmReader

    choose_engine(name, teacher, field="score.engine")
    with clock.span("start"):
        return VllmReader(teacher, given, longest=longest, clock=clock)


def is_installed(name: str) -> bool:
    """Whether an engine's package is here."""
    return _installed(_named(name))


def _named(name: str) -> EngineKind:
    return next(engine for engine in ENGINES if engine.name == name)


def _installed(engine: EngineKind) -> bool:
    return not engine.needs or find_spec(engine.needs) is not None
