"""Numbers with their noun, and sizes in one way, wherever people read them."""

import re
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

import stillroom
from stillroom.pipeline.printing.numbers import size
from stillroom.storage.words import all_were, counted, some_are

ROOT = Path(str(stillroom.__file__)).parent
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


@given(st.integers(0, 10**9), st.integers(0, 10**9))
def test_one_is_a_singular_and_nothing_else_is(number: int, some: int) -> None:
    assert counted(number, "row").endswith(" row") == (number == 1)
    assert counted(number, "entry", "entries").split()[1] == ("entry" if number == 1 else "entries")
    assert int(counted(number, "row").split()[0].replace(",", "")) == number
    assert all_were(number, "row").startswith("all ") == (number != 1)
    assert some_are(some, number, "row").endswith(" is") == (some == 1)


@given(st.integers(0, 2**60))
def test_a_size_is_near_and_below_a_thousand_of_its_unit(octets: int) -> None:
    number, unit = size(octets).split()
    power = 1024 ** UNITS.index(unit)
    assert abs(float(number) * power - octets) <= 0.06 * power
    assert float(number) < 1024 or unit == UNITS[-1]


def test_nothing_prints_sizes_or_a_plural_by_itself() -> None:
    """No unit of bytes behind a number but in `size`; no choice between one and many by hand."""
    by_hand = re.compile(r"""\}\s?[kKMGT]?i?B\b|"1 \w+" if""")
    found = [
        f"{path.relative_to(ROOT)}: {line.strip()}"
        for floor in ("pipeline", "stages", "storage")
        for path in (ROOT / floor).rglob("*.py")
        for line in path.read_text().splitlines()
        if by_hand.search(line) and path.name != "numbers.py"
    ]
    assert found == []
