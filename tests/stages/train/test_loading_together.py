"""Ranks that share a student load it one after another on a machine, and end up with its parts."""

from pathlib import Path
from typing import Any

import pytest
from loading import Loaded, loaded_by, most_on, prints
from tiny_llama import save_tiny_llama
from tiny_store import make_recipe, make_store, random_texts
from together import together

from stillroom.stages.models.students.student import initial_student
from stillroom.stages.recipe.sections import Recipe
from stillroom.stages.train.together.choice import asked_for, chosen
from stillroom.stages.workers.ranks import Ranks

pytestmark = pytest.mark.numeric

MACHINES = "abaa"
LORA = {"rank": 2, "target_modules": ["q_proj", "down_proj"]}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Recipe]]:
    """A teacher, and students of each kind."""
    folder = tmp_path_factory.mktemp("loading")
    wide = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 4}
    teacher = save_tiny_llama(folder / "teacher", **wide)
    tied = save_tiny_llama(folder / "tied", tie_word_embeddings=True, **wide)
    store = make_store(folder / "store", teacher, texts=random_texts(4))

    def recipe(sharding: str = "fsdp2", **student: Any) -> Recipe:
        return make_recipe(
            store, teacher, student=student, train={"tokens": 10}, compute={"sharding": sharding}
        )

    return teacher, {
        "fresh": recipe(config={"num_hidden_layers": 3}),
        "model, tied": recipe(model=str(tied)),
        "lora": recipe(model=str(teacher), lora=LORA),
        "layers of the teacher": recipe(from_teacher_layers=[0, 2]),
        "ddp": recipe("ddp", model=str(teacher)),
    }


@pytest.fixture(scope="module")
def seen(
    world: tuple[Path, dict[str, Recipe]], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[Loaded]]:
    """What each of four ranks on two machines saw."""
    teacher, recipes = world
    met = tmp_path_factory.mktemp("met")
    found = together(loaded_by, list(recipes.values()), teacher, met, MACHINES, ranks=4)
    return {name: list(of) for name, of in zip(recipes, zip(*found, strict=True), strict=True)}


def test_a_machine_holds_the_whole_student_once(seen: dict[str, list[Loaded]]) -> None:
    for name, ranks in seen.items():
        whole = ranks[0].whole
        share = max(one.held[-1][1] for one in ranks)
        if name == "ddp":
            assert share == whole
            continue
        assert whole / 4 <= share < 1.2 * whole / 4, name
        assert whole < most_on("a", MACHINES, ranks) <= whole + 2 * share, name
        assert most_on("b", MACHINES, ranks) == whole, name


def test_parts_are_of_the_student_that_one_process_makes(
    world: tuple[Path, dict[str, Recipe]], seen: dict[str, list[Loaded]]
) -> None:
    teacher, recipes = world
    for name, recipe in recipes.items():
        right = prints(initial_student(recipe, teacher))
        assert len(right) > 10
        assert all(one.prints == right for one in seen[name]), name


def test_where_its_size_decides_the_first_rank_alone_looks(
    world: tuple[Path, dict[str, Recipe]],
) -> None:
    teacher, recipes = world
    two = Ranks(count=2)
    assert [asked_for("auto", ranks, 10) for ranks in (Ranks(), two)] == ["ddp", None]
    assert [asked_for(how, two, 10) for how in ("ddp", "fsdp2")] == ["ddp", "fsdp2"]
    assert asked_for("auto", two, None) == "ddp"
    student, train = initial_student(recipes["fresh"], teacher), recipes["fresh"].train
    assert train is not None
    held = [chosen(student, train, two, free, half=False) for free in (10**5, 10**9)]
    assert held == ["fsdp2", "ddp"]
