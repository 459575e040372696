"""Fixtures of the storage tests: the module `samples`, a store, and a store with rows."""

import importlib.util
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

from stillroom.storage.store import Store

SAMPLES = Path(__file__).with_name("samples.py")


@pytest.fixture(scope="session")
def samples() -> ModuleType:
    spec = importlib.util.spec_from_file_location("storage_samples", SAMPLES)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(tmp_path / "store", create=True)


@pytest.fixture(scope="session")
def template(samples, tmp_path_factory) -> Path:
    store = Store.open(tmp_path_factory.mktemp("template") / "store", create=True)
    samples.add_targets(store, range(40))
    for table, row in (("generations", samples.generation_row), ("prompts", samples.prompt_row)):
        with store.writer(table, about=samples.GENERATIONS_ABOUT) as writer:
            for index in range(5):
                writer.add(row(index))
    return store.root


@pytest.fixture
def filled(template, tmp_path) -> Store:
    """40 rows of soft targets in five shards, and rows in the other tables."""
    return Store.open(shutil.copytree(template, tmp_path / "filled"))
