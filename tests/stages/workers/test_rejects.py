"""A row that fails in the engine is rejected only where the engine is known to do rows."""

from pathlib import Path
from typing import Any

import pytest

from stillroom.stages.workers.rejects import Rejects
from stillroom.storage.errors import StillroomError
from stillroom.storage.store.store import Store


def reject(number: int, reason: str) -> dict[str, Any]:
    return {
        "key": bytes([number]) * 16,
        "stage": "score",
        "reason": reason,
        "message": "no",
        "attempts": 1,
    }


def reasons(tmp_path: Path, *, proven: bool, works: bool) -> list[str]:
    store = Store.open(tmp_path / "store", create=True)
    with store.writer("rejects", about={}) as writer:
        rejects = Rejects(writer, proven=proven)
        rejects.add(reject(1, "engine"))
        if works:
            rejects.engine_works()
        rejects.add(reject(2, "engine_died"))
        if not (proven or works):
            with pytest.raises(
                StillroomError, match=r"all 2 rows that were tried failed \(engine: no\)"
            ):
                rejects.check()
        else:
            rejects.check()
    return store.index("rejects", ["reason"])["reason"].to_pylist()


@pytest.mark.parametrize(("proven", "works"), [(True, False), (False, True), (True, True)])
def test_failed_rows_are_rejected_where_the_engine_works(
    tmp_path: Path, proven: bool, works: bool
) -> None:
    assert reasons(tmp_path, proven=proven, works=works) == ["engine", "engine_died"]


def test_where_every_row_fails_none_is_rejected(tmp_path: Path) -> None:
    assert reasons(tmp_path, proven=False, works=False) == []
