"""A store on S3 has each key once, whatever becomes of an upload and its answer.

The faults are the server's (`s3_server.py`), so that drivers and connections see what they would
see of S3.
"""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from stillroom.storage.errors import StillroomError
from stillroom.storage.files.objects import ObjectFiles
from stillroom.storage.store.store import Store

COMMIT_UPLOADS = 2  # the shard and its record
UPLOADS = (
    3 + 2 * COMMIT_UPLOADS
)  # a new store with two commits: two probes and the marker come first


def add(store: Store, samples: Any, rows: range) -> int:
    return samples.add_targets(store, rows, commit_rows=3)


@pytest.mark.parametrize("kind", ["lost", "unheard", "409", "500", "500 done"])
def test_a_fault_at_any_upload_loses_and_repeats_nothing(s3, samples, kind):
    """The driver repeats what got no answer.

    What got a bad one is an error for a shard and settled for a record.
    """
    for number in range(1, UPLOADS + 1):
        root = f"{s3.root}-{number}"
        s3.log()
        s3.fault(kind, number)
        failed = False
        try:
            add(Store.open(root, create=True), samples, range(6))
        except StillroomError as error:
            failed = "Run the same command again" in str(error)
        hit = [line for line in s3.log() if line.startswith("PUT") and line.endswith(kind)]
        assert len(hit) == 1
        assert failed == ("/data/" in hit[0] and kind not in ("lost", "unheard"))
        s3.fault("")
        add(Store.open(root, create=True), samples, range(6))
        samples.assert_each_key_once(root, 6)


class LateFiles(ObjectFiles):
    """One create times out at the client.

    The service gets it only after `meanwhile`, or after our next create.
    """

    def __init__(self, root: str, number: int, meanwhile: Callable[[], Any] | None) -> None:
        super().__init__(root)
        self.left = number
        self.meanwhile = meanwhile
        self.underway: tuple[str, bytes] | None = None

    def _create(self, key: str, data: bytes) -> None:
        self.left -= 1
        if self.left == 0 and self.meanwhile is None:
            self.underway = key, data
            raise TimeoutError("no answer")
        if self.left == 0:
            self.meanwhile()
            with suppress(FileExistsError):
                super()._create(key, data)
            raise TimeoutError("no answer")
        super()._create(key, data)
        if self.underway:
            arrived, self.underway = self.underway, None
            with pytest.raises(FileExistsError):
                super()._create(*arrived)


@pytest.mark.parametrize("number", range(1, 6))
def test_an_upload_that_arrives_after_a_rival_took_its_number_is_dropped(s3, samples, number):
    files = LateFiles(
        s3.root, number, lambda: add(Store.open(s3.root, create=True), samples, range(2, 5))
    )
    add(Store.from_files(files, create=True), samples, range(6))
    assert files.left <= 0
    samples.assert_each_key_once(s3.root, 6)


@pytest.mark.parametrize("number", range(1, 6))
def test_an_upload_that_arrives_after_its_repetition_changes_nothing(s3, samples, number):
    files = LateFiles(s3.root, number, None)
    add(Store.from_files(files, create=True), samples, range(6))
    assert files.left <= 0
    assert files.underway is None
    samples.assert_each_key_once(s3.root, 6)


def test_the_driver_as_users_have_it_rides_out_a_short_outage(s3, samples, monkeypatch):
    monkeypatch.delenv("AWS_MAX_ATTEMPTS")
    s3.reconnect()
    store = Store.open(s3.root, create=True)
    for kind in ("500", "unheard"):
        s3.fault(kind, times=2)
        add(store, samples, range(6))
    samples.assert_each_key_once(s3.root, 6)


def test_an_outage_that_lasts_says_so_and_nothing_is_lost(s3, samples):
    store = Store.open(s3.root, create=True)
    add(store, samples, range(3))
    s3.fault("409", number=2, times=100)
    with pytest.raises(
        StillroomError, match=r"commits/soft_targets/00000001\.json: cannot write.*Run the same"
    ):
        add(store, samples, range(6))
    s3.fault("")
    add(Store.open(s3.root, create=True), samples, range(6))
    samples.assert_each_key_once(s3.root, 6)
