"""Stages are processes: one group at a time, and none outlives its runner.

A kill at any moment loses nothing.
"""

import io
import signal
import subprocess
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import psutil
import pytest
from kit import InThisProcess, last_json, prompts, stillroom, write_jsonl, write_recipe
from running import (
    PATIENCE,
    alive,
    at_worker_start,
    committed,
    contents,
    kill_in_the_middle,
    ours,
    start,
    start_whole,
    until,
)

from stillroom.pipeline.plan.resolve import teacher_identity
from stillroom.pipeline.run.crew import Crew, Worker
from stillroom.pipeline.run.posts import Post
from stillroom.pipeline.run.process import end_group, group_members
from stillroom.pipeline.run.progress import Meter
from stillroom.pipeline.run.screen import Screen
from stillroom.stages.models.identity import FileHashes
from stillroom.stages.recipe.load import load_recipe
from stillroom.storage.credentials import hidden
from stillroom.storage.errors import StillroomError, Stopped

pytestmark = pytest.mark.slow


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    teacher = tiny_llama("teacher", hidden_size=32)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(48))
    return write_recipe(
        tmp_path,
        teacher,
        source,
        storage={"dir": str(tmp_path / "store"), "commit_rows": 2},
        generate={
            "engine": "hf",
            "temperature": 0.0,
            "max_tokens": 12,
            "engine_args": {"batch_size": 2},
        },
        score={"k": 4},
        train={
            "epochs": 4,
            "tokens_per_step": 64,
            "learning_rate": 5.0e-3,
            "checkpoint_every_steps": 2,
        },
    )


def message_for(folder: Path, stage: str = "score", **more: Any) -> dict[str, Any]:
    message = {"name": stage, "recipe": {}, "log": str(folder / "log"), "hidden": hidden()}
    return message | {"train_dirs": {}, "job": {}, "journal": str(folder / "journal")} | more


def crew_of(folder: Path, stage: str = "score", *, workers: int = 1) -> Crew:
    posts = [Post(log=folder / f"log.{number}", environment={}) for number in range(workers)]
    message = message_for(folder, stage)
    return Crew(message, posts, run_dir=folder, screen=Screen(io.StringIO()))


def test_teacher_and_student_never_live_at_the_same_time(recipe: Path, tmp_path: Path) -> None:
    """Every stage here leaves a child behind, as an engine may."""
    stillroom("run", recipe, "--until", "generate")
    children = tmp_path / "children"
    code = f"""
        import subprocess
        child = subprocess.Popen(["sleep", "600"])
        open({str(children)!r}, "a").write(f"{{os.getpid()}} {{child.pid}}\\n")
    """
    site = at_worker_start(tmp_path / "site", code)
    runner = start(recipe, "--until", "train", PYTHONPATH=site)
    groups: list[int] = []

    def ended() -> bool:
        living = {w.pid for w in ours(runner)}
        assert len(living) <= 1
        for pid in living - set(groups):
            before = [group for group in groups if group_members(group)]
            assert not before, "the group before is still there"
            groups.append(pid)
        return runner.poll() is not None

    until(ended, "the end of the run")
    out, err = runner.communicate()
    assert runner.returncode == 0, err
    assert len(groups) == 2  # the teacher's, the student's
    assert '"train"' in out
    started = [[int(pid) for pid in line.split()] for line in children.read_text().splitlines()]
    assert [worker for worker, _ in started] == groups
    assert not any(
        psutil.pid_exists(child) and alive(psutil.Process(child)) for _, child in started
    )


def test_the_next_stage_waits_for_every_process_of_the_group(tmp_path: Path) -> None:
    """A stage may leave children behind (an engine's workers).

    They are gone before the next stage starts.
    """
    group = subprocess.Popen(["sh", "-c", "sleep 600 & sleep 600 & wait"], start_new_session=True)
    until(lambda: len(group_members(group.pid)) == 3, "the group")
    end_group(group.pid)
    assert group_members(group.pid) == []
    group.wait()
    end_group(group.pid)  # a group that is gone is no error


@pytest.mark.parametrize(
    ("begin", "number"),
    [(start_whole, signal.SIGTERM), (start, signal.SIGHUP)],
    ids=["TERM", "HUP"],
)
def test_the_first_signal_commits_what_is_finished_and_says_how_to_go_on(
    recipe: Path, begin: Callable[[Path], Any], number: int
) -> None:
    runner = begin(recipe)
    until(lambda: committed(recipe, "generations") >= 1, "a first commit")
    runner.send_signal(number)
    _, err = runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 130
    assert "Run the same command again" in err
    log = recipe.parent / "run" / "logs" / "generate.log"  # where the terminal is gone too
    assert "generate: stopped by a signal" in log.read_text()
    assert last_json(stillroom("verify", recipe.parent / "store", "--json"))["ok"]
    stillroom("run", recipe, "--until", "score")


def test_a_second_signal_leaves_at_once(recipe: Path) -> None:
    runner = start_whole(recipe)
    until((recipe.parent / "run" / "logs" / "generate.log").exists, "generate")
    worker = ours(runner)[0]
    worker.suspend()  # it cannot answer the first signal
    runner.send_signal(signal.SIGTERM)
    runner.send_signal(signal.SIGINT)
    runner.communicate(timeout=PATIENCE)
    assert runner.returncode == 130
    assert not alive(worker)


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
    with pytest.raises(StillroomError, match="The log has more"):
        crew_of(tmp_path).finish()


def test_a_stage_that_finishes_after_the_signal_is_stopped_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the runner would go on with the next stage as if no signal had come."""
    code = """
        import signal, socket
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        line = socket.socket(fileno=int(os.environ["STILLROOM_JOB_FD"]))
        line.makefile("r").readline()
        os.kill(os.getppid(), signal.SIGINT)
        signal.sigwait([signal.SIGTERM])
        line.sendall(b'{"rows": 1, "tokens": 1}\\n')
        os._exit(0)
    """
    monkeypatch.setenv("PYTHONPATH", at_worker_start(tmp_path / "site", code))
    crew = crew_of(tmp_path)
    with pytest.raises(Stopped, match="Run the same command again"):
        crew.finish()
    assert [group_members(group) for group in crew.groups] == [[]]


def test_a_terminal_that_ends_may_say_so_twice_and_the_stage_still_commits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shell and kernel both send SIGHUP; only another signal after it means at once."""
    code = f"""
        import signal, socket
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        line = socket.socket(fileno=int(os.environ["STILLROOM_JOB_FD"]))
        line.makefile("r").readline()
        os.kill(os.getppid(), signal.SIGHUP)
        signal.sigwait([signal.SIGTERM])
        for _ in range(100):
            os.kill(os.getppid(), signal.SIGHUP)
            os.sched_yield()
        open({str(tmp_path / "committed")!r}, "w").close()
        line.sendall(b'{{"rows": 1, "tokens": 1}}\\n')
        os._exit(0)
    """
    monkeypatch.setenv("PYTHONPATH", at_worker_start(tmp_path / "site", code))
    with pytest.raises(Stopped, match="Run the same command again"):
        crew_of(tmp_path).finish()
    assert (tmp_path / "committed").exists()


def test_after_a_signal_what_a_worker_had_done_when_it_left_is_still_shown(tmp_path: Path) -> None:
    crew, screen = crew_of(tmp_path, workers=2), Mock()
    crew._screen, crew._signals = screen, 1
    crew._living = [
        Worker(post=post, process=Mock(), journal=post.log, in_vain=(), meter=Meter())
        for post in crew._posts
    ]
    first, last = crew._living
    crew._hear(first, {"event": "at", "meter": asdict(Meter(total=9, done=3))})
    crew._living.remove(first)
    crew._end(first)
    crew._hear(last, {"event": "at", "meter": asdict(Meter(total=9, done=4))})
    assert screen.hear.call_args.args[0]["meter"]["done"] == 7


@pytest.mark.parametrize("said", ["", '{"rows": 3}\\n'])
def test_a_dead_stage_is_noticed_though_its_child_holds_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    code = f"""
        import signal
        line = int(os.environ["STILLROOM_JOB_FD"])
        if os.fork() == 0:
            signal.pause()
        os.read(line, 1 << 20)
        os.write(line, b'{said}')
        os._exit(7)
    """
    monkeypatch.setenv("PYTHONPATH", at_worker_start(tmp_path / "site", code))
    crew = crew_of(tmp_path)
    if said:
        assert crew.finish() == {"rows": 3}
    else:
        with pytest.raises(StillroomError, match="exit status 7"):
            crew.finish()
    assert [group_members(group) for group in crew.groups] == [[]]


def test_a_stage_that_dies_before_it_reads_its_job_is_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", at_worker_start(tmp_path / "site", "os._exit(7)"))
    with pytest.raises(StillroomError, match="exit status 7"):
        crew_of(tmp_path).finish()


@pytest.mark.parametrize(
    ("stage", "changed"), [("score", "teacher"), ("generate", "generate.model")]
)
def test_a_model_that_is_not_the_planned_one_is_not_loaded(
    recipe: Path, tmp_path: Path, tiny_llama: Callable[..., Path], stage: str, changed: str
) -> None:
    loaded = load_recipe(recipe, [f"generate.model={tiny_llama('author', seed=1)}"])
    teacher = teacher_identity(
        loaded, FileHashes(tmp_path / "store", remember=False), download=False
    )
    ids = {"teacher_id": "0" * 32 if changed == "teacher" else teacher.id, "author_id": "0" * 32}
    message = message_for(tmp_path, stage, recipe=loaded.model_dump(mode="json"), job=ids)
    process = InThisProcess(message | {"began": None}, {})
    process.listen(0)
    with pytest.raises(
        StillroomError, match=f"^{changed}: the files in .* changed since the plan was made"
    ):
        process.result()


def test_killed_in_every_stage_the_store_ends_as_if_undisturbed(
    recipe: Path, tmp_path: Path
) -> None:
    for stage in ("data", "generate", "score", "train", "evaluate"):
        kill_in_the_middle(recipe, stage)
    disturbed = last_json(stillroom("run", recipe, "--json"))
    assert last_json(stillroom("verify", tmp_path / "store", "--json"))["ok"]
    lines = last_json(stillroom("plan", recipe, "--json"))["stages"]
    for line in lines.values():
        assert line["planned"] == line["committed"] + line["rejected"] + line["pending"]
        assert line["pending"] == 0

    words = [f"storage.dir={tmp_path}/store2", f"run.dir={tmp_path}/run2"]
    undisturbed = last_json(
        stillroom("run", recipe, "--json", *(w for o in words for w in ("--set", o)))
    )
    assert dict(contents(tmp_path / "store")) == dict(contents(tmp_path / "store2"))
    for arm in ("teacher", "student_before"):
        assert disturbed["results"][arm] == undisturbed["results"][arm]
