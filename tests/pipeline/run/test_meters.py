"""What several workers have done is shown as one sum, each unit once."""

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from stillroom.pipeline.run.progress import Counting, Meter, together


class Silent(Counting):
    """Counts, and shows nothing."""

    def _changed(self, *, now: bool = False) -> None:
        pass


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5))
def test_units_of_others_are_not_counted_twice(parts: list[tuple[int, int]]) -> None:
    """Each of them sees a part of what the others did."""
    workers = [Silent("generate") for _ in parts]
    for worker in workers:
        worker.start(total=1000, unit="rows", done=100)
    made = sum(own for own, _ in parts)
    for worker, (own, seen) in zip(workers, parts, strict=True):
        for _ in range(own):
            worker.advance(tokens=3)
        worker.others(min(seen, made - own))
        worker.wrote(rejects=1, size=10)
    found = together([worker.meter for worker in workers])
    assert (found.done, found.total, found.first) == (100 + made, 1000, 100)
    assert (found.tokens, found.rejects, found.written) == (3 * made, len(parts), 10 * len(parts))
    assert found.workers == len(parts)


def test_one_that_was_started_later_counts_from_what_is_there() -> None:
    first = Meter(total=100, first=0, done=40, others=0, tokens=80, seconds=9.0)
    later = Meter(total=100, first=70, done=75, others=0, tokens=10, seconds=1.0)
    found = together([first, later])
    assert (found.done, found.seconds) == (75, 9.0)
    full = together([replace(first, done=100), replace(later, done=100)])
    assert full.done == full.total == 100


def test_while_others_load_one_is_shown_as_it_is() -> None:
    loaded = Meter(total=100, first=10, done=20, tokens=5, seconds=2.0, note="a note")
    found = together([Meter(), loaded, Meter()])
    assert found == replace(loaded, workers=3)
    assert "3 workers" in found.line()
    assert not together([Meter(), Meter()]).counts
    assert together([loaded]) == loaded
