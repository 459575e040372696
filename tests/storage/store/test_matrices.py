"""Matrices of a store: kept once, read by their hash, proved and mended.

They are swept only where nothing names them.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stillroom.storage.errors import IntegrityError
from stillroom.storage.integrity.matrices import check_matrices
from stillroom.storage.integrity.repair import repair
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.joined import open_store
from stillroom.storage.snapshots.snapshot import make_snapshot
from stillroom.storage.store.matrices import matrix_file, record_file
from stillroom.storage.store.store import Store
from stillroom.storage.tables.features import Layout, Projected
from stillroom.storage.tables.row_builders import feature_row

NAME = "0" * 16


def matrix(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(6, 4)).astype(np.float32)


def kept(store: Store, seed: int = 0) -> str:
    store.put_matrix(NAME, matrix(seed), {"what": "a test's"})
    found = store.matrix_named(NAME)
    assert found is not None
    return found.id


def projected_row(matrix_id: str, *, before: int = 6) -> dict[str, Any]:
    return feature_row(
        key=bytes(16),
        reuse_key=bytes(16),
        text_key=bytes(16),
        teacher_id="t",
        kind="values_4",
        layer=1,
        states=np.ones((3, 4), np.float32),
        dtype="float16",
        layout=Layout(width=4, projected_from=before),
        projected=Projected(projection=matrix_id, projection_error=0.1),
    )


def test_the_first_matrix_of_a_name_stays(store: Store) -> None:
    assert store.matrix_named(NAME) is None
    first = kept(store)
    assert kept(store, seed=1) == first, "somebody else's is another one"
    np.testing.assert_array_equal(store.matrix(first), matrix())
    assert store.matrix(first).dtype == np.float32
    assert store.matrix_named(NAME).about == {"what": "a test's"}


def test_a_file_that_was_there_before_is_not_relied_on(store: Store) -> None:
    """It may be about to be vacuumed: a writer that was stopped left it."""
    first = kept(store)
    store.files.remove(record_file(NAME))
    second = kept(store)
    assert second != first
    np.testing.assert_array_equal(store.matrix(second), matrix())


@pytest.mark.parametrize("damage", ["changed", "cut short", "missing", "another"])
def test_a_damaged_matrix_is_never_read(store: Store, damage: str) -> None:
    path = store.files.path(matrix_file(kept(store)))
    data = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        other = {"changed": data[:-1] + bytes([data[-1] ^ 1]), "cut short": data[:-4]}
        path.write_bytes(other.get(damage, b"not numpy's"))
    with pytest.raises(IntegrityError, match=rf"{path.name}.*(damaged|missing)"):
        store.matrix(path.stem)
    (problem,) = verify(store).problems
    assert problem.file == matrix_file(path.stem)
    done = repair(store)
    assert done.ok
    assert record_file(NAME) in done.removed
    assert verify(store).ok
    assert store.matrix_named(NAME) is None
    np.testing.assert_array_equal(store.matrix(kept(store)), matrix())


@pytest.mark.parametrize("wrong", [np.zeros(3, np.float32), np.zeros((2, 2), np.int64)])
def test_a_file_with_something_else_is_no_matrix(store: Store, wrong: np.ndarray) -> None:
    store.put_matrix(NAME, wrong, {})
    with pytest.raises(IntegrityError, match="not a matrix"):
        store.matrix(store.matrix_named(NAME).id)
    assert not verify(store).ok


def test_numbers_that_are_none_are_found(store: Store) -> None:
    store.put_matrix(NAME, np.full((2, 2), np.nan, np.float32), {})
    (problem,) = verify(store).problems
    assert "not finite" in problem.message


def test_a_changed_record_is_found_and_made_again(store: Store) -> None:
    kept(store)
    path = store.files.path(record_file(NAME))
    path.write_bytes(path.read_bytes().replace(b"a test", b"a thief"))
    with pytest.raises(IntegrityError, match="changed"):
        store.matrix_named(NAME)
    assert [problem.file for problem in verify(store).problems] == [record_file(NAME)]
    with pytest.raises(IntegrityError, match="nothing was removed"):
        vacuum(store)
    assert repair(store).ok
    assert store.matrix_named(NAME) is None


def test_only_a_matrix_without_a_record_is_swept(store: Store) -> None:
    first = kept(store)
    store.files.remove(record_file(NAME))
    second = kept(store)
    assert any(matrix_file(first) in note for note in verify(store).notes)
    assert vacuum(store).files == {}, "it is young"
    for name, _, changed in list(store.files.walk("matrices")):
        os.utime(store.files.path(name), (changed - 25 * 3600,) * 2)
    assert set(vacuum(store).files) == {matrix_file(first)}
    store.matrix(second)
    assert verify(store).notes == []


def test_a_sources_matrix_serves(store: Store, tmp_path: Path) -> None:
    matrix_id = kept(store)
    Store.open(tmp_path / "own", create=True)
    joined = open_store(tmp_path / "own", [str(store.root)])
    assert joined.matrix_named(NAME).id == matrix_id
    np.testing.assert_array_equal(joined.matrix(matrix_id), matrix())


def test_on_an_object_store_the_object_counts(s3: Any) -> None:
    store = Store.open(s3.root, create=True)
    matrix_id = kept(store)
    name = matrix_file(matrix_id)
    np.testing.assert_array_equal(store.matrix(matrix_id), matrix())
    store.files.cache.path(name).write_bytes(b"a damaged copy")
    np.testing.assert_array_equal(store.matrix(matrix_id), matrix())
    assert verify(store).ok
    store.files.system.pipe_file(store.files._key(name), b"a damaged object")
    assert not verify(store).ok
    assert repair(store).ok
    np.testing.assert_array_equal(store.matrix(kept(store)), matrix())


def test_rows_that_name_a_matrix_keep_it_and_go_with_it(store: Store) -> None:
    """Without the bits that they were projected by, rows are worth nothing."""
    matrix_id = kept(store)
    row = projected_row(matrix_id)
    with store.writer("features", about={"teacher_id": "t"}) as writer:
        writer.add(row)
    assert verify(store).problems == []
    store.files.remove(record_file(NAME))
    assert matrix_file(matrix_id) not in vacuum(store, older_than_hours=0).files
    assert verify(store).notes == []
    store.files.path(matrix_file(matrix_id)).write_bytes(b"something else")
    (problem,) = verify(store).problems
    assert (problem.file, problem.column) == ("commits/features/00000000.json", "projection")
    assert repair(store).ok
    assert store.commits("features") == []
    assert verify(store).ok


def test_a_matrix_of_another_shape_than_its_rows_say_is_found(store: Store) -> None:
    with store.writer("features", about={"teacher_id": "t"}) as writer:
        writer.add(projected_row(kept(store), before=5))
    (problem,) = verify(store).problems
    assert problem.column == "projection"
    assert "the matrix is 6 x 4, and rows that name it say 5 x 4" in problem.message
    rows = {commit.shard.sha256: np.arange(1) for commit in store.commits("features")}
    with pytest.raises(IntegrityError, match="6 x 4, and rows that name it say 5 x 4"):
        check_matrices(store, make_snapshot(store, "features", rows, {}))


def test_rows_on_an_object_store_keep_their_matrix(s3: Any) -> None:
    store = Store.open(s3.root, create=True)
    matrix_id = kept(store)
    with store.writer("features", about={"teacher_id": "t"}) as writer:
        writer.add(projected_row(matrix_id))
    rows = {commit.shard.sha256: np.arange(1) for commit in store.commits("features")}
    snapshot = make_snapshot(store, "features", rows, {})
    check_matrices(store, snapshot)
    assert verify(store).ok
    store.files.remove(record_file(NAME))
    assert matrix_file(matrix_id) not in vacuum(store, older_than_hours=0).files
    store.files.remove(matrix_file(matrix_id))
    store.files.cache.remove(matrix_file(matrix_id))
    assert any(problem.column == "projection" for problem in verify(store).problems)
    with pytest.raises(IntegrityError, match="the matrix is missing"):
        check_matrices(store, snapshot)
