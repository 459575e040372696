"""Every key exactly once: after kill -9, with writers that race, on a disk that is full.

`test_faults.py`: faults.
"""

import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.shards import split_keys
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.commits import numbers, read_commit
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits

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


TRIALS = 50
RACER = """
import importlib.util, random, sys
from stillroom.storage.store.store import Store
from stillroom.storage.store.writer import CommitLimits
spec = importlib.util.spec_from_file_location("samples", sys.argv[2])
samples = importlib.util.module_from_spec(spec)
spec.loader.exec_module(samples)
rows = [samples.target_row(index, tokens=2, k=2) for index in range(6)]
print("ready", flush=True)
for line in sys.stdin:
    rng = random.Random(line + sys.argv[3])
    store = Store.open(f"{sys.argv[1]}/{int(line)}", create=True)
    limits = CommitLimits(rows=rng.choice([2, 3, 6]))
    with store.writer("soft_targets", about=samples.ABOUT, limits=limits) as writer:
        for row in rows if rng.random() < 0.5 else rng.sample(rows, 6):
            writer.add(row)
    print(writer.rows, flush=True)
"""


def test_two_workers_one_task_fifty_trials(tmp_path, samples):
    """Two processes make the same rows in the same new store at the same moment.

    Their order is the same or not.
    """
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, str(tmp_path), samples.__file__, str(number)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    for racer in racers:
        assert racer.stdout.readline() == "ready\n"
    expected = sorted(samples.target_key(index) for index in range(6))
    shared = 0
    for trial in range(TRIALS):
        for racer in racers:
            racer.stdin.write(f"{trial}\n")
            racer.stdin.flush()
        committed = [int(racer.stdout.readline()) for racer in racers]
        assert sum(committed) == 6, trial
        shared += all(committed)
        files = LocalFiles(tmp_path / str(trial))
        keys = b"".join(
            read_commit(files, "soft_targets", n)[1] for n in numbers(files, "soft_targets")
        )
        assert sorted(split_keys(keys)) == expected, trial
        if trial % 10 == 0:
            assert verify(Store.open(files.root)).problems == []
        shutil.rmtree(files.root)
    for racer in racers:
        racer.communicate()
    assert shared > 0  # some were close enough that each got a commit


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


NAMESPACE = ["unshare", "--map-root-user", "--mount"]
FULL_DISK = """
mount -t tmpfs -o size=400k none "$1"
echo | "$2" "$3" "$1/store" 0 4000
status=$?
"$2" -c '
import sys
from stillroom.storage.store.store import Store
from stillroom.storage.integrity.verify import verify
report = verify(Store.open(sys.argv[1]))
print("verified", report.tables["soft_targets"].rows, len(report.problems), len(report.notes))
' "$1/store"
exit $status
"""


@pytest.mark.skipif(
    not shutil.which("unshare")
    or subprocess.run([*NAMESPACE, "true"], capture_output=True).returncode != 0,
    reason="needs a mount namespace of its own",
)
def test_a_disk_that_really_is_full(tmp_path, samples):
    command = [
        *NAMESPACE,
        "sh",
        "-c",
        FULL_DISK,
        "sh",
        str(tmp_path),
        sys.executable,
        samples.__file__,
    ]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode != 0
    assert "the disk is full. Free space and run the same command again" in result.stderr
    verified, rows, problems, notes = result.stdout.splitlines()[-1].split()
    assert (verified, problems) == ("verified", "0")
    assert 0 < int(rows) < 4000
    assert int(notes) <= 1  # a shard whose record found no room
