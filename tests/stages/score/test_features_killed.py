"""Killed at every step of writing features, embeddings and targets, again and again.

Nothing is lost or there twice.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from forked import fork
from kit import prompts, recipe_tree, write_jsonl
from planting import rows_of
from running import contents
from tiny_classes import World
from tiny_images import Pictures, save_tiny_resnet
from tiny_jobs import done_until_score
from tiny_llama import save_tiny_llama
from tiny_masks import Hidden, save_tiny_masked, texts
from tiny_words import Words, save_tiny_tagger, tagged

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.ledger.features import find_embeddings
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.files.local import LocalFiles
from stillroom.storage.integrity.verify import verify
from stillroom.storage.store.store import Store

STEPS = 5
"""A process is killed at the link that is its first, ... or its fifth, before it or after."""


def score_until(recipe: Recipe, links: int, *, after: bool) -> int:
    """Do all stages in a process that is killed at so many links.

    Its exit code is returned, negative where it was killed.
    """

    def work() -> None:
        link, made = LocalFiles._link, []

        def counted(files: LocalFiles, temporary: Path, final: Path) -> None:
            made.append(1)
            if len(made) == links and not after:
                os.kill(os.getpid(), 9)
            link(files, temporary, final)
            if len(made) == links:
                os.kill(os.getpid(), 9)

        LocalFiles._link = counted  # type: ignore[method-assign]
        done_until_score(recipe)

    return os.waitstatus_to_exitcode(os.waitpid(fork(work), 0)[1])


def matrices_of(recipe: Recipe) -> set[str]:
    """Those that rows name, by which they alone can be read."""
    if not (Path(recipe.storage.dir) / "STORE.json").exists():
        return set()
    rows = rows_of(Store.open(recipe.storage.dir), "features")
    return {row["projection"] for row in rows} - {None}


@pytest.mark.slow
def test_killed_at_every_step_companions_end_whole(tmp_path: Path) -> None:
    teacher = save_tiny_llama(tmp_path / "teacher", num_hidden_layers=3)
    source = write_jsonl(tmp_path / "prompts.jsonl", prompts(12))
    features: list[dict[str, Any]] = [
        {"what": "hidden", "layers": [0, 2]},
        {"what": "values", "layers": [2], "project": 4},
        {"what": "embeddings"},
    ]
    tree = recipe_tree(
        tmp_path,
        teacher,
        source,
        storage={"dir": str(tmp_path / "store"), "commit_rows": 4},
        generate={"engine": "hf", "temperature": 1.0, "max_tokens": 6},
        score={"k": 4, "features": features},
    )
    recipe, kills, code = Recipe.model_validate(tree), 0, -9
    while code == -9:
        code = score_until(recipe, 2 + kills % STEPS, after=kills % 2 == 0)
        kills += code == -9
        for matrix_id in matrices_of(recipe):
            Store.open(recipe.storage.dir).matrix(matrix_id)
        assert kills < 60, "nothing goes on"
    assert (code, kills > 4) == (0, True)
    store = Store.open(tmp_path / "store")
    plan = make_plan(recipe)
    assert plan.line("score").state == "done"
    trained = {row["text_key"] for row in rows_of(store) if row["kind"] == "topk"}
    found = [(row["text_key"], row["kind"], row["layer"]) for row in rows_of(store, "features")]
    names = [("hidden", 0), ("hidden", 2), ("values_4", 2)]
    assert sorted(found) == sorted((text, *name) for text in trained for name in names)
    assert len(matrices_of(recipe)) == 1
    assert find_embeddings(store, plan.bound.binding.teacher_id, 16) is not None
    assert verify(store).ok


def of_words(folder: Path, **sections: Any) -> World:
    teacher = save_tiny_tagger(folder / "teacher")
    return Words(folder, teacher, tagged(16), **sections)


def of_hidden(folder: Path, **sections: Any) -> World:
    return Hidden(folder, save_tiny_masked(folder / "teacher"), texts(16), **sections)


def of_images(folder: Path, **sections: Any) -> World:
    return Pictures(folder, save_tiny_resnet(folder / "teacher"), 16, **sections)


@pytest.mark.slow
@pytest.mark.parametrize("world_of", [of_words, of_hidden, of_images])
def test_killed_at_every_step_targets_of_other_tasks_end_whole(
    tmp_path: Path, world_of: Callable[..., World]
) -> None:
    world = world_of(tmp_path)
    recipe = world.changed(storage={"dir": str(tmp_path / "store"), "commit_rows": 4})
    kills, code = 0, -9
    while code == -9:
        code = score_until(recipe, 2 + kills % 4, after=kills % 2 == 0)
        kills += code == -9
        assert kills < 40, "nothing goes on"
    assert (code, kills > 2) == (0, True)
    assert make_plan(recipe).line("score").state == "done"
    assert verify(Store.open(tmp_path / "store")).ok
    undisturbed = world.changed(storage={"dir": str(tmp_path / "other"), "commit_rows": 4})
    done_until_score(undisturbed)
    assert dict(contents(tmp_path / "store")) == dict(contents(tmp_path / "other"))
