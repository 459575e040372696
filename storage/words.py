"""Numbers with their noun, as all floors say them to people."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 row`, `12,345 rows`; `many` where an s does not make it."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def all_were(number: int, one: str) -> str:
    """`all 12 rows were`, `the only row was`: what is then said of each of them."""
    return f"the only {one} was" if number == 1 else f"all {counted(number, one)} were"


def some_are(some: int, of: int, one: str, many: str | None = None) -> str:
    """`1 of 6 rows is`, `2 of 6 rows are`."""
    return f"{some:,} of {counted(of, one, many)} {'is' if some == 1 else 'are'}"
