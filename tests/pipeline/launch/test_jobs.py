"""Which jobs a run is, by what its plan says is to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kit import recipe_tree

from stillroom.pipeline.launch.jobs import Launch, gpus_each, jobs
from stillroom.pipeline.launch.ray_cluster import _places
from stillroom.pipeline.launch.slurm import Asked
from stillroom.pipeline.plan.lines import Plan, StagePlan, State
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import UsageError

ENDPOINT = {"engine": "openai", "base_url": "http://127.0.0.1:1/v1", "model": "m", "max_tokens": 8}


def launch(tmp_path: Path, states: dict[str, State], **sections: Any) -> Launch:
    recipe = Recipe.model_validate(recipe_tree(tmp_path, tmp_path, tmp_path / "p", **sections))
    lines = [StagePlan(name=name, state=state) for name, state in states.items()]
    plan = Plan(bound=None, write=False, stages=lines)  # type: ignore[arg-type]
    return Launch(path=Path("r.yaml"), recipe=recipe, plan=plan)


TO_DO: dict[str, State] = {
    "data": "to do",
    "generate": "to do",
    "score": "waits",
    "train": "waits",
    "evaluate": "waits",
}


def test_an_endpoint_is_asked_by_one_process_whose_budget_it_is(tmp_path: Path) -> None:
    first, workers, _ = jobs(launch(tmp_path, TO_DO, generate=ENDPOINT), training=("run",))
    assert first.stages == ("data", "generate")
    assert first.words[-2:] == ("--until", "generate")
    assert workers.stages == ("score",)


@pytest.mark.parametrize(
    ("done", "left"),
    [
        ((), ["prompts", "workers", "train"]),
        (("data",), ["workers", "train"]),
        (("data", "generate"), ["workers", "train"]),
        (("data", "generate", "score"), ["train"]),
        (("data", "generate", "score", "train"), ["train"]),
        (tuple(TO_DO), []),
    ],
)
def test_a_job_whose_stages_are_all_done_is_left_out(
    tmp_path: Path, done: tuple[str, ...], left: list[str]
) -> None:
    states = TO_DO | {name: "done" for name in done}
    assert [job.name for job in jobs(launch(tmp_path, states), training=("run",))] == left


def test_a_worker_has_the_gpus_that_its_engine_needs(tmp_path: Path) -> None:
    four = {"engine": "vllm", "max_tokens": 8, "engine_args": {"tensor_parallel_size": 4}}
    assert gpus_each(launch(tmp_path, TO_DO, generate=four).recipe, None) == 4
    assert gpus_each(launch(tmp_path, TO_DO, generate=four).recipe, 8) == 8
    assert gpus_each(launch(tmp_path, TO_DO, generate=four).recipe, 0) == 0, "on CPUs"
    with pytest.raises(UsageError, match=r"--gpus: 2, but .* needs 4\."):
        gpus_each(launch(tmp_path, TO_DO, generate=four).recipe, 2)
    assert gpus_each(launch(tmp_path, TO_DO).recipe, None) == 1


@pytest.mark.parametrize(
    ("there", "asked", "found"),
    [
        ({"prompts", "workers"}, Asked(ranks=8), (4, 1, 0)),
        ({"train"}, Asked(gpus=8), (0, 0, 4)),
        ({"train"}, Asked(gpus=0), (0, 0, 0)),
        ({"workers", "train"}, Asked(gpus=2, ranks=4), (2, 2, 4)),
        ({"workers", "train"}, Asked(ranks=8), "the training is to have 8 GPUs"),
        ({"workers"}, Asked(gpus=8), "a worker is to have 8 GPUs"),
    ],
)
def test_a_cluster_is_asked_for_what_the_jobs_that_are_there_need(
    tmp_path: Path, there: set[str], asked: Asked, found: tuple[int, int, int] | str
) -> None:
    nodes = [{"Alive": True, "Resources": {"CPU": 16.0, "GPU": 4.0}}]
    ray = SimpleNamespace(nodes=lambda: nodes)
    opening = launch(tmp_path, TO_DO)
    if isinstance(found, str):
        with pytest.raises(UsageError, match=found):
            _places(ray, opening, asked, there)
    else:
        places = _places(ray, opening, asked, there)
        workers = places.workers if "workers" in there else 0
        assert (workers, places.gpus, places.ranks) == found
