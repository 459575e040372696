"""Text of others wherever it comes out: terminal, log, Markdown.

Nothing in it acts or forges a line.
"""

import ast
import io
import os
import re
import shutil
from pathlib import Path

import pytest
from hostile import FORGED, FORGED_NAME, active, assert_shown
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import stillroom
from published import make_store

from stillroom import pipeline
from stillroom.pipeline.printing.console import Terminal
from stillroom.pipeline.printing.text import escaped, inline, one_line, printable, prose, table
from stillroom.pipeline.run.progress import StageProgress, ToldProgress
from stillroom.pipeline.run.screen import Screen
from stillroom.pipeline.run.worker import _LogText
from stillroom.storage.store.store import Store

ROOT = Path(str(pipeline.__file__)).parent
PIECES = st.sampled_from(
    (
        "<img src=x>|<!--|</b>|![|[a]|](|)|(http://e.org)|[a]: http://e.org|<http://e.org>|"
        "`|``|**|*|_"
    ).split("|")
    + "\\|#|> |- |1. |---|```|&lt;|~~|\x1b|\r|\u202e|\u2028|\ud800|a| |    |\n|\n\n".split("|")
    + ["|"]
)
TEXTS = st.lists(PIECES, max_size=12).map("".join)


@settings(deadline=None)
@given(text=TEXTS, other=TEXTS)
def test_no_text_is_more_than_words_in_markdown(text: str, other: str) -> None:
    lines = [
        f"# {escaped(text)}",
        f"Made by {inline(text)} of {inline(other)}.",
        f"- {prose(text + inline(other))}",
        prose(text),
        prose(f"{text} and {inline(other)}"),
        f"> **{prose(text)}**",
        table([inline(text), text], [[inline(other), other], [text, inline(text)]]),
    ]
    for line in (*lines, "\n\n".join(lines)):
        assert active(line) == []
    assert_shown(*lines)


@settings(deadline=None)
@given(text=st.text())
def test_a_line_is_one_line_and_can_be_written(text: str) -> None:
    line = one_line(text)
    assert len(line.splitlines()) == bool(text)
    assert printable(line) == line
    line.encode()


def test_words_stay_words() -> None:
    """What harmless names and sentences say stays as it is written."""
    for text in ("My targets", "Qwen3-0.6B, a_b (1.5 GB) & c: [0, 1] < 2!", "é 日本 👩\u200d🔬 #1"):
        assert escaped(text) == prose(text) == one_line(text) == text
    assert prose("**a** `b|c` d") == "**a** `b|c` d"


def test_all_that_is_shown_goes_through_one_door() -> None:
    """Only these files write to a standard stream, or make a console."""
    doors = {"text.py", "console.py", "streams.py"}
    found = []
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and path.name not in doors:
                called = ast.unparse(node.func)
                if re.fullmatch(
                    r"print|Console|(typer|click)\.s?echo|sys\.std(out|err)\.write", called
                ):
                    found.append(f"{path.name}: {called}")
    assert found == []


@pytest.mark.parametrize("terminal", [False, True])
def test_progress_and_what_is_said_meanwhile(terminal: bool) -> None:
    out = io.StringIO()
    progress = StageProgress("import", out)
    progress.say(FORGED)
    progress.advance(1, note=FORGED)
    console = Terminal(out, force_terminal=terminal, width=60)
    console.print(FORGED, style="red")
    screen = Screen(out)
    screen.say(FORGED)
    shown = re.sub("\x1b\\[[0-9;]*m", "", out.getvalue()) if terminal else out.getvalue()
    assert_shown(shown.replace("\nerror: forged", ""))  # a console draws lines that are ours
    assert shown.count("\nerror: forged") == 1


def test_a_log_can_be_read_in_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    raw, told = io.BytesIO(), []
    log = _LogText(raw, encoding="utf-8")
    monkeypatch.setattr("sys.stderr", log)
    ToldProgress("train", told.append).say(FORGED)
    log.flush()
    assert_shown(raw.getvalue().decode())
    log.write(f"bar 1\rbar 2 {FORGED}")
    log.flush()
    assert_shown(raw.getvalue().decode(), errors=1)  # a library's own lines are its own


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with names that a stranger gave.

    They are those of files, columns' values, sources, settings and classes.
    """
    made = make_store(tmp_path_factory.mktemp("shown") / "store")
    table = made.index("prompts", ["key", "prompt_key"])
    more = {
        "split": ["train"] * len(table),
        "windows": [1] * len(table),
        "first": [True] * len(table),
    }
    inputs = table.select(["key", "prompt_key"])
    for name, values in more.items():
        inputs = inputs.append_column(name, [values])
    made.put_inputs("e" * 32, inputs, {"source": f"/home/x/{FORGED_NAME}", "format": FORGED})
    strange_files(made, "data/soft_targets/ab")
    return made


@pytest.fixture(scope="module")
def broken(store: Store) -> Store:
    """The same, and files of such names among its records."""
    copy = Store.open(shutil.copytree(store.root, Path(store.root).with_name("broken")))
    for folder in ("inputs", "snapshots", f"teachers/{'a' * 32}"):
        strange_files(copy, folder)
    return copy


def strange_files(store: Store, folder: str) -> None:
    path = store.files.path(folder)
    path.mkdir(parents=True, exist_ok=True)
    for name in (FORGED_NAME[:60], os.fsdecode(b"\xff\x1b.json")):
        (path / name).write_bytes(b"{}")


SELECT = f"""SELECT 1 AS "{FORGED.replace('"', "")}", '{FORGED.replace("'", "")}' AS b"""


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (("query", "{store}", SELECT), 0),
        (("query", "{store}", SELECT, "--json"), 0),
        (("query", "{store}", f"SELECT '{FORGED}' FROM nowhere"), 2),
        (("query", "{store}", f'SELECT "{FORGED}" FROM prompts'), 2),
        (("verify", "{broken}"), 3),
        (("verify", "{broken}", "--json"), 3),
        (("query", "{broken}", "SELECT 1"), 3),
        (("vacuum", "{broken}"), 3),
        (("repair", "{broken}"), 0),
        (("vacuum", "{store}", "--dry-run", "--older-than-hours", "0"), 0),
        (("inspect", "{store}", "--key", FORGED), 2),
        (("inspect", "{store}" + FORGED_NAME), 2),
        (("plan", FORGED_NAME + ".yaml"), 2),
        (("report", FORGED_NAME), 2),
        (
            (
                "export",
                "{store}",
                "{store}/../out",
                "--license",
                "mit",
                "--source-license",
                f"{FORGED}=mit",
            ),
            2,
        ),
        (("export", "{store}", "{store}/../out", "--license", FORGED), 2),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else None,
)
def test_commands_show_a_strangers_names_and_nothing_happens(
    store: Store, broken: Store, words: tuple[str, ...], code: int
) -> None:
    filled = [
        word.replace("{store}", str(store.root)).replace("{broken}", str(broken.root))
        for word in words
    ]
    done = stillroom(*filled, expect=code)
    said_by_verify = words[0] in ("verify", "repair")
    assert_shown(done.stdout, done.stderr, errors=code > 0 and not said_by_verify)
