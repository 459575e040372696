"""Who keeps the others waiting is named by the strongest sign.

Nobody is named where nothing singles one out.
"""

from dataclasses import replace

import pytest

from stillroom.stages.workers.watch import Does, Sign, Suspicion, Watch, moved, suspects


def sign(beats: int = 9, meetings: int = 5, *, waits: bool = True) -> Sign:
    return Sign(process="process 1 on a", beats=beats, meetings=meetings, at="a.py:1", waits=waits)


def named(before: dict[int, Sign], now: dict[int, Sign]) -> list[int]:
    return list(suspects(before, now)[0])


def test_a_process_without_a_sign_of_life_comes_before_all_else() -> None:
    before = {0: sign(5), 1: sign(5), 2: sign(5)}
    assert named(before, {0: sign(9), 1: sign(5), 2: sign(9, meetings=4)}) == [1]


def test_one_that_has_not_come_as_far_comes_before_one_that_is_elsewhere() -> None:
    before = {0: sign(5), 1: sign(5), 2: sign(5)}
    assert named(before, {0: sign(), 1: sign(waits=False), 2: sign(meetings=4)}) == [2]
    assert named(before, {0: sign(), 1: sign(waits=False), 2: sign()}) == [1]


def test_nobody_is_named_where_all_are_alike() -> None:
    before = {0: sign(5), 1: sign(5)}
    assert named(before, {0: sign(), 1: sign()}) == []
    assert named(before, {0: sign(waits=False), 1: sign(waits=False)}) == []


def test_nobody_is_named_by_those_who_work_or_meet_while_others_wait_for_work() -> None:
    before = {0: sign(5), 1: sign(5), 2: sign(5)}
    now = {0: sign(), 1: replace(sign(waits=False), does="works"), 2: sign(meetings=4)}
    assert named(before, now) == []


@pytest.mark.parametrize("did", ["works", "waits"])
def test_a_process_without_a_sign_of_life_is_named_whatever_it_did_last(did: Does) -> None:
    before = {0: sign(5), 1: replace(sign(5), does=did), 2: sign(5)}
    assert named(before, before | {0: sign(), 2: sign()}) == [1]
    works = replace(sign(), does="works")
    assert named(before, {0: sign(), 1: before[1], 2: works}) == [1]


def test_nobody_is_suspected_once_the_rank_has_moved_on() -> None:
    watch = Watch(None, rank=0, count=2, seconds=0.02)
    found = Suspicion(ranks=(1,), text="rank 1 hangs")
    moves, _ = next(watch._pauses())
    assert watch._suspects(found, moves)
    assert watch.suspicion == found
    watch.come(further=True)
    assert not watch._suspects(found, moves)
    assert watch.suspicion is None


def test_who_is_waited_for_goes_on_while_it_lives_and_computes_or_waits_itself() -> None:
    last = replace(sign(5), does="works", computed=1.0)
    assert moved(last, replace(last, beats=6, computed=2.0), least=1.0)
    assert not moved(last, replace(last, beats=6, computed=1.9), least=1.0)
    assert moved(last, replace(last, beats=6, does="waits"), least=1.0)
    for silent in ("works", "waits"):
        assert not moved(last, replace(last, does=silent, computed=9.0), least=1.0)
