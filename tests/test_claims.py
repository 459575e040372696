"""Each measured number of README.md and of `figures.md` stands in a record.

Its own section names that record.

A measured number is, outside of code, links, dates and commits,
    in a table      every number;
    in a sentence   one with a unit (%, nats, degrees, bytes, times, s ...), with ±, with decimals
                    or with an exponent.
The records of a section are the pages it links to, those of the benches it names and the test files
it names. One of them must hold the number, rounded to as many digits; `mean ± half` must stand
there as a pair. A section that names no record may have no measured number. A fenced block, and the
paragraph that leads into it, is a sample of output, not a claim. Levels (95 % intervals) and
versions of Python are no measurements. Not seen: numbers in words, counts without a unit, and a
right number in a wrong sentence. `tests/bench/results/README.md` is held to the same, row by row.
"""

import re
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "tests" / "bench" / "results"
RECORDS = sorted(RESULTS.glob("*-20*.md"))
PAGES = [ROOT / "README.md", RESULTS / "figures.md"]
CLAIMS = (RESULTS / "README.md").read_text("utf-8")

NUMBER = r"(?<![\w.,-])-?\d[\d,]*(?:\.\d+)?(?:e-?\d+)?(?![\w-])"
UNIT = r"(?:%|(?:nats|degrees|points|bytes|times|ms|s|min|MiB|GiB|GB|tokens/s|rows/s)\b)"
PAIR = rf"({NUMBER})\s*±\s*({NUMBER})"
NOT_MEASURED = (
    r"^\S[^\n]*(?:\n\S[^\n]*)*:\n+```.*?^```",  # a sample of output, with what leads into it
    r"^```.*?^```",
    r"^ {4}.*?$",  # commands
    r"`[^`]*`",
    r"\]\([^)]*\)",
    r"\d{4}-\d\d-\d\d",
    r"\b(?=\d*[a-f])(?=[a-f]*\d)[0-9a-f]{7}\b",  # a commit
    r"95 % intervals?",
    r"Python [\d.]+(?: or [\d.]+)?",
)


def plain(text: str) -> str:
    """A text without what is never a measured number."""
    for pattern in NOT_MEASURED:
        text = re.sub(pattern, " ", text, flags=re.MULTILINE | re.DOTALL)
    return text


def value(number: str) -> Decimal:
    return Decimal(number.replace(",", ""))


def measured(text: str) -> list[str]:
    """The measured numbers of a text: all of its tables, some of its sentences."""
    lines = plain(text).splitlines()
    tables = "\n".join(line for line in lines if line.startswith("|"))
    sentences = "\n".join(line for line in lines if not line.startswith("|"))
    found = [
        match[0]
        for match in re.finditer(NUMBER, sentences)
        if re.search(r"[.e]", match[0]) or re.match(rf"\s*(?:{UNIT}|±)", sentences[match.end() :])
    ]
    return re.findall(NUMBER, tables) + found


def rounds_to(found: Decimal, stated: Decimal) -> bool:
    """Whether a number of a record, rounded to the digits of the stated one, is the stated one."""
    half = Decimal(1).scaleb(int(stated.as_tuple().exponent)) / 2
    return abs(found - stated) <= half


def missing(text: str, records: list[Path]) -> list[str]:
    """What a text states as measured and none of the records holds."""
    held = " ".join(record.read_text("utf-8") for record in records)
    held = re.sub(r"\d{4}-\d\d-\d\d", " ", held)
    values = [value(number) for number in re.findall(NUMBER, held)]
    pairs = [(value(mean), value(half)) for mean, half in re.findall(PAIR, held)]
    stated = measured(text)
    lacks = [n for n in stated if not any(rounds_to(found, value(n)) for found in values)]
    for mean, half in re.findall(PAIR, plain(text)):
        if not any(rounds_to(m, value(mean)) and rounds_to(h, value(half)) for m, h in pairs):
            lacks.append(f"{mean} ± {half}")
    return lacks


def records_of(text: str) -> list[Path]:
    """The records of a text.

    They are those it links to, those of the benches that it names, and the test files that it
    names.
    """
    linked = re.findall(r"([\w-]+-20[\d-]+\w+\.md)", text)
    benches = [name.replace("_", "-") for name in re.findall(r"bench/(\w+)\.py", text)]
    tests = [ROOT / name for name in re.findall(r"pytest (tests/[\w/]+\.py)", text)]
    named = [r for r in RECORDS if r.name in linked or re.split(r"-20\d\d-", r.name)[0] in benches]
    return named + tests


def sections() -> dict[str, str]:
    """Each page by heading."""
    parts = {}
    for page in PAGES:
        first, *others = re.split(r"^## ", page.read_text("utf-8"), flags=re.MULTILINE)
        parts[page.name] = first
        parts |= {f"{page.name}: {part.partition(chr(10))[0]}": part for part in others}
    return parts


def rows() -> list[str]:
    """The rows of the list of claims.

    Those without a record have three cells, and state no number.
    """
    lines = [line for line in CLAIMS.splitlines() if line.startswith("| ")]
    return [line for line in lines if line.count("|") == 6 and not line.startswith("| claim |")]


@pytest.mark.parametrize("heading", sections())
def test_a_section_states_what_its_records_hold(heading: str) -> None:
    section = sections()[heading]
    assert not missing(section, records_of(section)), "in no record that this section names"


@pytest.mark.parametrize("row", rows(), ids=lambda row: row.split("|")[1].strip()[:60])
def test_a_claim_of_the_list_states_what_its_record_holds(row: str) -> None:
    _, claim, against, *_ = row.split("|")
    stated = f"|{claim}|{against}|"
    assert not missing(stated, records_of(row)), "in no record that this row names"


@pytest.mark.parametrize("record", RECORDS, ids=lambda record: record.stem)
def test_every_record_backs_a_claim_of_the_list(record: Path) -> None:
    assert f"]({record.name})" in CLAIMS


@pytest.mark.parametrize(
    "planted",
    [
        "It is 98.76 % better.",
        "It takes 987 s.",
        "It takes 4.321 of it.",
        "Off by 3e-9.",
        "| 98765 |",
    ],
)
@pytest.mark.parametrize("heading", sections())
def test_a_planted_number_is_found_in_every_section(heading: str, planted: str) -> None:
    section = sections()[heading]
    assert missing(f"{section}\n\n{planted}\n", records_of(section))


def test_a_mean_with_the_spread_of_another_is_found() -> None:
    records = [record for record in RECORDS if record.name.startswith("targets-20")]
    assert not missing("98.2 ± 0.8 % and 54 ± 10 %", records)
    assert missing("98.2 ± 10.2 %", records) == ["98.2 ± 10.2"]


def test_a_number_with_no_record_beside_it_is_found() -> None:
    assert missing("It is 2 times as fast.", records_of("It is 2 times as fast.")) == ["2"]
