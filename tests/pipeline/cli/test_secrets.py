"""No command shows or records a secret.

A secret is in the environment, in an address, or what `${NAME}` in a recipe stands for.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl
from running import start
from tiny_llama import save_tiny_llama

from stillroom.pipeline.cli.app import app

MARK = "mark7f3a"
"""Stands in every secret, and nowhere else."""
ADDRESS = f"nosuch://user:{MARK}-password@host/path?X-Amz-Signature={MARK}&x=1"
BUCKET = f"s3://key:{MARK}-pass/word@bucket/path"
SECRETS = ("HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "WANDB_API_KEY")
TABLES = ("prompts", "generations", "soft_targets", "rejects", "commits")


class House:
    """A run whose folders, models and data the recipe names by variables alone.

    Each value holds the mark.
    """

    def __init__(self, root: Path) -> None:
        hidden = {name: root / f"{MARK}-{name.lower()}" for name in ("MODELS", "WORK")}
        data = root / f"{MARK}-data" / f"{MARK}.jsonl"
        for folder in (*hidden.values(), data.parent):
            folder.mkdir()
        save_tiny_llama(hidden["MODELS"] / "teacher")
        save_tiny_llama(hidden["MODELS"] / "student", seed=1)
        write_jsonl(data, [*prompts(16), "not JSON"])
        self.environment = {name: str(folder) for name, folder in hidden.items()}
        self.environment |= {"DATA": str(data), "XDG_CACHE_HOME": str(root / "cache")}
        self.environment |= {name: f"{MARK}-{name.lower()}" for name in SECRETS}
        self.root, self.recipe = root, root / "recipe.yaml"
        tree = recipe_tree(Path("${WORK}"), Path("${MODELS}/teacher"), Path("${DATA}"))
        tree["student"] = {"model": "${MODELS}/student"}
        tree["generate"]["model"] = "${MODELS}/teacher"
        self.recipe.write_text(yaml.safe_dump(tree))
        # On the command line people write what they like: here a way without the mark.
        self.store, self.run = root / "store", root / "run"
        self.store.symlink_to(hidden["WORK"] / "store")
        self.run.symlink_to(hidden["WORK"] / "run")


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    with pytest.MonkeyPatch.context() as patch:
        house = House(tmp_path_factory.mktemp("house"))
        for name, value in house.environment.items():
            patch.setenv(name, value)
        done = stillroom("run", house.recipe, "--json")
        assert MARK not in done.stdout + done.stderr
        assert last_json(done)["run_dir"] == "${WORK}/run"
        yield house


@pytest.fixture(autouse=True)
def environment(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in house.environment.items():
        monkeypatch.setenv(name, value)


LICENSES = (
    "--license",
    "mit",
    "--teacher-license",
    "mit",
    "--source-license",
    "mit",
)
# Command -> its arguments, by what they are. Each command is also given ADDRESS, which nothing
# opens.
WORKS: dict[str, list[tuple[Any, ...]]] = {
    "plan": [("RECIPE",)],
    "run": [("RECIPE",)],
    "status": [("RECIPE",)],
    "report": [("RUN",)],
    "inspect": [("STORE",)],
    "query": [("STORE", f"SELECT * FROM {table}") for table in TABLES],
    "verify": [("STORE",)],
    "repair": [("STORE",)],
    "vacuum": [("STORE",)],
    "export": [("STORE", "OUT", *LICENSES), ("RECIPE", "OUT", *LICENSES)],
    "publish": [("RECIPE", "OUT", *LICENSES)],
    "schema": [()],
    "init": [("NEW",)],
    "doctor": [("STORE",)],
    "launch": [("RECIPE", "--on", "slurm", "--workers", "2", "--dry-run")],
    "train": [("RECIPE",)],
}
FAILS: dict[str, list[tuple[Any, ...]]] = {
    **{
        command: [
            ("RECIPE", "--set", f"{field}={value}")
            for field, value in (
                ("data.source", ADDRESS),
                ("data.source", "${WORK}/none.jsonl"),
                ("teacher.model", ADDRESS),
                ("storage.dir", ADDRESS),
                ("storage.dir", BUCKET),
                ("storage.sources", f"[{ADDRESS}]"),
                ("train.wandb", "${HF_TOKEN}"),
            )
        ]
        for command in ("plan", "run", "status")
    },
    **{
        command: [(ADDRESS,), (BUCKET,)]
        for command in ("inspect", "verify", "repair", "vacuum", "report")
    },
    "query": [(ADDRESS, "SELECT 1"), ("STORE", f"SELECT * FROM read_text('{ADDRESS}')")],
    "export": [(ADDRESS, "OUT", *LICENSES)],
    "publish": [("RECIPE", ADDRESS, *LICENSES)],
    "import": [(ADDRESS, "NEW", "--targets-at", "next", "--teacher", ADDRESS)],
    "demo": [("--dir", "RECIPE")],
    "doctor": [(ADDRESS,), (BUCKET,)],
    "launch": [("RECIPE", "--on", "slurm", "--set", f"teacher.model={ADDRESS}", "--dry-run")],
    "train": [("RECIPE", "--set", f"data.source={ADDRESS}")],
}


def _said(house: House, command: str, words: tuple[Any, ...], out: Path, *, works: bool) -> str:
    places = {"RECIPE": house.recipe, "STORE": house.store, "RUN": house.run}
    places |= {"OUT": out / "made", "NEW": out / "new"}
    given = [places.get(word, word) for word in words]
    given += [] if command == "schema" else ["--json"]
    done = stillroom(command, *given, expect=None)
    assert (done.returncode == 0) is works, f"{command} {given}\n{done.stdout}\n{done.stderr}"
    return f"{done.stdout}\n{done.stderr}"


@pytest.mark.parametrize("works", [True, False])
def test_no_command_says_a_secret(house: House, tmp_path: Path, works: bool) -> None:
    commands = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback}
    assert commands == WORKS.keys() | FAILS.keys(), "a command is new: give it arguments here"
    for command, calls in (WORKS if works else FAILS).items():
        for number, words in enumerate(calls):
            out = house.root / f"{works}-{command}-{number}"
            out.mkdir()
            said = _said(house, command, words, out, works=works)
            assert MARK not in said, f"{command} {words}: {said}"


def test_an_error_keeps_the_variable(house: House) -> None:
    said = stillroom("plan", house.recipe, "--set", "data.source=${WORK}/none", expect=2).stderr
    assert "${WORK}/none" in said


def test_json_stays_json_and_the_store_s_address_bare(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RUN_KEY", "12345678")
    asked = stillroom("query", house.store, "SELECT 1123456789 n", "--json")
    assert last_json(asked)["rows"] == [{"n": 1123456789}]
    address = f"storage.dir=file://{tmp_path}/store?key={MARK}"
    alone = [
        word for name in ("student", "train", "evaluate") for word in ("--set", f"{name}=null")
    ]
    said = stillroom("run", house.recipe, "--only", "data", "--set", address, *alone).stdout
    assert f"store: file://{tmp_path}/store\n" in said


def test_a_stage_s_log_and_records_hold_no_secret(house: House) -> None:
    """A stage is run in a process of its own; then all that this file's commands wrote is read."""
    others = (
        "storage.dir=${WORK}/other",
        "run.dir=${WORK}/others",
        "storage.sources=['${WORK}/store']",
    )
    elsewhere = [word for other in others for word in ("--set", other)]
    process = start(house.recipe, "--only", "data", *elsewhere, **house.environment)
    said = process.communicate(timeout=300)
    assert process.returncode == 0, said
    assert MARK not in "".join(said)
    written = [path for path in house.root.rglob("*") if path.is_file()]
    written += [p for name in ("store", "run") for p in (house.root / name).rglob("*")]
    assert sum(path.suffix == ".parquet" for path in written) > 5
    assert any(path.name == "README.md" for path in written)
    for path in written:
        models_or_data = any(f"{MARK}-{kind}" in str(path) for kind in ("models", "data"))
        if path.is_file() and not models_or_data:
            assert MARK not in _content(path), path


def _content(path: Path) -> str:
    """What a file holds, also where that is compressed."""
    text = path.read_bytes().decode("utf-8", "replace")
    if path.suffix == ".parquet":
        table = pq.read_table(path)
        text += f"{table.schema.metadata}{table.to_pylist()}"
    return text


def test_the_environment_of_these_tests_holds_the_mark() -> None:
    assert all(MARK in os.environ[name] for name in (*SECRETS, "WORK", "MODELS", "DATA"))
