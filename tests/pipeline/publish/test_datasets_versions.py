"""`datasets` 4.4.1 reads the same rows of a published folder as the one that is installed.

That holds whatever the rows hold.
"""

import shutil
from pathlib import Path

import pytest
from published import (
    CLASSES_ABOUT,
    DATASETS_441,
    class_row,
    generation_row,
    make_store,
    read_by_datasets,
    samples,
)

from stillroom.pipeline.publish.export import PublishRequest, export
from stillroom.storage.store.store import Store

KINDS = ("topk", "topp", "tempered", "sampled", "weighted", "full")


def exported(store: Store, folder: Path) -> Path:
    request = PublishRequest(store=str(store.root), license="mit")
    export(request, folder, say=lambda text: None)
    shutil.rmtree(store.root)
    return folder


def given_and_classified(folder: Path) -> list[Path]:
    """Text that nobody scored, and texts over classes, of which some have no label."""
    made = []
    for name in ("text", "classes"):
        store = Store.open(folder / name / "store", create=True)
        with store.writer("generations", about=samples.GENERATIONS_ABOUT) as writer:
            for index in range(6):
                writer.add(generation_row(index))
        if name == "classes":
            with store.writer("soft_targets", about=CLASSES_ABOUT) as writer:
                for index in range(6):
                    writer.add(class_row(index) | ({"label": None} if index == 4 else {}))
        made.append(exported(store, folder / name / "out"))
    return made


@pytest.mark.slow
@pytest.mark.skipif(DATASETS_441 is None, reason="STILLROOM_DATASETS_441 names no folder")
def test_both_read_the_same_rows(tmp_path: Path) -> None:
    """The stores have conversations with tools and fields, several spans, every kind of targets."""
    folders = [
        exported(make_store(tmp_path / kind / "store", kind=kind), tmp_path / kind / "out")
        for kind in KINDS
    ]
    folders += given_and_classified(tmp_path)
    now, rows = read_by_datasets(folders, tmp_path / "now")
    before, same = read_by_datasets(folders, tmp_path / "before", installed_in=str(DATASETS_441))
    assert (before, now.split(".")[0]) == ("4.4.1", "5")
    assert len(rows) == 2 * len(KINDS) + 3
    assert rows == same
