"""A fault at every single step of everything that writes.

All recover, no acknowledged row is lost, and no fault is silent.

The steps are those of `LocalFiles`. For each scenario the fault comes at step 1, 2, 3 and so on
until the scenario ends before it; then it is run again without faults, and the store must be whole
and complete.
"""

import errno
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from stillroom.storage.errors import StillroomError
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.repair import repair
from stillroom.storage.integrity.vacuum import vacuum
from stillroom.storage.integrity.verify import verify
from stillroom.storage.keys import content_id
from stillroom.storage.snapshots.snapshot import load_snapshot, make_snapshot, save_snapshot
from stillroom.storage.store.commits import record_name
from stillroom.storage.store.inputs import INPUTS_SCHEMA
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits

ROWS = 4
TEACHER = content_id("model")


class Crash(BaseException):
    """The process is gone: nothing catches it, and no cleaning up happens after it."""


class UnsyncedFiles(LocalFiles):
    """Leaves syncing out: what a real disk would lose is modelled below."""

    def _sync_file(self, path):
        pass

    def _sync_folder(self, folder):
        pass


ERRORS = {"EIO": errno.EIO, "ENOSPC": errno.ENOSPC, "EACCES": errno.EACCES}
KINDS = [*ERRORS, "crash", "power cut", "torn write", "answer lost", "late"]


class FaultyFiles(UnsyncedFiles):
    """Fails at the step with a given number; remembers what a power cut would take.

    An error leaves half of what was to be written. A crash ends the process. A power cut also takes
    what was not synced: contents, new names, replaced and removed ones; in a torn write some of
    that is there and some is noise. A lost answer is an error although the step was done; a late
    step is an error too, and is done after the process has given up.
    """

    def __init__(self, root: Path, step: int, kind: str) -> None:
        super().__init__(root)
        self.left = step
        self.kind = kind
        self.failed = False
        self.unsynced: set[Path] = set()
        self.unlisted: dict[Path, set[Path]] = {}
        self.before: dict[Path, bytes] = {}
        self.late: dict[Path, bytes] = {}
        self.random = random.Random(step)

    @property
    def crashes(self) -> bool:
        return self.kind in ("crash", "power cut", "torn write")

    def _step(self, effect: Callable[[], None], partial: Callable[[], None] = lambda: None) -> None:
        if self.failed and self.crashes:
            raise Crash
        self.left -= 1
        if self.left:
            return effect()
        self.failed = True
        if self.kind == "answer lost":
            effect()
        else:
            partial()
        if self.crashes:
            raise Crash
        number = ERRORS.get(self.kind, errno.EIO)
        raise OSError(number, os.strerror(number))

    def _write(self, path, write):
        super()._write(path, write)
        self.unsynced.add(path)
        self._step(lambda: None, lambda: os.truncate(path, path.stat().st_size // 2))

    def _sync_file(self, path):
        self._step(lambda: self.unsynced.discard(path))

    def _link(self, temp, final):
        def link():
            super(FaultyFiles, self)._link(temp, final)
            self.unlisted.setdefault(final.parent, set()).add(final)
            if temp in self.unsynced:
                self.unsynced.add(final)

        self._step(link, lambda: self._later(temp, final))

    def _replace(self, temp, final):
        def replace():
            self._remember(final)
            super(FaultyFiles, self)._replace(temp, final)

        self._step(replace, lambda: self._later(temp, final))

    def _unlink(self, path):
        def unlink():
            if not path.name.startswith("."):
                self._remember(path)
            super(FaultyFiles, self)._unlink(path)

        self._step(unlink)

    def _make_folder(self, folder):
        if not folder.exists() and folder != self.root:
            self.unlisted.setdefault(folder.parent, set()).add(folder)
        super()._make_folder(folder)

    def _sync_folder(self, folder):
        def sync():
            self.unlisted.pop(folder, None)
            self.before = {
                path: data for path, data in self.before.items() if path.parent != folder
            }

        self._step(sync)

    def _remember(self, path: Path) -> None:
        if path.exists():
            self.before.setdefault(path, path.read_bytes())

    def _later(self, temp: Path, final: Path) -> None:
        if self.kind == "late":
            self.late[final] = temp.read_bytes()

    def settle(self) -> None:
        """What happens once the process is gone: late steps come true, or the power fails."""
        for path, data in self.late.items():
            if not path.exists():
                path.write_bytes(data)
        if self.kind not in ("power cut", "torn write"):
            return
        torn = self.kind == "torn write"
        for path in self.unsynced:
            if path.exists():
                data = path.read_bytes()
                kept = self.random.randrange(len(data) + 1) if torn else 0
                noise = (
                    self.random.randbytes(len(data) - kept)
                    if torn and self.random.random() < 0.5
                    else b""
                )
                path.write_bytes(data[:kept] + noise)
        for path in [path for paths in self.unlisted.values() for path in paths]:
            if not torn or self.random.random() < 0.5:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        for path, data in self.before.items():
            if path.parent.is_dir() and (not torn or self.random.random() < 0.5):
                path.write_bytes(data)


@dataclass
class Attempt:
    """One run of a scenario into a fault."""

    samples: Any
    acknowledged: set[bytes] = field(default_factory=set)
    """Keys of the rows that the writer said it had committed."""


def write(store: Store, attempt: Attempt, *, rows: int = ROWS) -> None:
    """Two commits."""
    samples = attempt.samples
    with store.writer("soft_targets", about=samples.ABOUT, limits=CommitLimits(rows=2)) as writer:
        for index in range(rows):
            if writer.add(samples.target_row(index, tokens=2, k=2)):
                attempt.acknowledged = {samples.target_key(i) for i in range(writer.rows)}


def put_inputs(store: Store, attempt: Attempt) -> None:
    columns = {
        "key": [b"k" * 16],
        "prompt_key": [b"p" * 16],
        "split": ["train"],
        "windows": [None],
        "first": [True],
    }
    store.put_inputs(
        "d", pa.table({n: columns[n] for n in INPUTS_SCHEMA.names}, schema=INPUTS_SCHEMA), {}
    )


def put_teacher(store: Store, attempt: Attempt) -> None:
    store.put_teacher(TEACHER, {"tokenizer.json": b"{}", "identity.json": b"{}"})


def keep_snapshot(store: Store, attempt: Attempt) -> None:
    shard = store.commits("soft_targets")[0].shard.sha256
    save_snapshot(store, make_snapshot(store, "soft_targets", {shard: [1]}, {}))


def withdraw(store: Store, attempt: Attempt) -> None:
    store.retire(store.commits("soft_targets")[0], reason="test")


def damage(store: Store, attempt: Attempt) -> None:
    """A shard, an inputs record, and a withdrawal."""
    put_inputs(store, attempt)
    store.retire(store.commits("soft_targets")[0], reason="test")
    shard = store.files.path(store.commits("soft_targets")[0].shard.name)
    for path in (
        shard,
        store.files.path("inputs/d.json"),
        store.files.path(record_name("soft_targets", 0, folder="retired")),
    ):
        path.write_bytes(path.read_bytes()[:-20])


def litter(store: Store, attempt: Attempt) -> None:
    """A withdrawn shard, an orphan and a temporary file."""
    withdraw(store, attempt)
    for name in ("data/soft_targets/ab/orphan.parquet", "data/.tmp-1"):
        store.files.path(name).parent.mkdir(exist_ok=True)
        store.files.path(name).write_bytes(b"x")


def mend(store: Store, attempt: Attempt) -> None:
    repair(store)


def clean(store: Store, attempt: Attempt) -> None:
    vacuum(store, older_than_hours=0)


@dataclass
class Scenario:
    """What is done under faults, on a store made ready for it."""

    act: Callable[[Store, Attempt], None]
    ready: tuple[Callable[[Store, Attempt], None], ...] = (write,)
    done: Callable[[Store], bool] = lambda store: True
    """Whether the store shows that it was done."""


SCENARIOS = {
    "create and write": Scenario(
        write, (), lambda store: store.index("soft_targets", ["key"]).num_rows == ROWS
    ),
    "inputs": Scenario(put_inputs, (), lambda store: store.inputs("d") is not None),
    "teacher": Scenario(
        put_teacher, (), lambda store: bool(store.files.exists(f"teachers/{TEACHER}/identity.json"))
    ),
    "snapshot": Scenario(
        keep_snapshot,
        done=lambda store: any(
            load_snapshot(store, n[:-5]).rows == 1 for n in store.files.names("snapshots")
        ),
    ),
    "retire": Scenario(withdraw, done=lambda store: len(store.commits("soft_targets")) == 1),
    "repair": Scenario(mend, (write, damage), lambda store: store.commits("soft_targets") == []),
    "vacuum": Scenario(
        clean, (write, litter), lambda store: len(list(store.files.walk("data"))) == 1
    ),
}


def under_fault(scenario: Scenario, files: FaultyFiles, attempt: Attempt) -> bool:
    """Whether it said that it was done."""
    try:
        scenario.act(Store.from_files(files, create=True), attempt)
    except (Crash, StillroomError):
        return False
    return True


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_fault_at_every_step(tmp_path, samples, name, kind):
    scenario = SCENARIOS[name]
    ready = tmp_path / "ready"
    ready.mkdir()
    for prepare in scenario.ready:
        prepare(Store.from_files(UnsyncedFiles(ready), create=True), Attempt(samples))
    for step in range(1, 1000):
        root = tmp_path / str(step)
        shutil.copytree(ready, root)
        files, attempt = FaultyFiles(root, step, kind), Attempt(samples)
        said_done = under_fault(scenario, files, attempt)
        files.settle()
        where = f"{kind} at step {step} of {name}"
        store = Store.from_files(UnsyncedFiles(root), create=True)
        if name == "repair" and not said_done:
            repair(store)
        assert verify(store).problems == [], where
        assert not said_done or scenario.done(store), f"silent: {where}"
        keys = store.index("soft_targets", ["key"])["key"].to_pylist()
        assert attempt.acknowledged <= set(keys), f"rows lost: {where}"
        assert len(keys) == len(set(keys)), where

        scenario.act(store, Attempt(samples)) if not scenario.done(store) else None
        assert scenario.done(store), where
        write(store, Attempt(samples))
        keys = store.index("soft_targets", ["key"])["key"].to_pylist()
        assert sorted(keys) == sorted(samples.target_key(i) for i in range(ROWS)), where
        assert verify(store).problems == [], where
        shutil.rmtree(root)
        if not files.failed:
            break
    assert said_done
    assert step > 5
