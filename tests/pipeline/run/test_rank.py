"""One rank under a launcher: who it is, by torchrun's names or Slurm's.

The whole of stage two is also done with another rank.
"""

import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import loaded
import pytest
from kit import ENVIRONMENT, prompts, stillroom, write_jsonl, write_recipe
from loaded import Loaded
from meeting import with_faults
from running import PATIENCE, STARTED, end_started, until

from stillroom.pipeline.run import rank
from stillroom.pipeline.run.rank import launched, lost_in_words
from stillroom.stages.workers.ranks import Ranks, free_port
from stillroom.stages.workers.watch import Lost
from stillroom.storage.errors import Noticed, StillroomError, Stopped, UsageError
from stillroom.storage.store.stopping import stopped_by

STEP = {
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "3",
    "SLURM_NTASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_JOB_ID": "40007",
    "SLURM_JOB_NODELIST": "n[7-8]",
}
MEETING = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}


def test_a_step_of_slurm_says_who_a_rank_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[7-8]" ] && printf "n7\\nn8\\n"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    who = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}
    assert launched(STEP) == who | {"MASTER_ADDR": "n7", "MASTER_PORT": "20007"}
    assert launched(STEP | MEETING) == who | MEETING
    # What srun has not started is no rank: the script of a job; a job of one task is alone.
    assert launched({k: v for k, v in STEP.items() if k != "SLURM_STEP_ID"}) == {}
    assert launched(STEP | {"SLURM_NTASKS": "1"}) == {}
    monkeypatch.setattr(rank.subprocess, "run", missing)
    with pytest.raises(UsageError, match=r"does not say which host is the first .*Set MASTER_ADDR"):
        launched(STEP)


def missing(*_: Any, **__: Any) -> None:
    raise FileNotFoundError("scontrol")


def test_what_a_launcher_has_not_said_is_named() -> None:
    assert launched({}) == launched({"RANK": "0", "WORLD_SIZE": "1"}) == {}
    assert launched({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MEETING) == {}
    with pytest.raises(UsageError, match=r"has no LOCAL_RANK, MASTER_ADDR, MASTER_PORT,.*unset"):
        launched({"RANK": "1", "WORLD_SIZE": "2"})
    with pytest.raises(UsageError, match=r"has no RANK, "):
        launched({"WORLD_SIZE": "2", "LOCAL_RANK": "1"} | MEETING)
    with pytest.raises(UsageError, match="has no SLURM_LOCALID, SLURM_JOB_NODELIST,"):
        launched(
            {k: v for k, v in STEP.items() if k not in ("SLURM_LOCALID", "SLURM_JOB_NODELIST")}
        )


def test_a_notice_of_a_scheduler_asks_for_another_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "STILLROOM_REQUEUE"):
        monkeypatch.delenv(name, raising=False)
    assert type(stopped_by(signal.SIGTERM)) is Stopped
    monkeypatch.setenv("STILLROOM_REQUEUE", "1")
    assert stopped_by(signal.SIGTERM).exit_code == Noticed.exit_code == 75
    assert stopped_by(signal.SIGINT).exit_code == 130


def test_a_rank_that_another_one_is_lost_to_says_so() -> None:
    ranks = Ranks(rank=1, count=2)
    with (
        pytest.raises(StillroomError, match=r"^train: rank 0 hangs\.$") as told,
        lost_in_words(ranks),
    ):
        raise Lost("rank 0 hangs")
    assert told.value.exit_code == 1
    for other in (UsageError("data: is wrong"), ValueError("a mistake")):
        with pytest.raises(type(other), match=str(other)), lost_in_words(ranks):
            raise other


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    return write_recipe(tmp_path, tiny_llama("teacher"), source)


def pair(recipe: Path, **more: str) -> list[Loaded]:
    """Both ranks of two, as a launcher starts them."""
    port = str(free_port())
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    common |= {"CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"} | more
    for number in ("0", "1"):
        own = {"RANK": number, "LOCAL_RANK": number}
        words = ["train", recipe, "--json"]
        STARTED.append(loaded.start(words, recipe.parent, ENVIRONMENT | common | own, with_faults))
    return STARTED[-2:]  # type: ignore[return-value]


def said(processes: list[Loaded]) -> list[tuple[int | None, str, str]]:
    """Exit code, output and errors of each."""
    found = [process.communicate(timeout=PATIENCE) for process in processes]
    return [(p.returncode, *texts) for p, texts in zip(processes, found, strict=True)]


@pytest.mark.slow
def test_two_ranks_do_stage_two_once_stage_one_is_done(recipe: Path, tmp_path: Path) -> None:
    (code, out, errors), (other, nothing, silent) = said(pair(recipe))
    assert (code, other, nothing, silent) == (2, 2, "", ""), "said once"
    assert "train: stage one is not done: data has 12 of 12 rows to do" in errors
    assert "Run `stillroom run RECIPE --until score` first" in errors
    assert json.loads(out)["exit_code"] == 2
    assert not any((tmp_path / name).exists() for name in ("run", "store")), "refused: nothing left"

    stillroom("run", recipe, "--until", "score")
    (code, out, errors), (other, nothing, _) = said(pair(recipe))
    assert (code, other, nothing) == (0, 0, ""), errors
    outcome = json.loads(out.splitlines()[-1])
    assert {name: line["state"] for name, line in outcome["stages"].items()} == {
        "train": "done",
        "evaluate": "done",
    }
    assert (tmp_path / "run" / "report.html").exists()
    assert (tmp_path / "run" / "latest" / "student" / "README.md").exists()
    assert {path.name for path in (tmp_path / "run" / "logs").glob("train*")} == {
        "train.log",
        "train.2.log",
    }
    # `run`, on one process, finds it all done; a rank alone does the same again.
    again = json.loads(stillroom("run", recipe, "--json").stdout.splitlines()[-1])
    assert {line["state"] for line in again["stages"].values()} == {"cached"}
    shutil.rmtree(next((tmp_path / "run").glob("train-*")))
    alone = json.loads(stillroom("train", recipe, "--json").stdout.splitlines()[-1])
    assert alone["results"]["student"] == pytest.approx(outcome["results"]["student"], rel=1e-3)


@pytest.mark.slow
def test_the_error_of_one_rank_ends_both_and_a_signal_is_agreed_on(recipe: Path) -> None:
    stillroom("run", recipe, "--until", "score")
    first, second = said(pair(recipe, FAULT="error:1:2"))
    assert second[0] == 2
    assert "checkpoint: holds something else" in second[2]
    assert first[0] == 1
    assert "holds something else" not in first[2]

    both = pair(recipe, SLURM_JOB_ID="7", FAULT="wait!:0:2")
    until((recipe.parent / "run" / "waits").exists, "a step")
    both[0].send_signal(signal.SIGTERM)
    assert [code for code, _, _ in said(both)] == [75, 75]
    assert list((recipe.parent / "run").glob("train-*/checkpoints/*/state.json"))
