"""Numbers for people: one way to print each kind."""

from collections.abc import Sequence

NOTHING = "-"


def decimals(value: float | None, places: int = 4, *, error: float | None = None) -> str:
    """A number with its standard error, where there is one."""
    if value is None:
        return NOTHING
    text = f"{round(value, places) + 0.0:.{places}f}"
    return text if error is None else f"{text} ± {error:.{places}f}"


def percent(value: float | None, places: int = 1, *, error: float | None = None) -> str:
    """A share as a percentage, with its standard error where there is one."""
    return (
        NOTHING
        if value is None
        else f"{decimals(100 * value, places, error=error and 100 * error)} %"
    )


def significant(value: float | None, *, error: float | None = None) -> str:
    """A number as text: four significant digits, or all digits of a larger one.

    Its standard error stands beside it, where there is one.
    """
    if value is None:
        return NOTHING
    text = f"{value:,.0f}" if abs(value) >= 999.95 else f"{value:#.4g}"
    return text if error is None else f"{text} ± {f'{error:#.2g}'.removesuffix('.')}"


def nats(value: float) -> str:
    """A distance in a sentence: three decimals, or two digits of a smaller one."""
    return f"{value:.3f}" if abs(value) >= 0.01 or value == 0 else f"{value:.2g}"


def count(value: float | None) -> str:
    """A whole number with separators."""
    return NOTHING if value is None else f"{value:,.0f}"


def duration(seconds: float | None, *, places: int = 0) -> str:
    """200 as 3m 20s; `places`: decimals of what is shorter than a minute."""
    if seconds is None:
        return NOTHING
    if seconds < 60 - 0.5 / 10**places:  # 59.96 with one decimal is 1m 00s, not 60.0s
        return f"{seconds:.{places}f}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {rest:02d}s"


def size(octets: float | None) -> str:
    """Bytes in the unit that fits."""
    if octets is None:
        return NOTHING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if octets < (1024 if unit == "B" else 1023.95):
            return f"{octets:.0f} {unit}" if unit == "B" else f"{octets:.1f} {unit}"
        octets /= 1024
    return f"{octets:.1f} TiB"


def human(count: float, *, digits: int = 1) -> str:
    """12345 as 12.3k."""
    for unit in ("", "k", "M", "G"):
        if (
            abs(count) < 1000 - 0.5 / 10 ** (digits if unit else 0) or unit == "G"
        ):  # 999.96k is printed as 1.0M
            return f"{count:.{digits}f}{unit}" if unit else f"{count:.0f}"
        count /= 1000
    raise AssertionError


def short(count: int) -> str:
    """A count in five characters: as it is up to 99,999, then 123k."""
    text = str(count) if count < 100_000 else human(count)
    return text if len(text) <= 5 else human(count, digits=0)


def teacher_layers(layers: Sequence[int]) -> str:
    """What a student starts from that copies these."""
    return f"layer{'s' * (len(layers) > 1)} {', '.join(map(str, layers))} of the teacher"
