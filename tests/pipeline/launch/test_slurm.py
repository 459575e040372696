"""The scripts of Slurm, run by bash with sbatch, scontrol, srun and Python in their places."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from running import until

# Each call is a line of JSON in $CALLS: the program's name and its words.
# Python does as $DOES says.
STUB = """#!{python}
import json, os, signal, sys, time
name, words = os.path.basename(sys.argv[0]), sys.argv[1:]
def note(**more):
    with open(os.environ["CALLS"], "a") as file:
        file.write(json.dumps({{"name": name, "words": words}} | more) + "\\n")
def heard(number, frame):
    note(signal=signal.Signals(number).name)
    sys.exit(int(os.environ.get("HEARD", 130)))
if name == "srun":
    os.execvp(words[0], words)
if name == "python":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, heard)
note()
if name == "sbatch":
    if "fails" in os.environ.get("DOES", ""):
        sys.exit("sbatch: error: invalid partition specified")
    print(
        101 + sum(json.loads(line)["name"] == "sbatch" for line in open(os.environ["CALLS"])),
        end=";here\\n",
    )
elif name == "python":
    does = os.environ.get("DOES", "0")
    if does == "waits":
        time.sleep(60)
    elif does == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(does))
"""
TASK = {"SLURM_JOB_ID": "77", "SLURM_ARRAY_JOB_ID": "70", "SLURM_ARRAY_TASK_ID": "3"}


@pytest.fixture
def calls(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], list[dict[str, Any]]]:
    """What was called so far; the stubs stand first on the PATH, and for this Python in scripts."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in ("sbatch", "scontrol", "srun", "python"):
        (folder / name).write_text(STUB.format(python=sys.executable))
        (folder / name).chmod(0o755)
    noted = tmp_path / "calls"
    noted.touch()
    monkeypatch.setenv("CALLS", str(noted))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setattr("stillroom.pipeline.launch.slurm.sys.executable", str(folder / "python"))
    return lambda: [json.loads(line) for line in noted.read_text().splitlines()]


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    return write_recipe(tmp_path, tiny_llama("teacher"), source)


def launched(recipe: Path, *words: object, expect: int = 0) -> subprocess.CompletedProcess[str]:
    return stillroom("launch", recipe, "--on", "slurm", *words, "--json", expect=expect)


def begun(recipe: Path, script: str, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        ["bash", recipe.parent / "run" / "launch" / script],
        env=os.environ | TASK | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_the_jobs_are_submitted_in_their_order_and_each_waits_for_the_one_before(
    recipe: Path, calls: Callable[[], list[dict[str, Any]]]
) -> None:
    hostile = "run.dir=" + str(recipe.parent / "it's $(touch owned) 100%")
    words = ("--workers", 4, "--gpus", 2, "--ranks", 8, "--nodes", 2, "--time", "1-00:00:00")
    words += ("--partition", "a,b", "--sbatch", "--account=x y", "--set", hostile)
    said = last_json(launched(recipe, *words))
    assert [job["job"] for job in said["jobs"]] == ["102", "103", "104"]
    first, second, third = (call["words"] for call in calls() if call["name"] == "sbatch")
    assert not any(word.startswith("--dependency") for word in first)
    for words_, before in ((second, 102), (third, 103)):
        assert f"--dependency=afterok:{before}" in words_
        assert "--kill-on-invalid-dep=yes" in words_
    folder = recipe.parent / "it's $(touch owned) 100%" / "launch"
    assert f"--output={folder}/workers-%A_%a.log".replace("100%", "100%%") in second
    assert third[-1] == f"{folder}/train.sh"
    options = {
        name: {x.removeprefix("#SBATCH ") for x in text.splitlines() if x.startswith("#SBATCH ")}
        for name in ("prompts", "workers", "train")
        for text in [(folder / f"{name}.sh").read_text()]
    }
    common = {"--partition=a,b", "--time=1-00:00:00", "--requeue", "--open-mode=append"}
    for found in options.values():
        assert found >= common | {"--account=x y"}
    assert options["workers"] >= {"--array=0-3", "--gres=gpu:2", "--signal=B:USR1@120"}
    assert options["train"] >= {"--nodes=2", "--ntasks-per-node=8", "--gres=gpu:8"}
    assert not any(option.startswith("--gres") for option in options["prompts"])

    # And bash gives each command the words that the command line had.
    for name in options:
        assert (
            subprocess.run(["bash", folder / f"{name}.sh"], env=os.environ | TASK).returncode == 0
        )
    given = ["-m", "stillroom", "run", str(recipe.resolve()), "--set", hostile]
    ran = [call["words"] for call in calls() if call["name"] == "python"]
    assert ran[0] == [*given, "--only", "data"]
    assert ran[1] == [*given, "--worker", "--until", "score"]
    assert ran[2] == ["-m", "stillroom", "train", *given[3:]]
    assert not list(Path.cwd().glob("owned*"))


def test_a_dry_run_prints_what_would_be_submitted_and_writes_nothing(
    recipe: Path, calls: Callable[[], list[dict[str, Any]]]
) -> None:
    before = sorted(recipe.parent.rglob("*"))
    words = ("--workers", 2, "--gpus", 0)
    dry = launched(recipe, *words, "--dry-run")
    assert sorted(recipe.parent.rglob("*")) == before
    assert not calls()
    launched(recipe, *words)
    texts = last_json(dry)["scripts"]
    written = {path.name: path.read_text() for path in (recipe.parent / "run/launch").iterdir()}
    assert written == texts
    assert all(text in dry.stdout for text in texts.values())
    assert "gres" not in str(texts)


@pytest.mark.parametrize(
    ("environment", "code", "requeued"),
    [
        ({"DOES": "0"}, 0, False),
        ({"DOES": "75"}, 75, True),
        ({"DOES": "1"}, 1, False),
        ({"DOES": "130"}, 130, False),
        ({"DOES": "killed"}, 75, True),
        ({"DOES": "killed", "SLURM_RESTART_COUNT": "3"}, 137, False),
    ],
)
@pytest.mark.parametrize("script", ["workers.sh", "train.sh"])
def test_a_job_that_was_stopped_or_killed_goes_back_into_the_queue(
    recipe: Path,
    calls: Callable[[], list[dict[str, Any]]],
    script: str,
    environment: dict[str, str],
    code: int,
    requeued: bool,
) -> None:
    launched(recipe, "--workers", 1)
    job = begun(recipe, script, **environment)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == code, said
    asked = [call["words"] for call in calls() if call["words"][:1] == ["requeue"]]
    assert asked == [["requeue", "70_3"]] * requeued


@pytest.mark.parametrize(
    ("sent", "passed", "requeued"),
    [(signal.SIGUSR1, "SIGTERM", True), (signal.SIGTERM, "SIGHUP", False)],
    ids=["time is nearly up", "Slurm ends the job"],
)
def test_a_signal_is_passed_on_and_waited_for(
    recipe: Path,
    calls: Callable[[], list[dict[str, Any]]],
    sent: signal.Signals,
    passed: str,
    requeued: bool,
) -> None:
    """A job that was cancelled must not come back."""
    launched(recipe, "--workers", 1)
    job = begun(recipe, "workers.sh", DOES="waits")
    until(lambda: any(call["name"] == "python" for call in calls()), "the worker")
    job.send_signal(sent)
    said, _ = job.communicate(timeout=60)
    assert job.returncode == (75 if requeued else 130), said
    found = calls()
    assert [call["signal"] for call in found if "signal" in call] == [passed]
    assert any(call["words"][:1] == ["requeue"] for call in found) == requeued


def test_what_is_done_is_not_submitted(
    recipe: Path, calls: Callable[[], list[dict[str, Any]]]
) -> None:
    """Nor is anything asked of it: neither how many workers, nor how many GPUs each has."""
    stillroom("run", recipe, "--until", "score")
    for words in ((), ("--workers", 1), ("--gpus", 2)):
        done = launched(recipe, *words)
        assert [job["name"] for job in last_json(done)["jobs"]] == ["train"]
        assert [f"{one}: not used" in done.stdout for one in ("--workers", "--gpus")] == [
            one in words for one in ("--workers", "--gpus")
        ]
    spread = ("--set", "teacher.device_map=auto", "--dry-run")
    assert list(last_json(launched(recipe, *spread))["scripts"]) == ["train.sh", "submit.sh"]
    ray = stillroom("launch", recipe, "--on", "ray", *spread).stdout
    assert "train (one actor" in ray
    assert "workers" not in ray
    for submitted in (call["words"] for call in calls() if call["name"] == "sbatch"):
        assert not any(word.startswith("--dependency") for word in submitted)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--workers", 1, "--partition", "a\nb"), "--partition"),
        (("--workers", 1, "--time", "soon"), "--time"),
        (("--workers", 1, "--time", "9:59"), "at least 10 minutes (got 9)"),
        (("--workers", 1, "--time", "0:09:30"), "at least 10 minutes (got 9)"),
        (("--workers", 1, "--sbatch", "account=x"), "--sbatch"),
        (("--workers", 1, "--sbatch", "--account=x\nrm -r ."), "--sbatch"),
        (("--workers", 1, "--sbatch", "--array=0-9"), "array"),
        (("--workers", 1, "--set", "run.dir=a\\b"), "run.dir"),
        ((), "--workers"),
        (("--workers", 1, "--set", "teacher.device_map=auto"), "--gpus"),
    ],
)
def test_what_slurm_would_read_otherwise_is_refused(
    recipe: Path, calls: Callable[[], list[dict[str, Any]]], words: tuple[object, ...], named: str
) -> None:
    before = sorted(recipe.parent.rglob("*"))
    assert named in launched(recipe, *words, expect=2).stderr
    assert not calls()
    assert sorted(recipe.parent.rglob("*")) == before


def test_a_refusal_of_slurm_is_told(
    recipe: Path, calls: Callable[[], list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOES", "fails")
    assert "invalid partition" in launched(recipe, "--workers", 1, expect=1).stderr


def test_where_no_slurm_is_it_says_so(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillroom.pipeline.launch.slurm.which", lambda name: None)
    assert "no sbatch" in launched(recipe, "--workers", 1, expect=2).stderr
