"""`report --teachers STORE`: the teachers of a store, drawn as the report of a run is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ....storage.credentials import shown
from ....storage.store.store import Store
from ...printing.numbers import count, decimals, percent, significant
from ...printing.text import inline
from .. import html, markdown
from ..blocks import Bullets, Page, Section, Table, Text
from ..report import write_page
from .teachers import pair_json, pairs_of, teachers_of

PAGE = Path("teachers.html")
"""Where the page is written, if nobody names a file."""


def show(place: str, out: Path | None) -> tuple[str, Path, dict[str, Any]]:
    """Markdown, the file that the page is in, and the same for programs.

    Raises:
        UsageError: there is no store, it holds no soft targets, or the page cannot be written.
    """
    store = Store.open(place)
    teachers = teachers_of(store)
    ids = list(dict.fromkeys(str(row["teacher_id"]) for row in teachers))
    pairs = [pair_json(pair) for pair in pairs_of(store, ids)]
    content = _page(str(place), teachers, pairs)
    target = out or PAGE
    write_page(target, html.page(content))
    found = {"page": str(target), "store": shown(str(place)), "teachers": teachers, "pairs": pairs}
    return markdown.page(content), target, found


def _page(
    place: str, teachers: Sequence[Mapping[str, Any]], pairs: Sequence[Mapping[str, Any]]
) -> Page:
    ids = list(dict.fromkeys(row["teacher_id"] for row in teachers))
    lead = f"{len(ids)} teacher{'s' * (len(ids) != 1)} in {inline(shown(place))}."
    return Page("Teachers of a store", [Text(lead)], [_rows(teachers), _distances(len(ids), pairs)])


def _rows(teachers: Sequence[Mapping[str, Any]]) -> Section:
    headers = ["teacher", "model", "targets", "rows", "tokens", "kept mass"]
    headers += ["entropy (nats/token)", "cross-entropy (nats/token)"]
    lines = [
        [
            inline(row["teacher_id"][:8]),
            _words(row),
            f"{row['kind']} {row['k']}",
            count(row["rows"]),
            count(row["tokens"]),
            percent(row["kept_mass"], 2),
            ("at least " if row["entropy_is_bound"] else "") + decimals(row["entropy"]),
            decimals(row["cross_entropy"]),
        ]
        for row in teachers
    ]
    return Section("What each has said", [Table(headers, lines, text_columns=3)])


def _words(row: Mapping[str, Any]) -> str:
    """What a store knows of a teacher, which is not its name."""
    said = [
        row["model"],
        row["dtype"],
        row["quantized"],
        "with an adapter" if row["adapter"] else "",
    ]
    return ", ".join(inline(word) for word in said if word) or "unknown"


def _distances(teachers: int, pairs: Sequence[Mapping[str, Any]]) -> Section:
    title = "How far apart they are on the same texts"
    if teachers < 2:
        return Section(title, [Text("KL needs two teachers, and this store has rows of one.")])
    if not pairs:
        why = "No text has been scored by two of them with anything but draws, which tell no KL."
        return Section(title, [Text(why)])
    headers = ["A", "B", "rows", "tokens", "KL(A‖B)", "KL(B‖A)", "rounding"]
    lines = [
        [
            *(inline(pair[side][:8]) for side in "ab"),
            count(pair["rows"]),
            count(pair["tokens"]),
            *(_nats(pair, name) for name in ("kl_a_b", "kl_b_a")),
            f"about {significant(pair['rounding'])}" if pair["rows"] else "-",
        ]
        for pair in pairs
    ]
    return Section(title, [Table(headers, lines, text_columns=2), Bullets(_notes(pairs))])


def _nats(pair: Mapping[str, Any], name: str) -> str:
    if pair[name] is None:
        return "infinite" if pair["rows"] else "-"
    return ("at least " if pair["kl_is_lower_bound"] else "") + significant(pair[name])


def _notes(pairs: Sequence[Mapping[str, Any]]) -> list[str]:
    """How to read the table."""
    notes = [
        "KL(A‖B) is the mean in nats per token, or per text or word that is classified, over "
        "the rows of both with the same tokens and spans; of each the row that tells most apart.",
        "rounding: about what the stored floats' mantissa adds to it. A KL that is no larger says "
        "nothing.",
    ]
    if any(pair["kl_is_lower_bound"] for pair in pairs):
        notes.append(
            "at least: a lower bound, where some rows are not full: ids that are entries of both "
            "are told apart, all others are one outcome."
        )
    if bounded := sum(pair["tokens_of_bounded_tails"] for pair in pairs):
        notes.append(
            f"Of {count(bounded)} tokens the tail is known within a bound alone (`tail_bound`), "
            "since an engine said the best entries: what is called a lower bound holds up to that."
        )
    notes += [
        f"{inline(pair['a'][:8])} and {inline(pair['b'][:8])}: "
        f"{count(pair['rows_of_other_classes'])} rows are not compared, since their classes are "
        "others."
        for pair in pairs
        if pair["rows_of_other_classes"]
    ]
    return notes
