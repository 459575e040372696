"""Several workers on one store and one run folder share the work.

Each row is there once, and the dead hold up nobody.
"""

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from loaded import Loaded
from running import PATIENCE, at_worker_start, committed, contents, end_started, ours, start, until

from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow
BATCH, BLOCK, ROWS = 4, 8, 120


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(ROWS))
    return write_recipe(
        tmp_path,
        tiny_llama("teacher", eos_token_id=None, num_hidden_layers=4),
        source,
        generate={
            "engine": "hf",
            "temperature": 0.0,
            "max_tokens": 24,
            "engine_args": {"batch_size": BATCH},
        },
        train={
            "epochs": 2,
            "tokens_per_step": 512,
            "learning_rate": 5.0e-3,
            "checkpoint_every_steps": 2,
        },
    )


def together(folder: Path, count: int) -> str:
    """PYTHONPATH of workers that begin to write when `count` of them have loaded.

    They note each row that they write.
    """
    return at_worker_start(
        folder,
        f"""
        import time
        from stillroom.stages.engines.hf import HfEngine
        load, completion = HfEngine.__init__, HfEngine._completion
        def loaded(self, *arguments):
            load(self, *arguments)
            with open({str(folder / "loaded")!r}, "a") as file:
                file.write("x")
            while os.path.getsize({str(folder / "loaded")!r}) < {count}:
                time.sleep(0.01)
        def noted(self, request, *arguments):
            with open({str(folder / "made")!r}, "a") as file:
                file.write(f"{{request.seed}}\\n")
            return completion(self, request, *arguments)
        HfEngine.__init__, HfEngine._completion = loaded, noted
        """,
    )


def made(folder: Path) -> Counter[str]:
    """Row seed -> how often the row was written."""
    return Counter((folder / "made").read_text().split())


def by_writer(store: Path) -> Counter[str]:
    rows: Counter[str] = Counter()
    for commit in Store.open(store).commits("generations"):
        rows[commit.writer] += commit.shard.rows
    return rows


def outcome(process: Loaded) -> dict[str, Any]:
    out, err = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, err
    return last_json(subprocess.CompletedProcess([], 0, out))


def test_two_workers_share_what_one_would_do_row_for_row(recipe: Path, tmp_path: Path) -> None:
    stillroom("run", recipe, "--only", "data")
    site = together(tmp_path / "site", 2)
    pair = [start(recipe, "--only", "generate", PYTHONPATH=site) for _ in range(2)]
    said = [outcome(process)["stages"]["generate"] for process in pair]
    shares = by_writer(tmp_path / "store")
    rows = sum(shares.values())
    assert [part["state"] for part in said] == ["done", "done"]
    assert sum(part["rows"] for part in said) == rows
    assert len(shares) == 2
    assert min(shares.values()) > 0.2 * rows
    times = made(tmp_path / "site")
    assert len(times) == rows
    assert times.total() - rows <= 2 * (BLOCK + BATCH)
    assert {p.name for p in (tmp_path / "run" / "logs").iterdir()} >= {
        "generate.log",
        "generate.2.log",
    }
    assert not list((tmp_path / "run" / "logs").glob("*.inflight"))

    other = [f"storage.dir={tmp_path}/store2", f"run.dir={tmp_path}/run2"]
    stillroom("run", recipe, "--until", "generate", *(w for o in other for w in ("--set", o)))
    assert dict(contents(tmp_path / "store")) == dict(contents(tmp_path / "store2"))
    assert last_json(stillroom("verify", tmp_path / "store", "--json"))["ok"]


def test_the_work_of_a_worker_that_was_killed_is_done_by_the_other(
    recipe: Path, tmp_path: Path
) -> None:
    stillroom("run", recipe, "--only", "data")
    site = together(tmp_path / "site", 2)
    killed, other = [start(recipe, "--only", "generate", PYTHONPATH=site) for _ in range(2)]
    until(lambda: committed(recipe, "generations") >= 6, "a part of the work")
    os.killpg(killed.pid, signal.SIGKILL)
    killed.communicate()
    outcome(other)
    rows = sum(by_writer(tmp_path / "store").values())
    line = last_json(stillroom("plan", recipe, "--json"))["stages"]["generate"]
    assert (line["pending"], line["committed"]) == (0, rows)
    assert made(tmp_path / "site").total() - rows <= 2 * (BLOCK + BATCH) + BLOCK
    assert last_json(stillroom("verify", tmp_path / "store", "--json"))["ok"]
    assert not list(contents(tmp_path / "store"))[-1][1]  # and the kill put no row under suspicion


def test_full_runs_at_once_train_one_student(recipe: Path, tmp_path: Path) -> None:
    """Those that find it in training wait until it is done, or until a signal comes."""
    # A training of 18 steps: there are many behind its first checkpoint.
    few = ("--set", "data.limit=40", "--set", "train.tokens_per_step=128")
    stillroom("run", recipe, *few, "--until", "score")
    first = start(recipe, *few)
    until(lambda: bool(list((tmp_path / "run").glob("train-*/checkpoints/step-*"))), "a checkpoint")
    trainer = ours(first)[0]
    trainer.suspend()  # in the midst of its work
    waiting = [start(recipe, *few) for _ in range(2)]
    for process in waiting:
        until(lambda: "trains this student: waiting" in process.errors(), "its wait")  # noqa: B023
        assert f"process {trainer.pid} on " in process.errors()
    second, stopped = waiting
    stopped.send_signal(signal.SIGINT)
    stopped.communicate(timeout=PATIENCE)
    assert stopped.returncode == 130
    trainer.resume()
    results = [outcome(process)["results"] for process in (first, second)]
    assert results[0] == results[1]
    assert len(list((tmp_path / "run").glob("train-*"))) == 1
    assert (tmp_path / "run" / "latest" / "train.json").is_file()
    assert (tmp_path / "run" / "report.md").is_file()


def test_workers_wait_for_the_prompts(recipe: Path) -> None:
    assert (
        "Run `--only data` first" in stillroom("run", recipe, "--only", "generate", expect=2).stderr
    )
