"""Passes made ahead.

It is tested for the order, the bound, what is raised where, and what happens when they are asked
for again.
"""

import threading
from contextlib import contextmanager
from types import SimpleNamespace

import pytest

from stillroom.stages.loader.prefetch import AHEAD, AHEAD_BYTES, THREAD_NAME, Prefetch
from stillroom.stages.loader.samples import Cursor, Step
from stillroom.stages.workers.clock import Clock


def made_up(count, *, upto=None):
    """Steps 0 to `count`, which know their number only; those from `upto` on fail."""
    for number in range(count):
        if number == upto:
            raise OSError(f"step {number} is unreadable")
        yield Step(samples=[], after=Cursor(step=number))


def number(step):
    return step.after.step


def two_passes(step):
    return iter([(number(step), "first"), (number(step), "second")])


def threads():
    return [t for t in threading.enumerate() if t.name.startswith(THREAD_NAME)]


@pytest.mark.parametrize("passes", [0, 1, 5])
def test_steps_and_passes_come_in_order(passes):
    with Prefetch(made_up(7), lambda step: [(number(step), i) for i in range(passes)]) as feed:
        found = [(number(step), list(feed.passes())) for step in feed]
    assert found == [(n, [(n, i) for i in range(passes)]) for n in range(7)]
    assert not threads()


def test_passes_that_nobody_asked_for_are_passed_over():
    with Prefetch(made_up(5), two_passes) as feed:
        found = [list(feed.passes()) if number(step) == 3 else number(step) for step in feed]
    assert found == [0, 1, 2, [(3, "first"), (3, "second")], 4]


def test_no_more_is_made_than_a_few_things_ahead():
    """It holds however long the caller takes.

    What can be made is made, and the thread has nothing left to do.
    """
    made = []

    def make(step):
        for i in range(3):
            made.append((number(step), i))
            yield made[-1]

    with Prefetch(made_up(100), make) as feed:
        for _ in feed:
            for taken, _ in enumerate(feed.passes(), 1):
                feed._waiting[-1].result()
                assert len(made) <= taken + AHEAD
            break
        feed._waiting[-1].result()
    assert 3 <= len(made) <= 3 + AHEAD


@pytest.mark.parametrize(("share", "ahead"), [(1.5, 1), (0.4, 3), (0.0, AHEAD)])
def test_passes_that_wait_hold_a_bounded_number_of_bytes(share, ahead):
    """One is always made, however large; none while those that wait hold more than the bound."""
    made, ready = [], threading.Semaphore(0)

    def make(step):
        for _ in range(20):
            made.append(SimpleNamespace(nbytes=int(share * AHEAD_BYTES)))
            ready.release()
            yield made[-1]

    with Prefetch(made_up(1), make) as feed:
        next(iter(feed))
        passes = feed.passes()
        for taken in range(10):
            for _ in range(1 if taken else ahead):
                assert ready.acquire(timeout=10)  # so many are made
            assert len(made) <= taken + ahead  # and no more
            next(passes)
    assert not threads()  # none waits for room that nobody makes


def all_of(feed, into):
    for _ in feed:
        for batch in feed.passes():
            into.append(batch)


def test_what_a_step_raises_is_raised_in_its_place():
    found = []
    with (
        Prefetch(made_up(9, upto=3), two_passes) as feed,
        pytest.raises(OSError, match="step 3 is unreadable"),
    ):
        all_of(feed, found)
    assert found == [(n, which) for n in range(3) for which in ("first", "second")]
    assert not threads()


def test_what_could_not_be_read_is_raised_where_passes_were_made_again_meanwhile():
    """Else a training would end early, and say that it is done."""

    def twice(feed):
        for _ in feed:
            list(feed.passes())
            feed._waiting[-1].exception()  # what can be read ahead is read
            list(feed.passes())

    with (
        Prefetch(made_up(9, upto=2), two_passes) as feed,
        pytest.raises(OSError, match="step 2 is unreadable"),
    ):
        twice(feed)
    assert not threads()


def test_what_a_pass_raises_is_raised_in_its_place():
    def make(step):
        yield number(step)
        if number(step) == 2:
            raise ValueError("pass 2 does not fit")
        yield number(step)

    found = []
    with Prefetch(made_up(9), make) as feed, pytest.raises(ValueError, match="pass 2"):
        all_of(feed, found)
    assert found == [0, 0, 1, 1, 2]


@pytest.mark.parametrize("taken", [0, 1, 2])
def test_asked_for_again_they_are_made_again_and_so_is_what_follows(taken):
    """It is as when memory runs out in the second step and passes become smaller.

    Some were made ahead in the old size.
    """
    size = 10

    def make(step):
        return [(number(step), size)] * 2

    found = []
    with Prefetch(made_up(5), make) as feed:
        for step in feed:
            if number(step) == 1:
                passes = feed.passes()
                assert [next(passes) for _ in range(taken)] == [(1, 10)] * taken
                feed._waiting[-1].result()
                size = 5
                if not taken:
                    next(passes)
            found += feed.passes()
    assert found == [(n, 10 if n == 0 else 5) for n in range(5) for _ in range(2)]


def test_a_pass_that_failed_can_be_made_again():
    """Memory may run out while passes are copied ahead, too."""
    broken = True

    def make(step):
        if broken and number(step) == 2:
            raise MemoryError("no room")
        return [number(step)]

    found = []
    with Prefetch(made_up(6), make) as feed:
        for _ in feed:
            try:
                found += feed.passes()
            except MemoryError:
                broken = False
                found += feed.passes()
    assert found == list(range(6))


def test_leaving_early_ends_the_thread_and_reads_no_further():
    read = []

    def steps():
        for step in made_up(1000):
            read.append(number(step))
            yield step

    with Prefetch(steps(), two_passes) as feed:
        next(iter(feed))
    assert len(read) <= 1 + AHEAD
    assert not threads()


def test_waiting_is_charged_to_the_disk_and_nothing_else_is():
    inside, spans = [False], []

    class Recording(Clock):
        @contextmanager
        def span(self, name):
            spans.append(name)
            inside[0] = True
            yield
            inside[0] = False

    with Prefetch(made_up(2), two_passes, clock=Recording()) as feed:
        for _ in feed:
            assert not inside[0]
            for _ in feed.passes():
                assert not inside[0]
    assert spans == ["disk"] * (
        2 * 4 + 1
    )  # of each step itself, two passes and its end; and of the end of all
    assert feed.waited_seconds > 0
