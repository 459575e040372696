"""Several workers of one run, each on its own devices.

They make the same student as one does, and none is left behind at any end.
"""

import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from loaded import Loaded
from running import (
    PATIENCE,
    alive,
    at_worker_start,
    committed,
    contents,
    end_started,
    ours,
    start,
    two_gpus,
    until,
)

from stillroom.pipeline.plan.plan import make_plan
from stillroom.pipeline.run.process import group_members
from stillroom.stages.recipe.load import load_recipe
from stillroom.storage.snapshots.reader import SnapshotReader
from stillroom.storage.store.store import Store

pytestmark = pytest.mark.slow
ROWS = 48


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    end_started()


@pytest.fixture
def recipe(tmp_path: Path, tiny_llama: Callable[..., Path]) -> Path:
    return write_recipe(
        tmp_path,
        tiny_llama("teacher", eos_token_id=None),
        write_jsonl(tmp_path / "prompts.jsonl", prompts(ROWS)),
        storage={"dir": str(tmp_path / "store"), "commit_rows": 4},
        generate={
            "engine": "hf",
            "temperature": 0.0,
            "max_tokens": 12,
            "engine_args": {"batch_size": 4},
        },
        score={"k": 4},
        compute={"workers": 2},
    )


def noted(folder: Path, more: str = "pass", *, opened: str = "pass") -> str:
    """PYTHONPATH of workers that note what they see.

    They begin when two of their stage have loaded.

    `opened` is done by one that has opened its engine then, `more` before each row that it has
    written.
    """
    return at_worker_start(
        folder,
        f"""
        import signal, time
        from pathlib import Path
        from stillroom.stages.engines.hf import HfEngine
        from stillroom.stages.score import causal_lm
        folder = Path({str(folder)!r})
        def together(stage):
            seen = os.environ["CUDA_VISIBLE_DEVICES"]
            (folder / f"{{stage}}-{{os.getpid()}}").write_text(seen)
            while len(list(folder.glob(f"{{stage}}-*"))) < 2:
                time.sleep(0.01)
        opened, loaded = HfEngine.__init__, causal_lm.load_causal_lm
        def open_engine(self, *arguments):
            opened(self, *arguments)
            together("generate")
            {opened}
        def load(*arguments, **named):
            model = loaded(*arguments, **named)
            together("score")
            return model
        HfEngine.__init__, causal_lm.load_causal_lm = open_engine, load
        completion = HfEngine._completion
        def complete(self, request, *arguments):
            with open(folder / "made", "a") as file:
                file.write(f"{{request.seed}}\\n")
            {more}
            return completion(self, request, *arguments)
        HfEngine._completion = complete
        """,
    )


def ended(process: Loaded, code: int = 0) -> str:
    """What it said."""
    _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == code, errors
    return errors


def shares(store: Path, table: str) -> Counter[str]:
    rows: Counter[str] = Counter()
    for commit in Store.open(store).commits(table):
        rows[commit.writer] += commit.shard.rows
    return rows


def order(recipe: Path, *words: str) -> tuple[list[bytes], str]:
    """The keys of the first two epochs, and where the student is."""
    loaded = load_recipe(recipe, list(words))
    plan = make_plan(loaded)
    snapshot = plan.snapshots["train"]
    reader = SnapshotReader(Store.open(loaded.storage.dir), snapshot, ["key"])
    keys = [row["key"] for row in reader.samples(seed=0, stop=2 * snapshot.rows)]
    return keys, str(plan.train_dirs["student"] / "student" / "model.safetensors")


def test_two_workers_give_what_one_gives_bit_for_bit_each_on_its_own_device(
    recipe: Path, tmp_path: Path
) -> None:
    site = noted(tmp_path / "seen")
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-a1,GPU-b2", "PYTHONPATH": site}
    # Two ranks would train as one within rounding, not to the bit.
    auto = ("compute.workers=auto", "compute.processes=1")
    words = [word for setting in auto for word in ("--set", setting)]
    errors = ended(start(recipe, "--until", "train", *words, before=two_gpus, **visible))
    for stage in ("generate", "score"):
        seen = [path.read_text() for path in (tmp_path / "seen").glob(f"{stage}-*")]
        assert sorted(seen) == ["GPU-a1", "GPU-b2"], stage
        assert f"{stage}: 2 workers side by side on this machine, on GPUs GPU-a1 | GPU-b2" in errors
    logs = {path.name for path in (tmp_path / "run" / "logs").iterdir()}
    assert logs >= {"generate.log", "generate.2.log", "score.log", "score.2.log"}
    assert len(shares(tmp_path / "store", "generations")) == 2
    assert len(shares(tmp_path / "store", "soft_targets")) == 2

    other = [f"storage.dir={tmp_path}/store2", f"run.dir={tmp_path}/run2", "compute.workers=1"]
    stillroom("run", recipe, "--until", "train", *(w for one in other for w in ("--set", one)))
    assert dict(contents(tmp_path / "store")) == dict(contents(tmp_path / "store2"))
    (keys, student), (keys_of_one, student_of_one) = order(recipe, *auto), order(recipe, *other)
    assert keys == keys_of_one
    assert len(set(keys)) == len(keys) // 2 > 0
    assert Path(student).read_bytes() == Path(student_of_one).read_bytes()
    states = last_json(stillroom("plan", recipe, "--set", "compute.workers=3", "--json"))["stages"]
    assert states.pop("evaluate")["state"] == "to do"
    assert {line["state"] for line in states.values()} == {"done"}, "it is in no hash"


def test_a_worker_that_is_killed_is_replaced_and_every_row_is_there_once(
    recipe: Path, tmp_path: Path
) -> None:
    stillroom("run", recipe, "--only", "data")
    once = f"""
            first = not os.path.exists({str(tmp_path / "killed")!r})
            if first and len(list(folder.glob("generate-*"))) == 2:
                open({str(tmp_path / "killed")!r}, "x").close()
                os.kill(os.getpid(), signal.SIGKILL)
    """
    site = noted(tmp_path / "seen", once.strip())
    run = start(recipe, "--only", "generate", CUDA_VISIBLE_DEVICES="", PYTHONPATH=site)
    errors = ended(run)
    assert errors.count("its process died (exit status -9") == 1
    assert errors.count("generate: starts again") == 1
    assert len(list((tmp_path / "seen").glob("generate-*"))) == 3
    line = last_json(stillroom("plan", recipe, "--json"))["stages"]["generate"]
    assert (line["planned"], line["committed"], line["rejected"]) == (ROWS, ROWS, 0)
    assert sum(shares(tmp_path / "store", "generations").values()) == ROWS
    assert last_json(stillroom("verify", tmp_path / "store", "--json"))["ok"]
    assert not list((tmp_path / "run" / "logs").glob("*.inflight"))


def started(recipe: Path, tmp_path: Path) -> tuple[Loaded, list[psutil.Process]]:
    """A run whose two workers are in the midst of their work.

    They write no more until they are told to stop.
    """
    stillroom("run", recipe, "--only", "data")
    wait = f"""
            waits = {str(recipe)!r} + ".wait"
            while len((folder / "made").read_text().split()) > 8 and os.path.exists(waits):
                time.sleep(0.01)
    """
    Path(f"{recipe}.wait").touch()
    site = noted(tmp_path / "seen", wait.strip())
    runner = start(recipe, "--only", "generate", CUDA_VISIBLE_DEVICES="", PYTHONPATH=site)
    made = tmp_path / "seen" / "made"
    until(lambda: made.exists() and len(made.read_text().split()) > 8, "rows in flight")
    workers = ours(runner)
    assert len(workers) == 2
    return runner, workers


def test_workers_die_with_their_runner(recipe: Path, tmp_path: Path) -> None:
    runner, workers = started(recipe, tmp_path)
    os.kill(runner.pid, signal.SIGKILL)
    until(lambda: not any(map(alive, workers)), "the workers' death")


def test_the_first_signal_makes_all_commit_and_leave(recipe: Path, tmp_path: Path) -> None:
    runner, workers = started(recipe, tmp_path)
    before = committed(recipe, "generations")
    Path(f"{recipe}.wait").unlink()
    runner.send_signal(signal.SIGTERM)
    assert "Run the same command again" in ended(runner, 130)
    assert not any(map(alive, workers))
    for name in ("generate.log", "generate.2.log"):
        log = tmp_path / "run" / "logs" / name
        assert "generate: stopped by a signal" in log.read_text(), name
    assert not list((tmp_path / "run" / "logs").glob("*.inflight"))
    assert committed(recipe, "generations") > before
    assert last_json(stillroom("verify", tmp_path / "store", "--json"))["ok"]


def test_the_second_signal_leaves_at_once(recipe: Path, tmp_path: Path) -> None:
    runner, workers = started(recipe, tmp_path)
    for worker in workers:
        worker.suspend()  # they cannot answer the first
    runner.send_signal(signal.SIGTERM)
    runner.send_signal(signal.SIGINT)
    ended(runner, 130)
    assert not any(map(alive, workers))


def test_one_that_fails_ends_the_stage_and_the_other_leaves_in_peace(
    recipe: Path, tmp_path: Path
) -> None:
    stillroom("run", recipe, "--only", "data")
    last = 'os.getpid() == max(int(path.name[9:]) for path in folder.glob("generate-*"))'
    site = noted(tmp_path / "seen", opened=f'if {last}: raise RuntimeError("no such device")')
    runner = start(recipe, "--only", "generate", CUDA_VISIBLE_DEVICES="", PYTHONPATH=site)
    errors = ended(runner, 1)
    assert errors.count("RuntimeError: no such device") == 1
    assert "The log has more" in errors
    assert not list((tmp_path / "run" / "logs").glob("*.inflight"))
    stillroom("run", recipe, "--only", "generate")


def test_a_device_on_which_nothing_works_costs_a_worker_and_no_row(
    recipe: Path, tmp_path: Path
) -> None:
    """It dies again and again with rows in flight; the other one does them all."""
    stillroom("run", recipe, "--only", "data")
    dies = """
            if os.environ["CUDA_VISIBLE_DEVICES"] == "GPU-b2":
                (folder / f"dead-{os.getpid()}").touch()
                os.kill(os.getpid(), signal.SIGKILL)
            while len(list(folder.glob("dead-*"))) < 3:
                time.sleep(0.01)
    """
    site = noted(tmp_path / "seen", dies.strip())
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-a1,GPU-b2", "PYTHONPATH": site}
    errors = ended(start(recipe, "--only", "generate", before=two_gpus, **visible))
    assert errors.count("starts again") == 2
    assert errors.count("goes on without this worker") == 1
    line = last_json(stillroom("plan", recipe, "--json"))["stages"]["generate"]
    assert (line["committed"], line["rejected"]) == (ROWS, 0)
    assert not list((tmp_path / "run" / "logs").glob("*.inflight"))


def test_all_teachers_have_ended_before_a_student_begins(recipe: Path, tmp_path: Path) -> None:
    """Every process here leaves a child behind, as an engine may."""
    stillroom("run", recipe, "--until", "generate")
    code = 'import subprocess\nsubprocess.Popen(["sleep", "600"])'
    site = at_worker_start(tmp_path / "site", code)
    runner = start(recipe, "--until", "train", CUDA_VISIBLE_DEVICES="", PYTHONPATH=site)
    groups: list[int] = []

    def over() -> bool:
        living = {worker.pid for worker in ours(runner)}
        assert len(living) <= 2
        for pid in living - set(groups):
            if len(groups) >= 2:
                assert not [g for g in groups if group_members(g)], "the teacher's are still there"
            groups.append(pid)
        return runner.poll() is not None

    until(over, "the end of the run")
    ended(runner)
    assert len(groups) == 3, "two that score, one that trains"
    assert not any(map(group_members, groups))


def facts(recipe: Path) -> dict[str, Any]:
    return last_json(stillroom("status", recipe, "--json"))


def test_status_counts_those_at_work(recipe: Path, tmp_path: Path) -> None:
    runner, _ = started(recipe, tmp_path)
    assert facts(recipe)["workers"] == 2
    Path(f"{recipe}.wait").unlink()
    ended(runner)
    assert facts(recipe)["workers"] == 0


def test_a_worker_is_one_with_the_devices_that_are_visible(recipe: Path, tmp_path: Path) -> None:
    stillroom("run", recipe, "--only", "data")
    site = noted(tmp_path / "seen", "pass")
    words = ("--only", "generate", "--worker")
    visible = {"CUDA_VISIBLE_DEVICES": "GPU-a1,GPU-b2", "PYTHONPATH": site}
    pair = [start(recipe, *words, before=two_gpus, **visible) for _ in range(2)]
    assert not ["side by side" for process in pair if "side by side" in ended(process)]
    seen = [path.read_text() for path in (tmp_path / "seen").glob("generate-*")]
    assert seen == ["GPU-a1,GPU-b2"] * 2
