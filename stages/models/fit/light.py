"""transformers without torch: its config classes and its tables of names.

So a plan answers at once.
"""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

_aside: dict[str, ModuleType] = {}
"""Modules of a transformers that found no torch, between two uses of them."""


@contextmanager
def light_transformers() -> Iterator[None]:
    """Import parts of transformers that work without torch, and leave torch out.

    transformers imports torch wherever it finds it, for seconds. So it finds none here; and as what
    it imports meanwhile lacks its models, that is put aside afterwards. Where either of the two is
    loaded already, nothing is hidden. No object of transformers may leave this block, only what
    it says.
    """
    hide = "torch" not in sys.modules and "transformers" not in sys.modules
    quiet = logging.root.manager.disable
    # What it warns of is ours to say: torch is missing, an id is outside the vocabulary.
    logging.disable(logging.WARNING)
    if hide:
        sys.modules.update(_aside)
        sys.modules["torch"] = None  # type: ignore[assignment]  # so Python finds none
    try:
        yield
    finally:
        logging.disable(quiet)
        if hide:
            _put_aside()


def _put_aside() -> None:
    del sys.modules["torch"]
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers"]:
        _aside[name] = sys.modules.pop(name)
    # The transformers that finds torch adds its own.
    logging.getLogger("transformers").handlers.clear()


def config_classes() -> Any:
    """Model type -> config class, of those that transformers has."""
    return import_module("transformers.models.auto.configuration_auto").CONFIG_MAPPING


def knows(kind: Any) -> bool:
    """Whether transformers has a config class of this model type.

    A file may hold anything in its place.
    """
    return isinstance(kind, str) and kind in config_classes()


def class_names_of(use: str) -> dict[str, str | tuple[str, ...]]:
    """Model type -> names of its classes for a use, as `CAUSAL_LM`.

    It is empty where transformers knows no such use.
    """
    tables = import_module("transformers.models.auto.modeling_auto")
    return dict(getattr(tables, f"MODEL_FOR_{use}_MAPPING_NAMES", {}))


def all_class_names() -> set[str]:
    """Names of all classes of models in those tables."""
    tables = import_module("transformers.models.auto.modeling_auto")
    found: set[str] = set()
    for table, names in vars(tables).items():
        if table.startswith("MODEL_") and table.endswith("_MAPPING_NAMES"):
            for name in names.values():
                found.update([name] if isinstance(name, str) else name)
    return found


def version() -> str:
    """Of transformers."""
    return str(import_module("transformers").__version__)
