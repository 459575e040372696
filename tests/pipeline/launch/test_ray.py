"""Actors of Ray: a worker that is killed is replaced, and its command ends with it.

A signal lets all commit.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import psutil
import pytest
from kit import ENVIRONMENT, command, last_json, prompts, stillroom, write_jsonl, write_recipe
from running import alive, at_worker_start, committed, until

from stillroom.pipeline.launch.ray_worker import RayWorker
from stillroom.storage.store.store import Store

ROWS = 60
PATIENCE = 500.0  # Ray starts a dozen processes, each of which imports it


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    """Stage one alone."""
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(ROWS))
    generate = {"engine": "hf", "temperature": 0.0, "max_tokens": 12}
    return write_recipe(
        tmp_path,
        tiny_llama("teacher", eos_token_id=None),
        source,
        generate=generate | {"engine_args": {"batch_size": 4}},
        **dict.fromkeys(("student", "score", "loss", "train", "evaluate")),
    )


def started(recipe: Path, workers: int, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command("launch", recipe, "--on", "ray", "--workers", workers, "--gpus", 0, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT | {"HOME": str(recipe.parent / "home")} | environment,
        start_new_session=True,
    )


def commands(recipe: Path) -> list[psutil.Process]:
    """Processes of the recipe's workers: what an actor has started."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if "--worker" in words and str(recipe.resolve()) in words and "-c" not in words:
            found.append(process)
    return found


def listening(pid: int) -> list[str]:
    """Addresses at which anything below a process can be reached."""
    return [
        connection.laddr.ip.removeprefix("::ffff:")  # of IPv4, as IPv6 writes it
        for process in psutil.Process(pid).children(recursive=True)
        if alive(process)
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_worker_that_is_lost_is_replaced_and_all_is_there_once(
    recipe: Path, tmp_path: Path
) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'stillroom[ray]')")
    (tmp_path / "home").mkdir()
    slow = at_worker_start(
        tmp_path / "site",
        """
        import time
        from stillroom.stages.engines.hf import HfEngine
        completion = HfEngine._completion
        def slowly(self, *arguments):
            time.sleep(0.2)
            return completion(self, *arguments)
        HfEngine._completion = slowly
        """,
    )
    launch = started(recipe, 2, PYTHONPATH=slow)
    try:
        until(lambda: committed(recipe, "generations") >= 1, "rows", patience=PATIENCE)
        assert set(listening(launch.pid)) == {"127.0.0.1"}
        victim = commands(recipe)[0]
        actor = victim.parent()
        assert actor is not None
        actor.kill()
        until(lambda: not alive(victim), "the end of what the actor had started")
        out, err = launch.communicate(timeout=PATIENCE)
    finally:
        os.killpg(launch.pid, signal.SIGKILL) if launch.poll() is None else None
    assert launch.returncode == 0, err
    said = json.loads(out.splitlines()[-1])
    assert [(job["name"], job["lost"]) for job in said["jobs"]] == [("prompts", 0), ("workers", 1)]
    keys = Store.open(tmp_path / "store").index("generations", ["key"])["key"].to_pylist()
    assert len(keys) == len(set(keys)) > ROWS // 2
    assert last_json(stillroom("verify", tmp_path / "store", "--json"))["ok"]
    assert not list((tmp_path / "home").glob(".ray*"))


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_signal_lets_the_workers_commit_and_leave(recipe: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed (pip install 'stillroom[ray]')")
    (tmp_path / "home").mkdir()
    launch = started(recipe, 1)
    try:
        until(lambda: bool(commands(recipe)), "a worker", patience=PATIENCE)
        os.killpg(launch.pid, signal.SIGINT)  # as a terminal sends it
        _, err = launch.communicate(timeout=PATIENCE)
    finally:
        os.killpg(launch.pid, signal.SIGKILL) if launch.poll() is None else None
    assert launch.returncode == 130, err
    assert not commands(recipe)


def test_a_command_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Without Ray: an actor's process is killed, and what it had started hears of it."""
    code = (
        "import sys; sys.executable = sys.argv[1]\n"
        "from stillroom.pipeline.launch.ray_worker import RayWorker\n"
        "RayWorker().run([sys.argv[2]], '/', {})\n"
    )
    pid = tmp_path / "pid"
    stub = tmp_path / "python"
    stub.write_text(
        f"#!{sys.executable}\n"
        "import os, signal, sys, time\n"
        "if sys.argv[1] == '-c':\n"
        f"    os.execv({sys.executable!r}, ['python', *sys.argv[1:]])\n"
        "def leave(*_):\n"
        "    open(sys.argv[-1] + '.heard', 'w').close()\n"
        "    sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, leave)\n"
        "open(sys.argv[-1], 'w').write(str(os.getpid()))\n"
        "time.sleep(120)\n"
    )
    stub.chmod(0o755)
    actor = subprocess.Popen([sys.executable, "-c", code, str(stub), str(pid)], env=ENVIRONMENT)
    until(lambda: pid.exists() and bool(pid.read_text()), "the command")
    process = psutil.Process(int(pid.read_text()))
    actor.kill()
    actor.wait()
    until(lambda: not alive(process), "its end")
    assert pid.with_suffix(".heard").exists()


def test_an_actor_that_was_stopped_before_it_began_starts_nothing() -> None:
    worker = RayWorker()
    worker.stop()
    with patch("subprocess.Popen", side_effect=AssertionError):
        assert worker.run(["run"], "/", {}) == (130, "")


def test_without_ray_it_says_how_to_install_it(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "stillroom[ray]" in stillroom("launch", recipe, "--on", "ray", expect=2).stderr


def test_a_dry_run_names_the_actors_and_writes_nothing(recipe: Path) -> None:
    before = sorted(recipe.parent.rglob("*"))
    words = ("--on", "ray", "--workers", 3, "--gpus", 0, "--dry-run")
    said = stillroom("launch", recipe, *words).stdout
    assert "actors: 3" in said
    assert f"stillroom run {recipe.resolve()} --worker --until score" in said
    assert sorted(recipe.parent.rglob("*")) == before


def test_what_ray_does_not_know_is_refused(recipe: Path) -> None:
    said = stillroom("launch", recipe, "--on", "ray", "--partition", "gpu", expect=2).stderr
    assert "--partition" in said
    assert "--on" in stillroom("launch", recipe, "--on", "yarn", expect=2).stderr
