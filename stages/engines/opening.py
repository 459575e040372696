"""Which engine a recipe gets, and opening it, to write or to read."""

from collections.abc import Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from ...storage.errors import UsageError
from ..models.identity import Identity
from ..recipe.engines import ENGINES, EngineKind, Generate
from ..workers.clock import Clock
from .base import Engine, Reader


def choose_engine(name: str | None, *, field: str = "generate.engine") -> str:
    """The engine that the recipe names; where it names none, the first one that is installed.

    Raises:
        UsageError: the engine was asked for by name and is not installed.
    """
    if name is None:
        return next(engine.name for engine in ENGINES if engine.opened_by and _installed(engine))
    engine = _named(name)
    if not _installed(engine):
        raise UsageError(
            f"{field}: {name!r} is not installed here. Install {engine.install}, or use {field}=hf."
        )
    return name


def open_engine(
    name: str, author: Identity, settings: Generate, clock: Clock | None = None
) -> Engine:
    """Load the author into an engine, which tells `clock` when the model works."""
    clock = clock or Clock()
    with clock.span("start"):
        module, class_name = _named(name).opened_by.split(".")
        engine_class = getattr(import_module(f".{module}", __package__), class_name)
        engine: Engine = engine_class(author, settings, clock)
    return engine


def open_reader(
    name: str, teacher: Identity, given: Mapping[str, Any], *, longest: int, clock: Clock
) -> Reader:
    """Load a teacher into the engine that is to read texts, the longest of so many tokens.

    Raises:
        UsageError: the engine is not installed, or refuses the teacher or its arguments.
    """
    from .vllm import VllmReader

    choose_engine(name, field="score.engine")
    with clock.span("start"):
        return VllmReader(teacher, given, longest=longest, clock=clock)


def is_installed(name: str) -> bool:
    """Whether an engine's package is here."""
    return _installed(_named(name))


def _named(name: str) -> EngineKind:
    return next(engine for engine in ENGINES if engine.name == name)


def _installed(engine: EngineKind) -> bool:
    return not engine.needs or find_spec(engine.needs) is not None
