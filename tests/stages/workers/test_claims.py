"""Claims: workers spread over the blocks, and come back to each other's last.

They never rest on what a claim says.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from stillroom.stages.workers import claims as claims_module
from stillroom.stages.workers.claims import Claims, in_turn
from stillroom.storage.files.base import Files
from stillroom.storage.files.local import LocalFiles

ROWS = 10  # to a block


class Table:
    """What the workers of a test committed, and how often each row was made."""

    def __init__(self, blocks: int) -> None:
        self.blocks = range(blocks)
        self.done: set[tuple[int, int]] = set()
        self.made: Counter[tuple[int, int]] = Counter()

    @property
    def rows(self) -> int:
        return len(self.blocks) * ROWS

    def worker(self, files: Files, backups: list[int] | None = None) -> Iterator[tuple[int, int]]:
        """One row after the other, committed as soon as the next is asked for.

        Rows that others made are left out.
        """

        def left(block: int) -> list[tuple[int, int]]:
            return [(block, row) for row in range(ROWS) if (block, row) not in self.done]

        def look(backup: bool) -> int:
            if backup and backups is not None:
                backups.append(len(self.done))
            return len(self.done)

        claims = Claims(files, "generate", data="d")
        first = True
        while first or claims.wait is not None:
            first = False
            for had, rows in claims.blocks(self.blocks, look=look, left=left):
                for row in in_turn(had, rows):
                    if row not in self.done:
                        self.made[row] += 1
                        yield row
                        self.done.add(row)


def alternate(
    workers: list[Iterator[tuple[int, int]]], choose: Callable[[int], int]
) -> Counter[int]:
    """Give one worker after the other a step until all have ended; rows made by each."""
    shares: Counter[int] = Counter()
    running = dict(enumerate(workers))
    while running:
        number = sorted(running)[choose(len(running))]
        try:
            next(running[number])
            shares[number] += 1
        except StopIteration:
            del running[number]
    return shares


@pytest.mark.parametrize("workers", [1, 2, 3, 5])
@pytest.mark.parametrize("seed", range(4))
def test_workers_share_evenly_and_make_little_twice(
    tmp_path: Path, workers: int, seed: int
) -> None:
    table, made = Table(24), random.Random(seed)
    shares = alternate([table.worker(LocalFiles(tmp_path)) for _ in range(workers)], made.randrange)
    assert table.done == set(table.made)
    assert len(table.done) == table.rows
    assert min(shares.values()) > 0.7 * table.rows / workers
    assert table.made.total() - table.rows <= ROWS * (
        workers - 1
    )  # only where they meet, at the very end


def test_blocks_of_a_worker_that_vanished_are_taken_last_and_at_once(tmp_path: Path) -> None:
    table, backups = Table(8), list[int]()
    vanished = table.worker(LocalFiles(tmp_path))
    for _ in range(ROWS + 4):  # in its second block, one row not committed
        next(vanished)
    vanished.close()
    assert len(list(table.worker(LocalFiles(tmp_path), backups))) == table.rows - ROWS - 3
    assert len(table.done) == table.rows
    assert table.made.total() == table.rows + 1
    assert backups[0] == table.rows - (ROWS - 3)  # first everything that nobody had claimed


def test_a_lost_race_for_a_claim_is_another_choice(tmp_path: Path) -> None:
    class Late(LocalFiles):
        """Another worker puts the same claim a moment before."""

        lost = 0

        def put_if_absent(self, name: str, data: bytes) -> bool:
            if self.lost < 3:
                self.lost += 1
                LocalFiles(self.root).put_if_absent(name, b"{}")
            return super().put_if_absent(name, data)

    table = Table(6)
    assert len(list(table.worker(Late(tmp_path)))) == table.rows
    names = [path.name for path in tmp_path.glob("claims/generate/*/*")]
    assert len(names) == 6 + 3
    assert sum(name.endswith(".1.json") for name in names) == 3


def test_another_recipe_is_other_work(tmp_path: Path) -> None:
    made = []
    for settings in ({"temperature": 1.0}, {"temperature": 0.5}):
        claims = Claims(LocalFiles(tmp_path), "generate", data="d", settings=settings)
        said: list[bool] = []

        def look(claimed: bool, said: list[bool] = said) -> int:
            said.append(claimed)
            return 0

        made.append(
            {block for _, (block,) in claims.blocks([0, 1], look=look, left=lambda block: [block])}
        )
        assert said == [False, False]
    assert made == [{0, 1}, {0, 1}]


def test_nothing_to_do_is_nothing_to_claim(tmp_path: Path) -> None:
    assert not list(
        Claims(LocalFiles(tmp_path), "score").blocks([], look=lambda _: 0, left=lambda _: [1])
    )
    assert not list(
        Claims(LocalFiles(tmp_path), "score").blocks([3, 4], look=lambda _: 0, left=lambda _: [])
    )
    assert not list(tmp_path.iterdir())


def test_a_claim_that_is_gone_leaves_no_hole_to_fall_into(tmp_path: Path) -> None:
    files, table = LocalFiles(tmp_path), Table(2)
    list(table.worker(files))
    table.done.clear()
    for first in tmp_path.glob("claims/**/*.0.json"):
        first.rename(first.with_name(first.name.replace(".0.", ".3.")))
    assert len(list(table.worker(files))) == table.rows
    assert {path.name for path in tmp_path.glob("claims/**/*.4.json")} == {
        "00000000.4.json",
        "00000001.4.json",
    }


def test_two_share_a_block_from_both_ends_and_more_leave_them_alone_for_a_while(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(claims_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    done: set[int] = set()
    workers = [Claims(LocalFiles(tmp_path), "generate", data="d") for _ in range(3)]

    def take(worker: Claims, blocks: list[int]) -> Iterator[tuple[int, list[int]]]:
        return worker.blocks(
            blocks, look=lambda _: 1, left=lambda _: [r for r in range(ROWS) if r not in done]
        )

    first, second = take(workers[0], [0]), take(workers[1], [0])
    assert [in_turn(*next(one)) for one in (first, second)] == [
        [*range(ROWS)],
        [*range(ROWS)][::-1],
    ]
    third = take(workers[2], [1, 0])  # it knows how long it takes for a block
    assert next(third)[0] == 0
    now[0] = 100.0
    assert list(third) == []
    assert 50 <= workers[2].wait <= 150
    now[0] += 40.0
    assert list(take(workers[2], [])) == []
    now[0] += 120.0  # they may be dead
    (claimed,) = take(workers[2], [])
    assert (claimed[0], sorted(in_turn(*claimed))) == (2, [*range(ROWS)])
    assert workers[2].wait is None


def test_whoever_waits_ends_when_the_others_are_done(tmp_path: Path) -> None:
    done: set[int] = set()
    workers = [Claims(LocalFiles(tmp_path), "generate", data="d") for _ in range(3)]
    left = lambda block: [] if block in done else [block]  # noqa: E731
    mine = [w.blocks([0], look=lambda _: 1, left=left) for w in workers]
    next(mine[0]), next(mine[1])
    workers[2]._block_seconds = 1e9
    assert list(mine[2]) == []
    assert workers[2].wait is not None
    done.add(0)
    assert list(workers[2].blocks([], look=lambda _: 1, left=left)) == []
    assert workers[2].wait is None


@pytest.mark.parametrize("done", [set(), {0}, {1000}, {0, 1000}])
@pytest.mark.parametrize("claims", [(2, 3), (3, 2), (2, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_what_others_finish_meanwhile_leaves_blocks_whose_names_begin_otherwise(
    tmp_path: Path, claims: tuple[int, int], done: set[int], seed: int
) -> None:
    """The last block of those with the fewest claims is done when its turn comes."""
    files, blocks = LocalFiles(tmp_path), [0, 1000]
    left = lambda block: [] if block in done else [block]  # noqa: E731
    for number in range(max(claims)):
        other = Claims(files, "generate", data="d")
        for block, count in zip(blocks, claims, strict=True):
            assert number >= count or other._claim(block, number)
    worker = Claims(files, "generate", data="d")
    worker._random.seed(seed)  # which of the two it looks at first
    taken, first = set[int](), True
    while first or worker.wait is not None:
        found = worker.blocks(blocks, look=lambda _: 1, left=left)
        taken, first = taken | {block for _, rows in found for block in rows}, False
    assert taken == set(blocks) - done


def test_nobody_waits_for_workers_that_commit_nothing(tmp_path: Path) -> None:
    """Two runs before were killed, each after it had claimed all."""

    def all_of_it() -> tuple[Claims, list[int]]:
        claims = Claims(LocalFiles(tmp_path), "generate", data="d")
        taken = claims.blocks(range(6), look=lambda _: 0, left=lambda block: [block])
        found = []
        for had, _ in taken:
            claims._block_seconds = 1e9
            found.append(had)
        return claims, found

    for run in range(4):
        claims, had = all_of_it()
        assert had == [run] * 6
        assert claims.wait is None


def test_of_many_blocks_the_books_say_what_is_left(tmp_path: Path) -> None:
    """Else each worker asks for each row of all others in the end."""
    other = Claims(LocalFiles(tmp_path), "generate", data="d")
    asked: list[int] = []
    (tmp_path / other._folder).mkdir(parents=True)
    for block in range(2500):
        (tmp_path / other._folder / f"{block:08d}.0.json").touch()

    def left(block: int) -> list[int]:
        asked.append(block)
        return [block]

    mine = Claims(LocalFiles(tmp_path), "generate", data="d")
    found = mine.blocks(
        range(2500), look=lambda _: 0, left=left, again=lambda blocks: blocks & {7, 1900, 9999}
    )
    assert sorted(had for had, _ in found) == [1, 1]
    assert sorted(asked) == [7, 1900]


def test_blocks_are_looked_for_where_their_names_begin_alike(tmp_path: Path) -> None:
    class Noted(LocalFiles):
        looked: list[str] = []  # noqa: RUF012

        def names(self, folder: str, prefix: str = "") -> list[str]:
            self.looked.append(prefix)
            return super().names(folder, prefix)

    mine = Claims(Noted(tmp_path), "generate", data="d")
    blocks = mine.blocks(range(5000), look=lambda _: 0, left=lambda block: [block])
    taken = [requests[0] for _, requests in (next(blocks) for _ in range(30))]
    assert len(set(taken)) == 30
    assert {block // 1000 for block in taken} == {int(prefix) for prefix in Noted.looked}
    assert len(set(Noted.looked)) == 1
