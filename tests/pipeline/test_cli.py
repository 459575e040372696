"""The command line: help, init and schema answer without the heavy libraries; plan writes nothing."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe

COMMANDS = ["demo", "init", "plan", "run", "status", "inspect", "query", "verify", "report", "schema"]
HEAVY = {"torch", "transformers", "vllm", "datasets", "matplotlib"}


def modules_after(*arguments: str) -> set[str]:
    """Top-level modules that a command has loaded by its end."""
    code = (
        "import sys\nfrom stillroom.pipeline import cli\n"
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


def test_plan_loads_no_torch_and_writes_nothing(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    source = write_jsonl(tmp_path / "p.jsonl", prompts(12))
    recipe = write_recipe(tmp_path, tiny_llama("teacher"), source)
    before = sorted(tmp_path.rglob("*"))
    assert not modules_after("plan", str(recipe)) & HEAVY
    assert sorted(tmp_path.rglob("*")) == before
    lines = last_json(stillroom("plan", recipe, "--json"))["stages"]
    assert (lines["data"]["pending"], lines["generate"]["pending"], lines["score"]["state"]) == (12, 12, "waits")


def test_init_writes_a_recipe_once(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert "stillroom plan" in stillroom("init", path).stdout
    assert "exists already" in stillroom("init", path, expect=2).stderr


def test_schema_is_the_recipes_json_schema() -> None:
    schema = json.loads(stillroom("schema").stdout)
    assert set(schema["required"]) == {"run", "storage", "teacher", "student", "data", "train"}
    assert schema["$defs"]["Score"]["properties"]["k"]["default"] == 64
    assert "description" in schema["$defs"]["Train"]["properties"]["tokens_per_step"]


@pytest.mark.parametrize("arguments", [["verify"], ["query", "SELECT 1"], ["inspect"]])
def test_no_store_is_a_clear_message(tmp_path: Path, arguments: list[str]) -> None:
    name, *more = arguments
    done = stillroom(name, tmp_path / "none", *more, "--json", expect=2)
    assert "no store here" in done.stderr
    assert last_json(done)["exit_code"] == 2


@pytest.mark.parametrize("arguments", [["run"], ["run", "r.yaml", "--nothing"], ["nothing"]])
def test_bad_usage_is_exit_code_2(arguments: list[str]) -> None:
    stillroom(*arguments, expect=2)


def test_an_unknown_stage_is_refused_by_name(tmp_path: Path, tiny_llama: Callable[..., Path]) -> None:
    recipe = write_recipe(tmp_path, tiny_llama("teacher"), write_jsonl(tmp_path / "p.jsonl", prompts(12)))
    assert "no stage 'scores'" in stillroom("run", recipe, "--until", "scores", expect=2).stderr
