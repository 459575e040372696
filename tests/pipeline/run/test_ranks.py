"""Ranks of one run: each on its own device, and all ended with the first that dies.

They are started again together.
"""

import os
import signal
from ast import literal_eval
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from loaded import Loaded
from meeting import on_two_gpus, with_faults
from running import PATIENCE, alive, end_started, ours, start, until
from tiny_images import STUDENT, save_tiny_resnet, write_folder
from tiny_llama import save_tiny_llama

from stillroom.pipeline.run.process import group_members

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture(scope="module")
def scored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A recipe whose stage one is done, once for all tests."""
    folder = tmp_path_factory.mktemp("scored")
    path = write_recipe(
        folder,
        save_tiny_llama(folder / "teacher"),
        write_jsonl(folder / "prompts.jsonl", prompts(12)),
        train={
            "epochs": 4,
            "tokens_per_step": 64,
            "learning_rate": 5.0e-3,
            "checkpoint_every_steps": 2,
        },
        compute={"processes": 2},
    )
    stillroom("run", path, "--until", "score")
    return path


@pytest.fixture
def recipe(scored: Path, tmp_path: Path) -> Path:
    """The same store, and a run's folder of its own."""
    path = tmp_path / "recipe.yaml"
    path.write_text(scored.read_text().replace(str(scored.parent / "run"), str(tmp_path / "run")))
    return path


def begin(
    recipe: Path, *words: str, before: Callable[[], None] = with_faults, **more: str
) -> Loaded:
    names = {"CUDA_VISIBLE_DEVICES": "", "STILLROOM_RANK_SECONDS": "60"} | more
    return start(recipe, "--only", "train", *words, before=before, **names)


def ended(process: Loaded, code: int = 0) -> str:
    """What it said."""
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, errors
    return errors


def folder(recipe: Path) -> Path:
    return next((recipe.parent / "run").glob("train-*"))


def seen(recipe: Path, rank: int) -> list[tuple[int, dict[str, Any]]]:
    """Process and environment of a rank, each time that it started."""
    lines = (folder(recipe) / f"rank-{rank}").read_text().splitlines()
    return [(int(pid), literal_eval(rest)) for pid, rest in (line.split(" ", 1) for line in lines)]


def none_lives(recipe: Path) -> bool:
    pids = [pid for rank in (0, 1) for pid, _ in seen(recipe, rank)]
    return not any(group_members(pid) for pid in pids)


def test_each_rank_sees_its_own_device_and_all_are_shown_as_one(recipe: Path) -> None:
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-a1,GPU-b2"}
    words = ("--set", "compute.processes=auto")
    errors = ended(begin(recipe, *words, before=on_two_gpus, **visible))
    assert "train: 2 processes together on this machine, on GPUs GPU-a1 | GPU-b2" in errors
    assert errors.count("loading the student") == 1, "what one says is said once"
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1"}
    for rank, gpu in enumerate(("GPU-a1", "GPU-b2")):
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "CUDA_VISIBLE_DEVICES": gpu}
        [(_, environment)] = seen(recipe, rank)
        assert environment == common | own
    logs = {path.name for path in (recipe.parent / "run" / "logs").glob("train*")}
    assert logs == {"train.log", "train.2.log"}
    assert none_lives(recipe)
    again = last_json(stillroom("run", recipe, "--only", "train", "--json"))
    assert again["stages"]["train"]["state"] == "cached"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_all_and_all_go_on_from_the_checkpoint(
    recipe: Path, rank: int
) -> None:
    errors = ended(begin(recipe, FAULT=f"kill:{rank}:5"))
    assert f"train: the process of rank {rank} died (exit status -9" in errors
    assert errors.count("all 2 processes start again from the last checkpoint") == 1
    assert "peer" not in errors, "the other one only lost it"
    assert len(seen(recipe, 0)) == len(seen(recipe, 1)) == 2
    assert none_lives(recipe)


@pytest.mark.parametrize(
    ("fault", "code", "said"),
    [
        ("kill", 0, "train: the process of rank 0 died (exit status -9"),
        ("wait", 0, "hangs: its process has computed nothing, and the others have waited"),
        ("error", 2, "error: checkpoint: holds something else"),
    ],
)
def test_a_fault_of_a_rank_that_loads_is_told_while_the_other_waits_for_its_turn(
    recipe: Path, fault: str, code: int, said: str
) -> None:
    words = ("--set", "compute.sharding=fsdp2")
    more = {"FAULT": f"{fault}:0:0", "STILLROOM_RANK_SECONDS": "8"}
    errors = ended(begin(recipe, *words, **more), code)
    assert errors.count(said) == (2 if fault == "wait" else 1)  # as it is seen, and as it ends all
    assert errors.count("start again from the last checkpoint") == (code == 0)
    assert none_lives(recipe)


def test_three_starts_without_a_new_checkpoint_are_given_up(recipe: Path) -> None:
    errors = ended(begin(recipe, FAULT="kill!:1:5"), 1)
    assert errors.count("start again") == 2
    assert "error: train: the process of rank 1 died (exit status -9" in errors
    assert none_lives(recipe)


def test_a_rank_that_hangs_is_named_and_all_start_again(recipe: Path) -> None:
    errors = ended(begin(recipe, FAULT="stop:1:5", STILLROOM_RANK_SECONDS="3"))
    (stopped, _), _ = seen(recipe, 1)
    assert f"rank 1 (process {stopped} on " in errors
    assert "hangs: its process has shown no sign of life" in errors
    assert errors.count("start again from the last checkpoint") == 1
    assert none_lives(recipe)


def test_the_error_of_one_rank_is_shown_once_and_ends_all(recipe: Path) -> None:
    errors = ended(begin(recipe, FAULT="error:1:5"), 2)
    assert errors.count("checkpoint: holds something else") == 1
    assert "start again" not in errors
    assert none_lives(recipe)


def test_memory_that_is_too_small_is_no_death_in_vain_while_passes_shrink(recipe: Path) -> None:
    errors = ended(begin(recipe, FAULT="memory!:1:1"))
    assert errors.count("all 2 processes start again") == 3, "256, 128, 64"


@pytest.mark.parametrize(
    ("environment", "code"),
    [({}, 130), ({"SLURM_JOB_ID": "7"}, 75)],
)
def test_a_signal_to_the_run_stops_all_at_the_same_step_with_a_checkpoint(
    recipe: Path, environment: dict[str, str], code: int
) -> None:
    run, ranks = waiting(recipe, **environment)
    run.send_signal(signal.SIGTERM)
    assert "Run the same command again" in ended(run, code) or code == 75
    assert not any(map(alive, ranks))
    assert [path.name for path in (folder(recipe) / "checkpoints").iterdir()] == ["step-00000005"]


def waiting(recipe: Path, **environment: str) -> tuple[Loaded, list[psutil.Process]]:
    """A run whose rank 1 waits after step 5 for a signal, and rank 0 for rank 1."""
    run = begin(recipe, FAULT="wait:1:5", **environment)
    until((recipe.parent / "run" / "waits").exists, "its step")
    ranks = ours(run)
    assert len(ranks) == 2
    return run, ranks


def test_a_signal_to_one_rank_stops_all(recipe: Path) -> None:
    run, ranks = waiting(recipe)
    os.kill(seen(recipe, 1)[0][0], signal.SIGTERM)
    assert "Run the same command again" in ended(run, 130)
    assert not any(map(alive, ranks))
    assert [path.name for path in (folder(recipe) / "checkpoints").iterdir()] == ["step-00000005"]


def test_the_second_signal_ends_all_at_once(recipe: Path) -> None:
    run, ranks = waiting(recipe)
    for rank in ranks:
        rank.suspend()  # they cannot answer the first
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGINT)
    ended(run, 130)
    assert not any(map(alive, ranks))


def test_more_processes_than_gpus_are_refused_by_name(recipe: Path) -> None:
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-a1,GPU-b2"}
    words = ("--set", "compute.processes=3")
    errors = ended(begin(recipe, *words, before=on_two_gpus, **visible), 2)
    assert "compute.processes: 3 processes were asked for" in errors
    assert "2 GPUs are visible (GPU-a1, GPU-b2)" in errors


def test_a_student_with_batch_norms_is_one_process_s_where_nobody_asked_for_more(
    tmp_path: Path,
) -> None:
    source = write_folder(tmp_path / "pictures", 12)
    sections: dict[str, Any] = {
        "run": {"dir": str(tmp_path / "run"), "task": "image_classification"},
        "data": {"source": str(source), "format": "images", "holdout": 2},
        "student": {"config": STUDENT},
        "generate": None,
        "score": {"targets": "full"},
        "loss": {"temperature": 2.0, "hard_weight": 0.5},
        "train": {"epochs": 1, "tokens_per_step": 5},
        "compute": {"workers": 1},
    }
    recipe = write_recipe(tmp_path, save_tiny_resnet(tmp_path / "teacher"), source, **sections)
    several = ("--set", "compute.processes=2")
    slurm = ("launch", recipe, "--on", "slurm", "--workers", 1, "--ranks", 2, "--dry-run")
    for words in (("plan", recipe, *several), slurm):
        assert "is a batch norm, whose statistics" in stillroom(*words, expect=2).stderr
    vit = "student.config={model_type: vit, hidden_size: 8, num_attention_heads: 2, patch_size: 4}"
    stillroom("plan", recipe, *several, "--set", vit)
    stillroom("run", recipe, "--until", "score")
    errors = ended(begin(recipe, before=on_two_gpus, CUDA_VISIBLE_DEVICES="GPU-a1,GPU-b2"))
    assert "train: one process does it alone" in errors
    assert [len(seen(recipe, rank)) for rank in (0, 1)] == [2, 1]
    (folder(recipe) / "train.json").unlink()  # the same again, where it is known
    errors = ended(begin(recipe, before=on_two_gpus, CUDA_VISIBLE_DEVICES="GPU-a1,GPU-b2"))
    assert "train: one process does it alone" in errors
    assert "train: 2 processes together" not in errors
    assert [len(seen(recipe, rank)) for rank in (0, 1)] == [3, 1]
    assert none_lives(recipe)
