"""Normal forms of answers: as a number, and as words alone.

Two answers are the same where their forms are.
"""

import re
import string
import unicodedata
from collections.abc import Callable
from fractions import Fraction
from typing import Any

_MOST_DIGITS = 1000
_SIGNS = {"": 1, "+": 1, "-": -1, "\N{MINUS SIGN}": -1}
_SIGN = "[+\N{MINUS SIGN}-]?"
_NUMBER = re.compile(
    rf"(?P<outer>{_SIGN})(?:[$€£¥]\s?)?(?P<inner>{_SIGN})"
    r"(?:(?P<whole>\d{1,3}(?:,\d{3})+|\d+)(?P<part>\.\d*)?|(?P<below>\.\d+))"
    r"(?:[eE](?P<power>[+-]?\d{1,3})|/(?P<under>\d+))?(?:\s?[%€£]\.?)?"
)
_ARTICLES = re.compile(r"\b(?:a|an|the)\b")


def number(text: str) -> Fraction | None:
    """The number that a text is, exactly; None: it is none, or it is more than a number.

    1,000 and $1000 and 1000.0 and 1e3 are one number, 42. and 42 % are 42, 1/2 is 0.5. A comma
    stands before three digits, a point before decimals. Signs of currencies and of per cent say
    nothing.
    """
    found = _NUMBER.fullmatch(text.strip())
    if found is None or (found["outer"] and found["inner"]):
        return None
    whole = (found["whole"] or "0").replace(",", "")
    decimals, under = (found["part"] or found["below"] or ".")[1:], found["under"] or "1"
    if len(whole + decimals + under) > _MOST_DIGITS or int(under) == 0:
        return None
    sign = _SIGNS[found["outer"] or found["inner"]]
    power = int(found["power"] or 0) - len(decimals)
    return sign * int(whole + decimals) * Fraction(10) ** power / int(under)


def words(text: str) -> str:
    """SQuAD's: lower case, without punctuation and English articles, one space between words.

    Rajpurkar et al. 2016, arXiv 1606.05250, section 6.1; punctuation of other scripts goes as well.
    What would leave nothing of a text is not done: the answer A is no article.
    """
    bare = "".join(c for c in text.lower() if not _is_punctuation(c)) or text.lower()
    return plain(_ARTICLES.sub(" ", bare)) or plain(bare)


def plain(text: str) -> str:
    """White space is not part of an answer."""
    return " ".join(text.split())


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


NORMAL_FORMS: dict[str, Callable[[str], Any]] = {"none": plain, "text": words, "number": number}
"""By their names in `evaluate.generate.normalize`; None: the text has no such form."""
