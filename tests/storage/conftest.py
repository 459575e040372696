"""Fixtures of the storage tests.

They are the module `samples`, a store, a store with rows, and an S3 server.
"""

import shutil
from pathlib import Path
from types import ModuleType

import pytest
import samples
from s3_service import port, s3

from stillroom.storage.store.store import Store

__all__ = ["port", "s3"]


@pytest.fixture(scope="session", name="samples")
def samples_module() -> ModuleType:
    return samples


@pytest.fixture
def store(tmp_path) -> Store:
    return Store.open(tmp_path / "store", create=True)


@pytest.fixture(scope="session")
def template(tmp_path_factory) -> Path:
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
