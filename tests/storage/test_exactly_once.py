"""Every key exactly once: after kill -9, with writers that race, and after a fault or a power cut at any step."""

import errno
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.storage.errors import StillroomError
from stillroom.storage.files import Files
from stillroom.storage.store import Store
from stillroom.storage.verify import verify
from stillroom.storage.writer import CommitLimits

ROWS = 120


def start(samples, root: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, samples.__file__, str(root), "0", str(ROWS)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


def go(process: subprocess.Popen) -> None:
    process.stdin.write("go\n")
    process.stdin.flush()


def assert_each_key_once(root: Path, samples, rows: int = ROWS) -> None:
    store = Store.open(root)
    keys = store.index("soft_targets", ["key"])["key"].to_pylist()
    assert sorted(keys) == sorted(samples.target_key(i) for i in range(rows))
    report = verify(store)
    assert report.problems == []
    assert report.tables["soft_targets"].rows == rows


def test_killed_at_random_moments_and_resumed(tmp_path, samples):
    rng = random.Random()
    for _ in range(4):
        process = start(samples, tmp_path)
        go(process)
        for _ in range(rng.randrange(1, 40)):
            process.stdout.readline()
        process.kill()
        process.communicate()
        report = verify(Store.open(tmp_path))
        assert report.problems == []
    process = start(samples, tmp_path)
    process.communicate("go\n")
    assert process.returncode == 0
    assert_each_key_once(tmp_path, samples)


def test_two_processes_given_the_same_keys(tmp_path, samples):
    processes = [start(samples, tmp_path) for _ in range(2)]
    for process in processes:
        go(process)
    committed = [int(process.communicate()[0].split()[-1]) for process in processes]
    assert sum(committed) == ROWS
    assert_each_key_once(tmp_path, samples)


def test_the_loser_of_a_race_keeps_only_its_own_rows(store, samples):
    limits = CommitLimits(rows=100)
    with (
        store.writer("soft_targets", about=samples.ABOUT, limits=limits) as a,
        store.writer("soft_targets", about=samples.ABOUT, limits=limits) as b,
        store.writer("soft_targets", about=samples.ABOUT, limits=limits) as c,
    ):
        for index in range(6):
            a.add(samples.target_row(index))
        for index in range(3, 9):
            b.add(samples.target_row(index))
        for index in range(4, 6):
            c.add(samples.target_row(index))
        a.flush()
        b.flush()
        c.flush()
    assert [(w.rows, w.tokens, w.skipped) for w in (a, b, c)] == [(6, 36, 0), (3, 18, 3), (0, 0, 2)]
    assert [commit.shard.rows for commit in store.commits("soft_targets")] == [6, 3]
    assert_each_key_once(store.root, samples, rows=9)


class Crash(BaseException):
    """The process is gone: nothing catches it, and no cleaning up happens after it."""


class UnsyncedFiles(Files):
    """Leaves syncing out: what a real disk would lose is modelled below."""

    def _sync_file(self, path):
        pass

    def _sync_folder(self, folder):
        pass


class FaultyFiles(UnsyncedFiles):
    """Fails at the step with a given number; remembers what a power cut would take."""

    def __init__(self, root: Path, step: int, fault: BaseException) -> None:
        super().__init__(root)
        self.left = step
        self.fault = fault
        self.failed = False
        self.unsynced: set[Path] = set()
        self.unlisted: dict[Path, set[Path]] = {}

    def _step(self) -> None:
        if self.failed and isinstance(self.fault, Crash):
            raise self.fault
        self.left -= 1
        if self.left == 0:
            self.failed = True
            raise self.fault

    def _write(self, path, write):
        super()._write(path, write)
        self.unsynced.add(path)
        try:
            self._step()
        except BaseException:
            os.truncate(path, path.stat().st_size // 2)
            raise

    def _sync_file(self, path):
        self._step()
        self.unsynced.discard(path)

    def _link(self, temp, final):
        self._step()
        super()._link(temp, final)
        self.unlisted.setdefault(final.parent, set()).add(final)
        if temp in self.unsynced:
            self.unsynced.add(final)

    def _unlink(self, path):
        self._step()
        super()._unlink(path)

    def _make_folder(self, folder):
        if not folder.exists() and folder != self.root:
            self.unlisted.setdefault(folder.parent, set()).add(folder)
        super()._make_folder(folder)

    def _sync_folder(self, folder):
        self._step()
        self.unlisted.pop(folder, None)

    def cut_power(self) -> None:
        """Lose what was not synced: content of files, and names in folders."""
        for path in self.unsynced:
            if path.exists():
                os.truncate(path, 0)
        for names in self.unlisted.values():
            for path in names:
                shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def attempt(root: Path, samples, step: int, fault: BaseException) -> tuple[FaultyFiles, set[bytes], bool]:
    """Write 6 rows in 2 commits, failing at a step; returns the keys said to be committed, and if it came through."""
    files = FaultyFiles(root, step, fault)
    known: set[bytes] = set()
    try:
        store = Store.from_files(files, create=True)
        with store.writer("soft_targets", about=samples.ABOUT, limits=CommitLimits(rows=3)) as writer:
            for index in range(6):
                writer.add(samples.target_row(index))
                known = {samples.target_key(i) for i in range(writer.rows)}
    except (Crash, StillroomError):
        return files, known, False
    return files, known, not files.failed


@pytest.mark.parametrize("kind", ["disk full", "crash", "power cut"])
def test_a_fault_at_any_step(tmp_path, samples, kind):
    for step in range(1, 1000):
        root = tmp_path / str(step)
        root.mkdir()
        fault = OSError(errno.ENOSPC, "No space left on device") if kind == "disk full" else Crash()
        files, known, came_through = attempt(root, samples, step, fault)
        if kind == "power cut":
            files.cut_power()
        store = Store.from_files(UnsyncedFiles(root), create=True)
        assert known <= set(store.index("soft_targets", ["key"])["key"].to_pylist()), f"rows lost at step {step}"
        assert verify(store).problems == [], f"damage at step {step}"
        samples.add_targets(store, range(6), commit_rows=3)
        assert_each_key_once(root, samples, rows=6)
        shutil.rmtree(root)
        if came_through:
            break
    assert step > 20


NAMESPACE = ["unshare", "--map-root-user", "--mount"]
FULL_DISK = """
mount -t tmpfs -o size=400k none "$1"
echo | "$2" "$3" "$1/store" 0 4000
status=$?
"$2" -c '
import sys
from stillroom.storage.store import Store
from stillroom.storage.verify import verify
report = verify(Store.open(sys.argv[1]))
print("verified", report.tables["soft_targets"].rows, len(report.problems), len(report.notes))
' "$1/store"
exit $status
"""


@pytest.mark.skipif(
    not shutil.which("unshare") or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace of its own",
)
def test_a_disk_that_really_is_full(tmp_path, samples):
    command = [*NAMESPACE, "sh", "-c", FULL_DISK, "sh", str(tmp_path), sys.executable, samples.__file__]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "the disk is full. Free space and run the same command again" in result.stderr
    verified, rows, problems, notes = result.stdout.splitlines()[-1].split()
    assert (verified, problems) == ("verified", "0")
    assert 0 < int(rows) < 4000
    assert int(notes) <= 1  # a shard whose record found no room
