"""Journals: which rows a death puts under suspicion.

It is tested what it takes until a row is held to be what kills.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

from stillroom.stages.workers.journal import (
    Journal,
    find_suspects,
    mark_seen,
    new_journal,
    read_journal,
)
from stillroom.stages.workers.locks import only_one, worker_number
from stillroom.storage.errors import EngineDied, Stopped

A, B, C = (bytes([n]) * 16 for n in range(3))


def death(run_dir: Path, *keys: bytes, alone: bool = False, seen: bool = True) -> Path:
    """What a process leaves behind that dies with these rows in flight."""
    path = new_journal(run_dir, "generate")
    with suppress(EngineDied), Journal(path) as journal:
        journal.take([*keys, C], alone=alone)
        journal.done([C])
        raise EngineDied
    if seen:
        mark_seen(path)
    return path


def test_a_journal_says_what_is_in_flight(tmp_path: Path) -> None:
    path = new_journal(tmp_path, "score")
    with Journal(path) as journal:
        journal.take([A, B])
        assert (read_journal(path).rows, read_journal(path).alone) == ({A, B}, False)
        journal.done([A, B])
        assert (read_journal(path).rows, read_journal(path).came_back) == (set(), 2)
        journal.take([C], alone=True)
        assert (read_journal(path).rows, read_journal(path).alone) == ({C}, True)
    assert not path.exists()


@pytest.mark.parametrize("error", [Stopped, ValueError])
def test_only_the_death_of_an_engine_leaves_a_journal(
    tmp_path: Path, error: type[Exception]
) -> None:
    path = new_journal(tmp_path, "generate")
    with suppress(error), Journal(path) as journal:
        journal.take([A])
        raise error
    assert not path.exists()
    assert death(tmp_path, A).exists()


def test_a_row_is_alone_after_a_death_and_rejected_after_a_second_one_alone(tmp_path: Path) -> None:
    death(tmp_path, A, B)
    suspects = find_suspects(tmp_path, "generate")
    assert (suspects.alone, suspects.killers) == ({A, B}, set())
    death(tmp_path, A, alone=True)
    suspects = find_suspects(tmp_path, "generate")
    assert suspects.killers == {A}
    assert (suspects.deaths[A], suspects.deaths[B]) == (2, 1)
    assert not find_suspects(tmp_path, "score").alone
    suspects.forget()
    assert not find_suspects(tmp_path, "generate").alone


def test_deaths_that_took_the_runner_along_weigh_half(tmp_path: Path) -> None:
    """A kill -9 of everything, by whoever, changes nothing.

    The second with the same row is a reason to be careful.
    """
    death(tmp_path, A, B, seen=False)
    assert not find_suspects(tmp_path, "generate").alone
    death(tmp_path, A, seen=False)
    assert find_suspects(tmp_path, "generate").alone == {A}
    death(tmp_path, A, alone=True, seen=False)
    assert not find_suspects(tmp_path, "generate").killers
    death(tmp_path, A, alone=True, seen=False)
    assert find_suspects(tmp_path, "generate").killers == {A}


def test_rows_of_a_living_process_are_no_suspects(tmp_path: Path) -> None:
    code = """
        import sys
        from pathlib import Path
        from stillroom.stages.workers.journal import Journal
        with Journal(Path(sys.argv[1])) as journal:
            journal.take([bytes(16)])
            print("in flight", flush=True)
            sys.stdin.read()
    """
    for _ in range(2):
        path = new_journal(tmp_path, "generate")
        words = [sys.executable, "-c", "\n".join(line[8:] for line in code.splitlines()), str(path)]
        process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        before = find_suspects(tmp_path, "generate")
        process.kill()
        process.communicate()
        after = find_suspects(tmp_path, "generate")
        assert after.deaths.total() == before.deaths.total() + 1
    assert after.alone == {bytes(16)}


def test_workers_of_a_folder_have_numbers_of_their_own(tmp_path: Path) -> None:
    with worker_number(tmp_path) as first:
        with worker_number(tmp_path) as second:
            assert (first, second) == (1, 2)
        with worker_number(tmp_path) as third:
            assert third == 2
    with worker_number(tmp_path) as again:
        assert again == 1


def test_the_second_waits_for_the_first_and_can_be_stopped(tmp_path: Path) -> None:
    said: list[str] = []

    def look() -> None:
        raise Stopped

    path = tmp_path / "lock"
    with only_one(path, waiting=said.append, look=look):
        assert not said
        with pytest.raises(Stopped), only_one(path, waiting=said.append, look=look):
            raise AssertionError("two inside")
    assert f"process {os.getpid()} on " in said[0]
    with only_one(path, waiting=said.append, look=look):
        assert len(said) == 1


def test_lines_torn_by_a_power_cut_say_nothing(tmp_path: Path) -> None:
    path = death(tmp_path, A)
    with path.open("ab") as file:
        file.write(b"+" + B.hex().encode()[:7] + b"\n\xff\x00\n*\n")
    assert read_journal(path).rows == {A}
    assert find_suspects(tmp_path, "generate").alone == {A}
