"""Stages are processes: one group at a time, none outlives its runner, and a kill at any moment loses nothing."""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from kit import ENVIRONMENT, command, last_json, prompts, stillroom, write_jsonl, write_recipe

from stillroom.pipeline.process import StageProcess, end_group, group_members
from stillroom.storage.errors import StillroomError
from stillroom.storage.schema import TABLES
from stillroom.storage.store import Store

pytestmark = pytest.mark.slow
PATIENCE = 120.0


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    teacher = tiny_llama("teacher", hidden_size=32)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(48))
    return write_recipe(
        tmp_path,
        teacher,
        source,
        storage={"dir": str(tmp_path / "store"), "commit_rows": 2},
        generate={"engine": "hf", "temperature": 0.0, "max_tokens": 12, "engine_args": {"batch_size": 2}},
        score={"k": 4, "batch_tokens": 64},
        train={
            "epochs": 8,
            "tokens_per_step": 64,
            "learning_rate": 5.0e-3,
            "checkpoint_every_steps": 2,
        },
    )


def start(recipe: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("run", recipe, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
        start_new_session=True,
    )


def workers() -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "stillroom.pipeline.worker" in process.cmdline() and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def until(condition: Callable[[], bool], what: str) -> None:
    """Look again and again; the wait ends with what is waited for, not with time."""
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < deadline, f"waited {PATIENCE} s for {what}"
        time.sleep(0.01)


def ours(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The stages of one runner (other tests may run beside this one)."""
    try:
        return [w for w in workers() if w.ppid() == process.pid]
    except psutil.NoSuchProcess:
        return []


def test_teacher_and_student_never_live_at_the_same_time(recipe: Path) -> None:
    runner = start(recipe)
    groups: list[int] = []
    while runner.poll() is None:
        living = {w.pid for w in ours(runner)}
        assert len(living) <= 1
        for pid in living - set(groups):
            assert not any(group_members(group) for group in groups), "the group before is still there"
            groups.append(pid)
    out, err = runner.communicate()
    assert runner.returncode == 0, err
    assert len(groups) == 5
    assert '"train"' in out


def test_the_next_stage_waits_for_every_process_of_the_group(tmp_path: Path) -> None:
    """A stage may leave children behind (an engine's workers): they are gone before the next stage starts."""
    group = subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600 & wait"], start_new_session=True)
    until(lambda: len(group_members(group.pid)) == 3, "the group")
    end_group(group.pid)
    assert group_members(group.pid) == []
    group.wait()
    end_group(group.pid)  # a group that is gone is no error


@pytest.mark.parametrize("stage", ["generate", "train"])
def test_a_stage_dies_with_its_runner(recipe: Path, stage: str) -> None:
    runner = start(recipe)
    log = recipe.parent / "run" / "logs" / f"{stage}.log"
    until(log.exists, f"stage {stage}")
    worker = ours(runner)
    os.kill(runner.pid, signal.SIGKILL)
    runner.wait()
    until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in worker), "the stage's death")
    runner.communicate()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_commits_what_is_finished_and_says_how_to_go_on(recipe: Path, number: int) -> None:
    runner = start(recipe)
    until(lambda: committed(recipe, "generations") >= 1, "a first commit")
    runner.send_signal(number)
    _, err = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 130
    assert "Run the same command to go on" in err
    assert last_json(stillroom("verify", recipe.parent / "store", "--json"))["ok"]
    stillroom("run", recipe, "--until", "score")


def test_a_second_signal_leaves_at_once(recipe: Path) -> None:
    runner = start(recipe)
    until((recipe.parent / "run" / "logs" / "generate.log").exists, "generate")
    worker = ours(runner)[0]
    worker.suspend()  # it cannot answer the first signal
    runner.send_signal(signal.SIGTERM)
    runner.send_signal(signal.SIGINT)
    runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 130
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE


def test_a_stage_that_is_killed_is_named_with_its_log(recipe: Path) -> None:
    runner = start(recipe)
    until((recipe.parent / "run" / "logs" / "generate.log").exists, "generate")
    until(lambda: bool(ours(runner)), "its process")
    ours(runner)[0].kill()
    _, err = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 1
    assert "its process died" in err
    assert "generate.log" in err


def test_an_answer_that_is_an_error_ends_with_its_code(tmp_path: Path) -> None:
    message = {"name": "score", "stage": "score", "recipe": {}, "log": str(tmp_path / "log"), "quiet": True}
    with pytest.raises(StillroomError, match="The log has more"):
        StageProcess(message | {"train_dirs": {}, "job": {}}).finish()


def committed(recipe: Path, table: str) -> int:
    folder = recipe.parent / "store" / "commits" / table
    return len(list(folder.glob("*.json"))) if folder.is_dir() else 0


def progress_of(recipe: Path, stage: str) -> Callable[[], bool]:
    """Whether a stage is somewhere in its middle."""
    if stage in ("data", "generate", "score"):
        table = {"data": "prompts", "generate": "generations", "score": "soft_targets"}[stage]
        wanted = random.randint(1, 6)
        return lambda: committed(recipe, table) >= wanted
    if stage == "train":
        return lambda: bool(list((recipe.parent / "run").glob("train-*/checkpoints/step-*")))
    return (recipe.parent / "run" / "logs" / "evaluate.log").exists


def kill_in_the_middle(recipe: Path, stage: str) -> None:
    """Run until a stage is at work, kill -9 the runner, and see the stage die."""
    runner, there = start(recipe), progress_of(recipe, stage)
    until(lambda: there() or runner.poll() is not None, stage)
    worker = ours(runner)
    os.killpg(runner.pid, signal.SIGKILL)
    runner.communicate()
    until(lambda: not any(w.is_running() and w.status() != psutil.STATUS_ZOMBIE for w in worker), "its death")


def contents(store: Path) -> Iterator[tuple[str, dict[bytes, dict[str, object]]]]:
    opened = Store.open(store)
    for table in TABLES:
        places: dict[str, list[int]] = {}
        for row in opened.index(table, ["key"]).to_pylist():
            places.setdefault(row["shard"], []).append(row["row"])
        rows = list(opened.rows(table, places))
        assert len({r["key"] for r in rows}) == len(rows)
        plain = {r["key"]: {k: v.tobytes() if hasattr(v, "tobytes") else v for k, v in r.items()} for r in rows}
        yield table, plain


def test_killed_in_every_stage_the_store_ends_as_if_undisturbed(recipe: Path, tmp_path: Path) -> None:
    for stage in ("data", "generate", "score", "train", "evaluate"):
        kill_in_the_middle(recipe, stage)
    disturbed = last_json(stillroom("run", recipe, "--json"))
    assert last_json(stillroom("verify", tmp_path / "store", "--json"))["ok"]
    lines = last_json(stillroom("plan", recipe, "--json"))["stages"]
    for line in lines.values():
        assert line["planned"] == line["committed"] + line["rejected"] + line["pending"]
        assert line["pending"] == 0

    words = [f"storage.dir={tmp_path}/store2", f"run.dir={tmp_path}/run2"]
    undisturbed = last_json(stillroom("run", recipe, "--json", *(w for o in words for w in ("--set", o))))
    assert dict(contents(tmp_path / "store")) == dict(contents(tmp_path / "store2"))
    for arm in ("teacher", "student_before"):
        assert disturbed["results"][arm] == undisturbed["results"][arm]
