"""Which engine a recipe gets, and opening it."""

from importlib import import_module
from importlib.util import find_spec

from ...storage.errors import UsageError
from ..models.identity import Identity
from ..recipe.engines import ENGINES, EngineKind, Generate
from ..workers.clock import Clock
from .base import Engine


def choose_engine(name: str | None, *, quantizes: bool = False) -> str:
    """The engine that the recipe names; where it names none, the first one that is installed.

    `quantizes`: and that quantises the author's float weights while it loads them.

    Raises:
        UsageError: the engine was asked for by name and is not installed.
    """
    if name is None:
        built = [e for e in ENGINES if e.opened_by and (e.quantizes or not quantizes)]
        return next(engine.name for engine in built if _installed(engine))
    engine = _named(name)
    if not _installed(engine):
        raise UsageError(
            f"generate.engine: {name!r} is not installed here. Install {engine.install}, or use "
            "generate.engine=hf."
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


def _named(name: str) -> EngineKind:
    return next(engine for engine in ENGINES if engine.name == name)


def _installed(engine: EngineKind) -> bool:
    return not engine.needs or find_spec(engine.needs) is not None
