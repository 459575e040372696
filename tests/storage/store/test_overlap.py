"""A shard is made in the writer's thread while rows are added.

It shows what is known then, what fails, and what a kill leaves.
"""

import subprocess
import sys
import threading
from pathlib import Path

import pytest

from stillroom.storage.errors import StillroomError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits

LIMITS = CommitLimits(rows=2)


class GatedFiles(LocalFiles):
    """Files that begin no shard before the gate opens.

    They count the commits that are there when one is asked for.
    """

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.reached, self.gate = threading.Event(), threading.Event()
        self.broken = False
        self.commits_seen: list[int] = []

    def put_content(self, folder, write, *, suffix):
        self.commits_seen.append(len(self.names("commits/soft_targets")))
        self.reached.set()
        assert self.gate.wait(60)
        if self.broken:
            raise StillroomError("the disk is gone")
        return super().put_content(folder, write, suffix=suffix)


@pytest.fixture
def gated(tmp_path) -> tuple[GatedFiles, Store]:
    files = GatedFiles(tmp_path / "store")
    return files, Store.from_files(files, create=True)


def keys_of(store: Store) -> list[bytes]:
    return sorted(store.index("soft_targets", ["key"])["key"].to_pylist())


def test_rows_are_added_while_a_shard_is_made_and_nothing_is_committed_before_it_is(gated, samples):
    files, store = gated
    with store.writer("soft_targets", about=samples.ABOUT, limits=LIMITS) as writer:
        for index in range(3):
            assert writer.add(samples.target_row(index))
        assert files.reached.wait(60)
        assert not writer.add(samples.target_row(0))  # in the making
        assert not writer.add(samples.target_row(2))  # waiting
        writer.tick()
        assert (writer.rows, writer.skipped, store.commits("soft_targets")) == (0, 2, [])
        assert not writer.committed(samples.target_key(0))
        files.gate.set()
    assert (writer.rows, writer.tokens) == (3, 18)
    assert writer.bytes == sum(commit.shard.bytes for commit in store.commits("soft_targets"))
    assert [commit.shard.rows for commit in store.commits("soft_targets")] == [2, 1]
    assert verify(store).ok


def test_one_shard_is_in_the_making_at_a_time(gated, samples):
    """Two shards' rows at most are in memory: none begins before the last is committed."""
    files, store = gated
    files.gate.set()
    assert samples.add_targets(store, range(8), commit_rows=2) == 8
    assert files.commits_seen == [0, 1, 2, 3]


@pytest.mark.parametrize("call", ["add", "tick", "flush", "leave"])
def test_what_fails_in_the_thread_is_raised_by_the_next_call_and_commits_nothing(
    gated, samples, call
):
    files, store = gated
    files.broken = True
    files.gate.set()

    def stage() -> None:
        with store.writer("soft_targets", about=samples.ABOUT, limits=LIMITS) as writer:
            writer.add(samples.target_row(0))
            writer.add(samples.target_row(1))
            writer._making.shard.exception()  # the thread is done
            if call == "add":
                writer.add(samples.target_row(2))
            elif call != "leave":
                getattr(writer, call)()
            assert call == "leave"

    with pytest.raises(StillroomError, match="the disk is gone"):
        stage()
    assert store.commits("soft_targets") == []
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("shards of")]
    files.broken = False
    samples.add_targets(store, range(3))
    assert keys_of(store) == sorted(map(samples.target_key, range(3)))


def test_rows_that_others_commit_while_a_shard_is_made_are_left_out_of_it(gated, samples):
    files, store = gated
    with store.writer("soft_targets", about=samples.ABOUT, limits=CommitLimits(rows=3)) as writer:
        for index in range(3):
            writer.add(samples.target_row(index))
        assert files.reached.wait(60)
        samples.add_targets(Store.open(files.root), [1])
        files.gate.set()
    assert (writer.rows, writer.skipped) == (2, 1)
    assert keys_of(store) == sorted(map(samples.target_key, range(3)))
    assert verify(store).ok


KILLED = """
import importlib.util, sys, threading
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
spec = importlib.util.spec_from_file_location("samples", sys.argv[2])
samples = importlib.util.module_from_spec(spec)
sys.modules["samples"] = samples
spec.loader.exec_module(samples)

class Files(LocalFiles):
    def _link(self, temp, final):
        committed = list(self.root.glob("commits/soft_targets/*.json"))
        if "data/soft_targets" in str(final) and committed:
            print("written, not linked", flush=True)
            threading.Event().wait()
        super()._link(temp, final)

store = Store.from_files(Files(sys.argv[1]), create=True)
with store.writer("soft_targets", about=samples.ABOUT, limits=CommitLimits(rows=4)) as writer:
    for index in range(12):
        writer.add(samples.target_row(index))
"""


def test_killed_while_the_thread_writes_and_run_again(tmp_path, samples):
    """The second shard never gets its name.

    The process dies with it, and whoever comes next makes its rows again.
    """
    root = tmp_path / "store"
    words = [sys.executable, "-c", KILLED, str(root), samples.__file__]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "written, not linked\n"
    process.kill()
    process.communicate()
    store = Store.open(root)
    assert verify(store).problems == []
    assert keys_of(store) == sorted(map(samples.target_key, range(4)))
    samples.add_targets(store, range(12))
    other = Store.open(tmp_path / "other", create=True)
    samples.add_targets(other, range(12))
    assert keys_of(store) == keys_of(other)
    assert verify(store).problems == []
