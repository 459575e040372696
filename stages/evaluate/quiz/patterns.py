"""What a recipe's regular expression finds in a text, within a bound of time.

Some expressions never end where they backtrack.
"""

import re
from functools import lru_cache
from typing import NamedTuple

from ....storage.time_limit import time_limit

SECONDS = 1.0
"""Of CPU time, a text: ordinary expressions take microseconds."""


class LastMatch(NamedTuple):
    """What was found in a text."""

    text: str | None
    """Group 1 (without groups the whole) of the last match; None: there is none."""
    ended: bool = True
    """False: the search took too long, and nothing is known."""


@lru_cache(maxsize=1 << 16)  # every text is asked for again, to be counted and to be shown
def last_match(pattern: str, text: str) -> LastMatch:
    """The last match of an expression in a text."""
    compiled = re.compile(pattern)
    try:
        with time_limit(SECONDS):
            matches = list(compiled.finditer(text))
    except TimeoutError:
        return LastMatch(None, ended=False)
    found = matches[-1].group(min(1, compiled.groups)) or "" if matches else None
    return LastMatch(found)
