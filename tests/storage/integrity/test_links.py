"""Links that a stranger left in a store.

Nothing that they lead to is deleted, shown, or read as ours.
"""

import os
from pathlib import Path

import pytest

from stillroom.storage.errors import IntegrityError, UsageError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.repair import repair
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.sql import query
from stillroom.storage.store.store import Store

SECRET = "marker-of-a-secret"
OLD = 10**9
FOLDERS = ("data/soft_targets/ab", "claims/score", "cache/index/prompts", "teachers/" + "a" * 32)
RECORDS = (
    "commits/soft_targets/00000005.json",
    "retired/generations/00000000.json",
    "inputs/" + "b" * 32 + ".json",
    "snapshots/" + "c" * 32 + ".json",
    "bindings/" + "d" * 16 + "/00000000.json",
    "teachers/" + "e" * 32 + "/identity.json",
    "data/soft_targets/cd/orphan.parquet",
    ".tmp-1",
)


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of files that would be old, useless and in the way if they were the store's."""
    folder = tmp_path / "outside"
    for name in ("secret.json", "orphan.parquet", ".tmp-2", "inner/00000001.0.json"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(SECRET)
        os.utime(folder / name, (OLD, OLD))
    return folder


def link(store: Store, name: str, target: Path) -> None:
    path = store.files.path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


def contents(folder: Path) -> dict[str, str]:
    return {str(path): path.read_text() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", [*FOLDERS, *RECORDS])
def test_what_a_link_leads_to_is_neither_deleted_nor_shown(
    filled: Store, outside: Path, name: str
) -> None:
    link(filled, name, outside if name in FOLDERS else outside / "secret.json")
    before = contents(outside)
    said = []
    for command in (verify, repair, lambda store: vacuum(store, older_than_hours=0)):
        try:
            said.append(str(command(Store.open(filled.root))))
        except IntegrityError as error:
            said.append(str(error))
    assert SECRET not in "".join(said)
    assert contents(outside) == before
    assert verify(Store.open(filled.root)).tables["soft_targets"].rows == 40


def test_the_links_of_the_hubs_cache_lead_to_its_blobs_alone(tmp_path: Path) -> None:
    repo = tmp_path / "datasets--a--b"
    folder, blobs = repo / "snapshots" / "0123" / "v-1", repo / "blobs"
    for made in (folder, blobs, tmp_path / "elsewhere"):
        made.mkdir(parents=True)
    (blobs / "blob").touch()
    (tmp_path / "elsewhere" / "file").touch()
    (folder / "own").touch()
    (folder / "good").symlink_to("../../../blobs/blob")
    (folder / "bad").symlink_to(tmp_path / "elsewhere" / "file")
    (folder / "bad-folder").symlink_to(tmp_path / "elsewhere")
    files = LocalFiles(folder)
    names = ("own", "good", "bad", "bad-folder/file", "absent")
    assert [name for name in names if files.leads_out(name)] == ["bad", "bad-folder/file"]


def test_a_shard_that_is_a_link_is_what_was_committed_or_damage(
    filled: Store, tmp_path: Path
) -> None:
    path = filled.files.path(filled.commits("soft_targets")[0].shard.name)
    path.symlink_to(path.rename(tmp_path / "moved.parquet"))
    assert verify(Store.open(filled.root)).ok
    with pytest.raises((UsageError, IntegrityError)):
        query(Store.open(filled.root), "SELECT sum(k) FROM soft_targets")
    (tmp_path / "moved.parquet").write_text(SECRET)
    report = verify(Store.open(filled.root))
    assert not report.ok
    assert SECRET not in str(report)
