"""Numbers with their noun, as all floors say them to people."""


def counted(number: int, one: str, many: str | None = None) -> str:
    """`1 row`, `12,345 rows`; `many` where an s does not make it."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"
