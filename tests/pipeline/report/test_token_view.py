"""Rows token by token in a terminal and in a pipe.

They have the numbers of the JSON, within the columns that there are.
"""

import io
import json
import os
import pty
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import reports
from kit import ENVIRONMENT, command, stillroom
from reports import NASTY, finished
from rich.console import Console
from tiny_llama import save_tiny_llama
from tiny_store import make_store

from stillroom.pipeline.report.stored.inspect import show
from stillroom.pipeline.report.token_view import fitting, rows_of, shade, visible, worst
from stillroom.storage.errors import UsageError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished(
        tmp_path_factory.mktemp("view") / "run",
        reports.evaluation() | {"views": reports.views()},
        {},
    )


def printed(parts: list[Any], columns: int, *, colours: bool) -> str:
    system: Any = "truecolor" if colours else None
    console = Console(
        width=columns, file=io.StringIO(), force_terminal=colours, color_system=system
    )
    for part in parts:
        console.print(part)
    return console.file.getvalue()  # type: ignore[attr-defined,no-any-return]


def test_a_run_s_rows_are_shown_with_the_kl_and_the_best_of_both(run: Path) -> None:
    sample, parts = show(str(run), None, columns=80, colours=False)
    text = printed(parts, 80, colours=False)
    assert max(map(len, text.splitlines())) <= 80
    assert "\x1b" not in text
    stated = reports.views()["rows"][0]
    lines = [line.split() for line in text.splitlines() if re.match(r" +\d+  ", line)]
    assert [int(line[0]) for line in lines] == list(range(5, 35))
    assert [float(line[2]) for line in lines] == pytest.approx(
        stated["arms"]["student"]["kl"], abs=5.1e-4
    )
    assert [line[1] for line in lines][:3] == ["\u2423the", "</script><b>", "&amp;"]
    assert "(12 more scored tokens are not shown)" in text
    assert sample["key"] == "00" * 16
    assert [p["said"]["student"]["kl"] for p in sample["positions"]] == stated["arms"]["student"][
        "kl"
    ]


def test_a_wider_terminal_shows_more_and_colours_by_the_distance(run: Path) -> None:
    narrow, wide = (
        printed(show(str(run), "01", columns=c, colours=True)[1], c, colours=True)
        for c in (80, 140)
    )
    plain = [re.sub(r"\x1b\[[\d;]*m", "", text) for text in (narrow, wide)]
    assert [
        max(map(len, text.splitlines())) <= c for text, c in zip(plain, (80, 140), strict=True)
    ] == [True, True]
    assert len(re.findall(r"0\.\d{3}", plain[1])) > len(re.findall(r"0\.\d{3}", plain[0]))
    backgrounds = [tuple(map(int, found)) for found in re.findall(r"48;2;(\d+);(\d+);(\d+)m", wide)]
    reds = list(dict.fromkeys(red for red, _, _ in backgrounds))
    assert reds == sorted(reds), "the KL of the fixture rises from token to token"
    assert len(reds) > 20


def test_sixty_columns_cut_no_number(run: Path) -> None:
    text = printed(show(str(run), None, columns=60, colours=False)[1], 60, colours=False)
    assert max(map(len, text.splitlines())) <= 60
    kl = [line.split()[2] for line in text.splitlines() if re.match(r" +\d+  ", line)]
    stated = reports.views()["rows"][0]["arms"]["student"]["kl"]
    assert [float(number) for number in kl] == pytest.approx(stated, abs=5.1e-4)


STEERING = "\x1b[2J\x9b31m\x00\x07\u202e"
"""Clears the screen, turns it red, says nothing, rings the bell, turns the line round."""


@pytest.mark.parametrize("colours", [False, True])
def test_what_a_model_writes_steers_neither_terminal_nor_page(
    tmp_path: Path, colours: bool
) -> None:
    views = reports.views(rows=1)
    views["pieces"] |= {"0": STEERING, "3": STEERING}
    evaluation = reports.evaluation() | {"views": views}
    evaluation["samples"][0]["student"] = STEERING
    hostile = finished(tmp_path / "hostile", evaluation, {})
    drawn = printed(show(str(hostile), None, columns=80, colours=colours)[1], 80, colours=colours)
    shown = re.sub(r"\x1b\[[\d;]*m", "", drawn) if colours else drawn
    for text in (shown, *((hostile / name).read_text() for name in ("report.md", "report.html"))):
        assert "\u241b[2J\ufffd31m\u2400\u2407\ufffd" in text
        assert not set(text) & set("\x1b\x9b\x00\x07\u202e")


def test_without_colours_nothing_is_called_coloured(run: Path) -> None:
    ours, theirs = pty.openpty()
    environment = ENVIRONMENT | {"TERM": "xterm", "NO_COLOR": "1"}
    subprocess.run(command("inspect", run), stdout=theirs, env=environment, check=True)
    os.close(theirs)
    assert (
        os.read(ours, 1000)
        .decode()
        .startswith(f"held-out row {'00' * 16}; KL(teacher || student) in nats")
    )
    os.close(ours)


def test_a_row_that_is_not_there_is_named_and_so_is_a_run_without_rows(
    run: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        UsageError,
        match=r"0 held-out rows have keys that begin with 'ff'\. It has 00000000, 01010101",
    ):
        show(str(run), "ff", columns=80, colours=False)
    with pytest.raises(UsageError, match="2 held-out rows have keys that begin with '0'"):
        show(str(run), "0", columns=80, colours=False)
    bare = finished(tmp_path / "bare", reports.evaluation(), {})
    with pytest.raises(UsageError, match="holds no rows token by token"):
        show(str(bare), None, columns=80, colours=False)


def test_the_command_line_shows_it_for_people_and_for_machines(run: Path) -> None:
    done = stillroom("inspect", run, "--key", "01", "--json")
    *above, last = done.stdout.rstrip("\n").split("\n")
    assert above[0] == f"held-out row {'01' * 16}; KL(teacher || student) in nats"
    assert max(map(len, above)) <= 80
    assert json.loads(last)["cut_after"] == 12


def test_the_worst_are_where_the_kl_is_greatest() -> None:
    (row, _) = rows_of(reports.evaluation() | {"views": reports.views()})
    kl = reports.views()["rows"][0]["arms"]["baseline"]["kl"]
    assert [p.distance("baseline") for p in worst(row, "baseline", 4)] == sorted(kl, reverse=True)[
        :4
    ]
    assert row.before == NASTY[0] + NASTY[8]


def test_unscored_text_between_spans_is_plain_and_indices_pass_over_it(tmp_path: Path) -> None:
    views = reports.views(rows=1)
    (row,) = views["rows"]
    views["pieces"] |= {"90": "\nuser: go on\n", "91": "\nbot: "}
    row["between"] = [
        {"after": 2, "cut": 0, "token_ids": [90, 91]},
        {"after": 5, "cut": 7, "token_ids": [91]},
    ]
    evaluation = reports.evaluation() | {"views": views}
    (shown,) = rows_of(evaluation)
    assert [p.index for p in shown.positions][:7] == [5, 6, 9, 10, 11, 20, 21]
    before = {n: p.before for n, p in enumerate(shown.positions) if p.before}
    assert before == {2: "\nuser: go on\n\nbot: ", 5: "\u2026 \nbot: "}

    folder = finished(tmp_path / "run", evaluation, {})
    sample, parts = show(str(folder), None, columns=80, colours=True)
    assert sample["positions"][2]["before"] == before[2]
    assert re.search(r"\x1b\[2m\s*user: go on", printed(parts, 80, colours=True)), "dim, no colour"
    assert "user: go on" in printed(parts, 80, colours=False)
    page = (folder / "report.html").read_text()
    assert re.search(r'<span class="before">[^<]*user: go on', page)
    assert page.count('class="t"') == len(shown.positions)
    assert "user: go on" in (folder / "report.md").read_text()


def test_of_a_stored_row_every_span_is_coloured_and_its_positions_are_right(tmp_path: Path) -> None:
    texts = [[1, 5, 6, 7, 8, 9, 10, 11, 2]]
    teacher = save_tiny_llama(tmp_path / "teacher")
    spans = [[2, 2], [6, 3]]
    store = make_store(tmp_path / "store", teacher, texts=texts, spans={0: spans})
    sample, parts = show(str(store.root), None, columns=80, colours=True)
    assert sample["spans"] == spans
    assert [p["index"] for p in sample["positions"]] == [2, 3, 6, 7, 8]
    text = parts[1]
    words = {index: sample["texts"][index] for index in range(9)}
    plain = [text.plain[s.start : s.end] for s in text.spans if s.style == "dim"]
    assert plain == [words[index] for index in (0, 1, 4, 5)]
    heading, text, *_ = show(str(store.root), None, columns=80, colours=False)[1]
    assert heading.plain.endswith("scored tokens stand in ⟦ ⟧\n")
    assert re.findall("⟦(.*?)⟧", text.plain) == [
        "".join(sample["texts"][start : start + tokens]) for start, tokens in spans
    ]


def test_as_many_entries_as_fit() -> None:
    best = [(" the", "0.500"), ("\n", "0.250"), ("averylongtoken", "0.125")]
    assert fitting(best, 80) == "\u2423the 0.500  \u21b5 0.250  averylongtoken 0.125"
    assert fitting(best, 20) == "\u2423the 0.500  \u21b5 0.250"
    assert fitting(best, 10) == "\u2423the 0.500"
    assert fitting(best[2:], 10) == "averylong\u2026"
    assert (
        fitting([("\u65e5" * 3, "0.5"), ("a", "0.1")], 15) == "\u65e5\u65e5\u65e5 0.5"
    )  # two columns each
    assert visible("") == "\u2205"


def test_colour_grows_with_the_distance() -> None:
    assert [round(shade(nats), 2) for nats in (-1.0, 0.0, 0.1, 0.7, 3.0)] == [
        0.0,
        0.0,
        0.1,
        0.5,
        0.95,
    ]
