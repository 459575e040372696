"""Students from sources.

Of a published folder alone they are the same to the bit; of other stores, only the rest is made.
"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl
from tiny_jobs import done_until_score
from tiny_llama import save_tiny_llama
from tiny_store import SilentProgress

from stillroom.pipeline.plan.plan import make_plan
from stillroom.pipeline.plan.resolve import write_down
from stillroom.pipeline.publish.export import PublishRequest, export
from stillroom.pipeline.run import runner
from stillroom.pipeline.run.jobs import stage_message
from stillroom.stages.data import stage as data
from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.score import stage as score
from stillroom.stages.train import stage as train
from stillroom.stages.workers.job import Job, StopFlag
from stillroom.storage.errors import UsageError
from stillroom.storage.files.base import file_sha256
from stillroom.storage.integrity.verify import verify
from stillroom.storage.joined import open_store
from stillroom.storage.snapshots.snapshot import save_snapshot
from stillroom.storage.store.store import Store

TRAIN = {"epochs": 2, "tokens_per_step": 128, "learning_rate": 5e-3, "evaluate_every_tokens": 400}


class Made:
    """A recipe whose teacher wrote and scored, with its trained student and published rows."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.teacher = save_tiny_llama(folder / "teacher", hidden_size=32, intermediate_size=64)
        self.source = write_jsonl(
            folder / "prompts.jsonl", [{**p, "reference": "the cat"} for p in prompts(40)]
        )
        self.tree = recipe_tree(
            folder, self.teacher, self.source, train=TRAIN | {"validation_prompts": 3}
        )
        self.tree["generate"]["temperature"] = 1.0
        recipe = Recipe.model_validate(self.tree)
        self.store, _ = done_until_score(recipe)
        self.plan = make_plan(recipe, write=True)
        write_down(recipe, self.plan.bound.binding)
        for snapshot in self.plan.snapshots.values():
            save_snapshot(self.store, snapshot)
        self.published = folder / "published"
        export(
            PublishRequest(store=str(self.store.root), license="cc0-1.0"),
            self.published,
            say=lambda text: None,
        )
        self.student = trained(recipe, folder / "original")

    def recipe(self, folder: Path, *sources: Path, **changes: Any) -> Recipe:
        """The same, with an empty store and sources."""
        tree = self.tree | {"run": {"dir": str(folder / "run")}}
        tree["storage"] = {
            "dir": str(folder / "store"),
            "commit_rows": 8,
            "sources": [str(s) for s in sources],
        }
        for name, section in changes.items():
            tree[name] = None if section is None else tree.get(name, {}) | section
        return Recipe.model_validate(
            {name: section for name, section in tree.items() if section is not None}
        )


def trained(recipe: Recipe, folder: Path) -> bytes:
    """The weights of the recipe's student, trained in this process."""
    store = Store.open(recipe.storage.dir, create=True)
    plan = make_plan(recipe, write=True)
    ids: dict[str, Any] = {
        "teacher_id": plan.bound.binding.teacher_id,
        "data_id": plan.bound.binding.data_id,
    }
    snapshots = {split: snapshot.id for split, snapshot in plan.snapshots.items()}
    for snapshot in plan.snapshots.values():
        save_snapshot(store, snapshot)
    progress, stop = SilentProgress(), StopFlag()
    train.run(
        Job(
            recipe=recipe,
            progress=progress,
            stop=stop,
            train_dirs={"student": folder},
            snapshots=snapshots,
            **ids,
        )
    )
    return (folder / "student" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


@pytest.fixture
def gone(made: Made) -> Any:
    """Teacher, prompts and the original store are not there."""
    hidden = made.folder / "hidden"
    hidden.mkdir()
    for path in (made.teacher, made.source, Path(made.store.root)):
        path.rename(hidden / path.name)
    yield made
    for path in hidden.iterdir():
        path.rename(made.folder / path.name)
    hidden.rmdir()


def job_of(recipe: Recipe) -> tuple[Job, Any]:
    """The job of the stages of the recipe's teacher, who is here, and that teacher.

    The recipe's own store is made.
    """
    store = Store.open(recipe.storage.dir, create=True)
    bound = make_plan(recipe, write=True).bound
    assert bound.teacher is not None
    store.put_teacher(bound.teacher.id, bound.teacher.files_to_keep())
    b = bound.binding
    ids = {"data_id": b.data_id, "teacher_id": b.teacher_id, "author_id": b.author_id}
    job = Job(
        recipe=recipe,
        progress=SilentProgress(),
        stop=StopFlag(),
        context_tokens=b.context_tokens,
        **ids,
    )
    return job, bound.teacher


def books(recipe: Recipe) -> dict[str, tuple[str, int, int, dict[str, int]]]:
    plan = make_plan(recipe)
    return {s.name: (s.state, s.committed, s.pending, s.sources) for s in plan.stages}


@pytest.mark.slow
def test_a_student_from_the_published_folder_alone_is_the_same_to_the_bit(
    gone: Made, tmp_path: Path
) -> None:
    """The real command runs the same recipe: only where store and run are is another."""
    recipe = gone.recipe(tmp_path, gone.published)
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.model_dump(mode="json", exclude_none=True)))
    done = last_json(stillroom("run", path, "--json", "--only", "train"))
    folder = tmp_path / "run" / "latest"
    assert done["stages"]["train"]["state"] == "done"
    assert folder.resolve().name == gone.plan.train_dirs["student"].name
    assert (folder / "student" / "model.safetensors").read_bytes() == gone.student
    assert verify(Store.open(tmp_path / "store")).ok
    found = books(recipe)
    assert [found[name][0] for name in ("data", "generate", "score", "train")] == ["done"] * 4
    assert found["score"][3] == {str(gone.published): 40}
    assert found["evaluate"][:3] == ("to do", 0, 4)


def test_a_folder_is_named_as_teacher_and_data(gone: Made, tmp_path: Path) -> None:
    """Who did not make the folder needs no name but its own, and no settings of the text."""
    name = str(gone.published)
    named = {"teacher": {"model": name}, "data": {"source": name}, "generate": None}
    recipe = gone.recipe(tmp_path, gone.published, **named)
    found = make_plan(recipe)
    assert {split: s.id for split, s in found.snapshots.items()} == {
        s: x.id for s, x in gone.plan.snapshots.items()
    }
    assert trained(recipe, tmp_path / "student") == gone.student
    # What it does not hold, nobody can make.
    assert books(gone.recipe(tmp_path, gone.published, **named, score={"k": 2}))["score"][:3] == (
        "done",
        40,
        0,
    )
    assert books(gone.recipe(tmp_path, gone.published, **named, score={"k": 9}))["score"][:3] == (
        "to do",
        4,
        36,
    )
    warmer = named | {"generate": {"temperature": 0.5}}
    other = gone.recipe(tmp_path, gone.published, **warmer)
    assert books(other)["generate"][:3] == ("to do", 0, 40)
    with pytest.raises(
        UsageError, match=r"^score: there is work to do .*but teacher or data are not here"
    ):
        runner.run(gone.recipe(tmp_path, gone.published, **named, score={"k": 9}), quiet=True)
    with pytest.raises(
        UsageError, match=r"^generate: 40 published from other settings.*Leave the section out"
    ):
        runner.run(other, quiet=True)
    for impossible, says in (
        (named | {"score": {"k": 9}}, "score: there is work to do"),
        (warmer, "generate: 40 "),
    ):
        path = tmp_path / "impossible.yaml"
        tree = gone.recipe(tmp_path, gone.published, **impossible).model_dump(
            mode="json", exclude_none=True
        )
        path.write_text(yaml.safe_dump(tree))
        assert f"error: {says}" in stillroom("plan", path, expect=2).stderr, "as `run` would"
    # `evaluate.tokens` and `select.where` choose among what is there.
    assert (
        books(gone.recipe(tmp_path, gone.published, **named, evaluate={"tokens": 1}))["evaluate"][2]
        == 1
    )
    short = gone.recipe(
        tmp_path, gone.published, **named, select={"where": "completion_tokens < 8"}
    )
    assert 0 < books(short)["score"][1] < 40


def test_stages_open_the_commit_that_was_planned_with(made: Made, tmp_path: Path) -> None:
    recipe = made.recipe(tmp_path, made.published, Path("hf://datasets/a/b"))
    name = recipe.storage.sources[1] = "hf://datasets/a/b"
    plan = replace(made.plan, sources={name: f"{name}@0123/v-89abcdef"})
    told = stage_message(recipe, plan, "evaluate")
    assert told["recipe"]["storage"]["sources"] == [
        str(made.published),
        "hf://datasets/a/b@0123",
    ]
    assert recipe.storage.sources[1] == name


def test_without_its_names_a_missing_teacher_is_missed(gone: Made, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"teacher\.model: no folder"):
        make_plan(gone.recipe(tmp_path, gone.published, teacher={"dtype": "bfloat16"}))


def test_references_come_with_the_published_text(gone: Made, tmp_path: Path) -> None:
    from stillroom.stages.evaluate.held_out import HeldOut
    from stillroom.stages.evaluate.quiz.answers import prepare_quiz

    recipe = gone.recipe(
        tmp_path, gone.published, evaluate={"tokens": 200, "generate": {"prompts": 3}}
    )
    plan = make_plan(recipe)
    store = open_store(recipe.storage.dir, recipe.storage.sources)
    b = plan.bound.binding
    ids = {"teacher_id": b.teacher_id, "author_id": b.author_id, "data_id": b.data_id}
    job = Job(recipe=recipe, progress=SilentProgress(), stop=StopFlag(), **ids)
    quiz = prepare_quiz(job, store, HeldOut(store, plan.snapshots["test"], clock=job.clock).spans())
    assert [question.reference for question in quiz.questions] == ["the cat"] * 3


def test_with_the_teacher_only_what_is_missing_is_made(made: Made, tmp_path: Path) -> None:
    """Rows of another store and a published folder are reused, and the rest is made here."""
    sources = {"store": Path(made.store.root), "folder": made.published}
    before = {
        path: file_sha256(path) for s in sources.values() for path in s.rglob("*") if path.is_file()
    }
    for name, source in sources.items():
        recipe = made.recipe(tmp_path / name, source)
        if (
            name == "folder"
        ):  # prompts are not published as the source had them: they are read again
            assert books(recipe)["data"] == ("to do", 0, 40, {})
            data.run(job_of(recipe)[0])
        assert [line[0] for line in books(recipe).values()][:3] == ["done"] * 3, name
        assert (
            books(recipe)["generate"]
            == books(recipe)["score"]
            == ("done", 40, 0, {str(source): 40})
        ), name
        assert make_plan(recipe).snapshots["train"].id == made.plan.snapshots["train"].id, name
    recipe = made.recipe(tmp_path / "more", sources["store"], score={"k": 6})
    assert books(recipe)["score"] == ("to do", 4, 36, {str(sources["store"]): 4})
    score.run(*job_of(recipe))
    assert books(recipe)["score"] == ("done", 40, 0, {str(sources["store"]): 4})
    assert Store.open(recipe.storage.dir).index("soft_targets", ["key"]).num_rows == 36
    assert trained(recipe, tmp_path / "student") != made.student
    assert {
        path: file_sha256(path) for s in sources.values() for path in s.rglob("*") if path.is_file()
    } == before


def test_a_store_that_another_recipe_filled_is_named_as_teacher_and_data(
    made: Made, tmp_path: Path
) -> None:
    name = str(made.store.root)
    recipe = made.recipe(tmp_path, Path(name), teacher={"model": name}, data={"source": name})
    assert make_plan(recipe).snapshots["train"].id == made.plan.snapshots["train"].id
    with pytest.raises(UsageError, match=r"generate: missing: .* is a store"):
        make_plan(
            made.recipe(
                tmp_path, Path(name), teacher={"model": name}, data={"source": name}, generate=None
            )
        )
    two = shutil.copytree(name, tmp_path / "two")
    other = made.recipe(tmp_path, data={"holdout": 5})
    write_down(
        other.model_copy(update={"storage": other.storage.model_copy(update={"dir": str(two)})}),
        make_plan(other).bound.binding,
    )
    with pytest.raises(
        UsageError, match="a store with 2 pairs of a teacher and its data, expected one"
    ):
        make_plan(
            made.recipe(tmp_path, two, teacher={"model": str(two)}, data={"source": str(two)})
        )


def test_published_text_alone_is_learned_from(made: Made, tmp_path: Path) -> None:
    """Black box: the snapshots are of generations."""
    copy = shutil.copytree(made.store.root, tmp_path / "store")
    recipe = made.recipe(tmp_path, score=None)
    original = make_plan(recipe).snapshots
    for snapshot in original.values():
        save_snapshot(Store.open(copy), snapshot)
    folder = tmp_path / "text"
    export(
        PublishRequest(store=str(copy), license="cc0-1.0", snapshot=original["train"].id),
        folder,
        say=lambda text: None,
    )
    named = {
        "teacher": {"model": str(folder)},
        "data": {"source": str(folder)},
        "generate": None,
        "score": None,
    }
    alone = make_plan(made.recipe(tmp_path / "alone", folder, **named))
    assert {split: s.id for split, s in alone.snapshots.items()} == {
        split: s.id for split, s in original.items()
    }
    assert {s.table for s in alone.snapshots.values()} == {"generations"}
    assert books(made.recipe(tmp_path / "soft", folder, **named | {"score": {"k": 4}}))["score"][
        :3
    ] == ("to do", 0, 40)
    # Text that was published with targets is text too.
    named = {
        name: section and dict.fromkeys(section, str(made.published))
        for name, section in named.items()
    }
    beside = make_plan(made.recipe(tmp_path / "beside", made.published, **named)).snapshots
    assert {s.table for s in beside.values()} == {"generations"}
    assert {split: s.rows for split, s in beside.items()} == {
        split: s.rows for split, s in original.items()
    }
    opened = open_store(tmp_path / "none", [str(made.published)])
    for split, snapshot in beside.items():
        keys = (
            {
                r["key"]
                for s in found.shards
                for r in at.rows("generations", {s.sha256: s.rows}, ["key"])
            }
            for found, at in ((snapshot, opened), (original[split], made.store))
        )
        assert len(set(map(frozenset, keys))) == 1


def test_stores_are_named_in_pairs_and_once(made: Made, tmp_path: Path) -> None:
    def refused(message: str, **sections: Any) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(made.tree | sections))
        with pytest.raises(UsageError, match=message):
            load_recipe(path)

    storage = {"dir": "store", "sources": ["other"]}
    refused(r"teacher\.model: names a store", storage=storage, teacher={"model": "other"})
    refused(
        r"data\.source: names a store",
        storage=storage,
        data={"source": "store", "format": "prompt"},
    )
    for path, value in (
        ("teacher.dtype", "bfloat16"),
        ("data.limit", 3),
        ("data.turns", "last"),
        ("data.columns", {"prompt": "p"}),
    ):
        section, field = path.split(".")
        named: dict[str, Any] = {
            "teacher": {"model": "other"},
            "data": {"source": "other", "format": "prompt"},
        }
        named[section][field] = value
        refused(
            rf"{path}: has no meaning where other is teacher and data", storage=storage, **named
        )
    refused(
        r"storage\.sources: other is named twice",
        storage={"dir": "store", "sources": ["other", "other"]},
    )
