"""The clock charges each moment to the innermost span, and to nothing twice."""

import random
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from stillroom.stages.workers import clock as module
from stillroom.stages.workers.clock import NAMES, Clock


class Hands:
    """A time that passes when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def hands(monkeypatch: pytest.MonkeyPatch) -> Hands:
    found = Hands()
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=found.monotonic))
    return found


def test_an_inner_span_is_taken_off_the_outer_one(hands: Hands) -> None:
    clock = Clock(began=97.0)
    with clock.span("model"):
        hands.now += 1
        with clock.span("disk"):
            hands.now += 2
            with clock.span("disk"):
                hands.now += 4
        hands.now += 8
    hands.now += 16
    assert clock.seconds() == {"start": 3, "model": 9, "tokenizer": 0, "disk": 6, "other": 16}


@pytest.mark.parametrize("seed", range(5))
def test_all_names_together_are_the_wall_time(hands: Hands, seed: int) -> None:
    """Spans nested at random, some left by an exception."""
    draw, clock, began = random.Random(seed), Clock(), hands.now

    def work(depth: int) -> None:
        hands.now += draw.randrange(100) / 8
        for _ in range(draw.randrange(4) if depth < 5 else 0):
            try:
                with clock.span(draw.choice(NAMES)):
                    work(depth + 1)
            except ZeroDivisionError:
                continue
        if draw.random() < 0.2 and depth:
            raise ZeroDivisionError

    for _ in range(20):
        work(0)
    assert sum(clock.seconds().values()) == pytest.approx(hands.now - began, abs=0.01)
    with clock.span("model"):  # and the clock stands where it began
        pass
    before = clock.seconds()
    hands.now += 1
    assert clock.seconds() == before | {"other": before["other"] + 1}


def test_an_open_span_counts_up_to_now(hands: Hands) -> None:
    clock = Clock()
    with clock.span("start"):
        hands.now += 5
        assert clock.seconds()["start"] == 5


def test_what_a_generator_makes_is_charged_and_what_is_done_with_it_is_not(hands: Hands) -> None:
    clock = Clock()

    def slow() -> Iterator[int]:
        for number in range(3):
            hands.now += 10
            yield number
        hands.now += 1

    for number in clock.each("tokenizer", slow()):
        hands.now += number
    assert clock.seconds() == {"start": 0, "model": 0, "tokenizer": 31, "disk": 0, "other": 3}


def test_work_beside_the_main_thread_costs_no_wall_time(hands: Hands) -> None:
    clock = Clock()

    def beside() -> None:
        with clock.span("disk"):
            hands.now += 7

    with clock.span("model"):
        thread = threading.Thread(target=beside)
        thread.start()
        thread.join()
    assert clock.seconds()["model"] == 7
    assert clock.seconds()["disk"] == 0


def test_a_name_that_nobody_reads_is_refused() -> None:
    with pytest.raises(KeyError):
        Clock().span("modle")  # type: ignore[arg-type]
