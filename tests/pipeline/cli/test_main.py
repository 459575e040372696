"""The command line.

Help, init and schema answer without the heavy libraries, and plan writes nothing.
"""

import fcntl
import json
import os
import shlex
import signal
import subprocess
import sys
import termios
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import command, last_json, prompts, stillroom, write_jsonl, write_recipe

from stillroom.pipeline.report.stored.inspect import describe, find_row, tokenizer_of
from stillroom.storage.errors import UsageError
from stillroom.storage.store.store import Store

COMMANDS = [
    "demo",
    "init",
    "plan",
    "run",
    "status",
    "inspect",
    "query",
    "verify",
    "repair",
    "vacuum",
    "report",
    "schema",
]
HEAVY = {"torch", "transformers", "vllm", "datasets", "matplotlib"}


def modules_after(*arguments: str) -> set[str]:
    """Top-level modules that a command has loaded by its end."""
    code = (
        "import sys\nfrom stillroom.pipeline.cli import main as cli\n"
        f"sys.argv = ['stillroom', *{list(arguments)!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit:\n    pass\n"
        "sys.stderr.write('\\n' + ' '.join({m.split('.')[0] for m in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    return set(done.stderr.split("\n")[-1].split())


def test_help_lists_every_command() -> None:
    shown = stillroom("--help").stdout
    assert all(f"  {name} " in shown for name in COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_help(name: str) -> None:
    assert "Usage:" in stillroom(name, "--help").stdout


def test_what_needs_no_data_loads_neither_torch_nor_arrow(tmp_path: Path) -> None:
    for arguments in (
        ["--help"],
        ["schema"],
        ["init", str(tmp_path / "r.yaml")],
        ["plan", str(tmp_path / "none.yaml")],
    ):
        assert not modules_after(*arguments) & (HEAVY | {"pyarrow", "duckdb"}), arguments


def test_plan_loads_no_torch_and_writes_nothing(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(12))
    recipe = write_recipe(tmp_path, tiny_llama("teacher"), source)
    before = sorted(tmp_path.rglob("*"))
    assert not modules_after("plan", str(recipe)) & HEAVY
    assert sorted(tmp_path.rglob("*")) == before
    lines = last_json(stillroom("plan", recipe, "--json"))["stages"]
    assert (lines["data"]["pending"], lines["generate"]["pending"], lines["score"]["state"]) == (
        12,
        12,
        "waits",
    )


def test_init_writes_a_recipe_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert "stillroom plan" in stillroom("init", path).stdout
    assert "exists already" in stillroom("init", path, expect=2).stderr


def test_init_prints_one_object(tmp_path: Path) -> None:
    lines = stillroom("init", tmp_path / "mine.yaml", "--json").stdout.splitlines()
    assert [line for line in lines if line.startswith("{")] == [
        json.dumps({"recipe": str(tmp_path / "mine.yaml")})
    ]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_outside_a_stage_is_exit_code_130_and_a_message(
    tmp_path: Path, number: int
) -> None:
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    process = subprocess.Popen(command("run", pipe, "--json"), stdout=-1, stderr=-1, text=True)
    with pipe.open(
        "w"
    ):  # opens when the command reads; it then waits for a recipe that does not come
        for _ in range(3):  # shell and kernel may both send one
            process.send_signal(number)
        assert (
            process.stderr.readline()
            == "error: stopped by a signal; what is finished is kept. Run the same command again.\n"
        )
        process.send_signal(number)  # while the process ends
        out, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, "")
    assert json.loads(out)["exit_code"] == 130


def on_a_terminal(pipe: Path, *, nohup: bool) -> tuple[subprocess.Popen[bytes], int]:
    """Run `stillroom run` with a terminal of its own.

    The terminal lives until the descriptor is closed.
    """
    ours, theirs = os.openpty()

    def begin() -> None:
        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
        if nohup:
            signal.signal(signal.SIGHUP, signal.SIG_IGN)

    streams = dict.fromkeys(("stdin", "stdout", "stderr"), theirs)
    process = subprocess.Popen(
        command("run", pipe), start_new_session=True, preexec_fn=begin, **streams
    )
    os.close(theirs)
    return process, ours


@pytest.mark.parametrize("nohup", [False, True])
def test_a_terminal_that_is_gone_stops_a_command_without_nohup(tmp_path: Path, nohup: bool) -> None:
    """With nohup the command goes on, and what it then says goes nowhere.

    Here it says that the recipe is bad.
    """
    pipe = tmp_path / "recipe.yaml"
    os.mkfifo(pipe)
    process, terminal = on_a_terminal(pipe, nohup=nohup)
    with pipe.open("w") as recipe:  # opens when the command reads
        os.close(terminal)
        if nohup:
            recipe.write("[]")
        else:
            process.wait(timeout=60)
    assert process.wait(timeout=60) == (2 if nohup else 130)


def test_closed_streams_are_no_traceback(tmp_path: Path) -> None:
    words = shlex.join(command("query", tmp_path, "SELECT 1"))
    for closed in ("2>&-", "<&- >&- 2>&-"):
        done = subprocess.run(["sh", "-c", f"{words} {closed}"], capture_output=True, timeout=60)
        assert (done.returncode, done.stdout, done.stderr) == (2, b"", b"")


def generations(root: Path, *, author: str, keys: list[bytes]) -> Store:
    """A store with a generation under every key, and a model `teacher` of one-letter tokens."""
    from tokenizers import Tokenizer, models

    store = Store.open(root, create=True)
    tokenizer = Tokenizer(
        models.WordLevel({letter: i for i, letter in enumerate("abcdef")}, unk_token="a")
    )
    store.put_teacher(
        "teacher", {"tokenizer.json": tokenizer.to_str().encode(), "identity.json": b"{}"}
    )
    with store.writer("generations", about={}) as writer:
        for key in keys:
            writer.add(
                {
                    "key": key,
                    "reuse_key": key,
                    "prompt_key": key,
                    "author_id": author,
                    "sampling_id": author,
                    "tokens_key": bytes(16),
                    "sample_index": 0,
                    "token_ids": [1, 2, 3],
                    "prompt_tokens": 1,
                    "completion_tokens": 2,
                    "text": "c d",
                    "finish_reason": "stop",
                    "max_tokens": 2,
                    "row_seed": 0,
                }
            )
    return store


def test_inspect_takes_a_unique_beginning_only(tmp_path: Path) -> None:
    store = generations(
        tmp_path / "store", author="given", keys=[b"\x12" * 16, b"\x13" * 16, b"\x20" * 16]
    )
    assert find_row(store, "2")["key"] == b"\x20" * 16
    assert find_row(store, "131")["key"] == b"\x13" * 16
    assert find_row(store, None)["key"] == b"\x12" * 16
    with pytest.raises(UsageError, match="2 rows have keys that begin with '1'"):
        find_row(store, "1")
    with pytest.raises(UsageError, match="no row whose key begins with 7"):
        find_row(store, "7")


@pytest.mark.parametrize(
    ("author", "tokens"), [("given", ["[1]", "[2]", "[3]"]), ("teacher", ["b", "c", "d"])]
)
def test_inspect_reads_tokens_with_the_rows_own_tokenizer_or_none(
    tmp_path: Path, author: str, tokens: list[str]
) -> None:
    store = generations(tmp_path / "store", author=author, keys=[b"\x12" * 16])
    row = find_row(store, None)
    assert describe(row, tokenizer_of(store, row))["tokens"] == tokens


def test_schema_is_the_recipes_json_schema() -> None:
    schema = json.loads(stillroom("schema").stdout)
    assert set(schema["required"]) == {"run", "storage", "data"}
    assert schema["anyOf"] == [{"required": ["teacher"]}, {"required": ["teachers"]}]
    assert schema["$defs"]["Score"]["properties"]["k"]["default"] == 64
    assert "description" in schema["$defs"]["Train"]["properties"]["tokens_per_step"]


@pytest.mark.parametrize(
    "arguments", [["verify"], ["repair"], ["vacuum"], ["query", "SELECT 1"], ["inspect"]]
)
def test_no_store_is_a_clear_message(tmp_path: Path, arguments: list[str]) -> None:
    name, *more = arguments
    done = stillroom(name, tmp_path / "none", *more, "--json", expect=2)
    assert "no store here" in done.stderr
    assert last_json(done)["exit_code"] == 2


@pytest.mark.parametrize("arguments", [["run"], ["run", "r.yaml", "--nothing"], ["nothing"]])
def test_bad_usage_is_exit_code_2(arguments: list[str]) -> None:
    stillroom(*arguments, expect=2)


def test_an_unknown_stage_is_refused_by_name(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    recipe = write_recipe(
        tmp_path, tiny_llama("teacher"), write_jsonl(tmp_path / "p.jsonl", prompts(12))
    )
    assert "no stage 'scores'" in stillroom("run", recipe, "--until", "scores", expect=2).stderr


LONG = "n" * 300
"""More than any file system takes as a name."""


@pytest.mark.parametrize(
    "words",
    [
        ("query", LONG, "SELECT 1"),
        ("verify", LONG),
        ("inspect", LONG),
        ("repair", LONG),
        ("vacuum", LONG),
        ("export", LONG, "there"),
        ("publish", LONG, "me/rows"),
        ("import", "rows.parquet", "store", "--teacher", LONG, "--targets-at", "next"),
        ("init", LONG),
        ("status", LONG),
        ("report", LONG),
        ("run", LONG),
    ],
    ids=lambda words: words[0],
)
def test_a_name_that_no_file_can_have_is_a_message(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "error: " + LONG[:80] in stillroom(*words, expect=2).stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "section",
    [
        {"data": {"source": f"/{LONG}/a", "format": "prompt"}},
        {"data": {"source": f"/{LONG}*", "format": "prompt"}},
        {"storage": {"dir": f"/{LONG}"}},
        {"run": {"dir": f"/{LONG}"}},
        {"student": {"model": f"/{LONG}"}},
    ],
    ids=["source", "glob", "store", "run", "student"],
)
def test_a_recipe_with_such_a_name_is_a_message(
    section: dict[str, dict[str, str]], tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    recipe = write_recipe(tmp_path, tiny_llama(), source, **section)
    said = stillroom("run", recipe, expect=2).stderr
    assert f"error: /{LONG[:79]}" in said
    assert "which the file system does not take" in said
