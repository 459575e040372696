"""Several teachers in a recipe: what cannot work together is refused by name.

One plain entry is as `teacher`.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from kit import recipe_tree

from stillroom.pipeline.publish.provenance import public_recipe
from stillroom.stages.recipe.load import load_recipe, recorded
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import UsageError

FADING = {"shape": "linear", "start": 1.0, "end": 0.0}


def written(folder: Path, teachers: list[dict[str, Any]], **sections: Any) -> Path:
    tree = recipe_tree(folder, folder / "teacher", folder / "prompts.jsonl", **sections)
    del tree["teacher"]
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree | {"teachers": teachers}))
    return path


def two(folder: Path, first: dict[str, Any], second: dict[str, Any]) -> list[dict[str, Any]]:
    return [
        {"name": name, "model": str(folder / name)} | more
        for name, more in (("a", first), ("b", second))
    ]


@pytest.mark.parametrize(
    ("second", "sections", "expected"),
    [
        ({"name": "a"}, {}, "teachers: 2 of them are named 'a'"),
        ({"name": "../up"}, {}, "teachers.1.name: string should match pattern"),
        ({"weigth": 2}, {}, "teachers.1.weigth: unknown key. Did you mean 'weight'?"),
        (
            {"device_map": "auto"},
            {"score": {"k": 4, "engine": "vllm"}},
            "teachers.1.device_map: belongs to engine 'hf'",
        ),
        ({"budget_tokens": 0}, {}, "teachers.1.budget_tokens: must be at least 1"),
        ({}, {"score": None}, "teachers: several teach by their distributions"),
        ({}, {"loss": {"teachers": "mixture"}}, "a mixture is not exact of 'topk' targets"),
        (
            {},
            {
                "loss": {"teachers": "mixture", "temperature": 2.0},
                "score": {"targets": "sampled", "rounds": 8, "temperatures": [2.0]},
            },
            "loss.teachers: draws are of softened distributions",
        ),
        (
            {},
            {
                "loss": {"teacher_weights": "entropy", "temperature": 2.0},
                "score": {"targets": "sampled", "rounds": 8, "temperatures": [2.0]},
            },
            "loss.teacher_weights: weighs by the entropy at temperature 1, and draws at another",
        ),
        (
            {},
            {"loss": {"teacher_weights": "entropy"}, "score": {"k": 4, "engine": "vllm"}},
            "loss.teacher_weights: weighs by the entropy, of which the best entries of engine "
            "'vllm'",
        ),
        (
            {"weight": FADING},
            {"loss": {"teacher_weights": "entropy"}},
            "teachers.1.weight: is 0 at some time, and teacher_weights 'entropy' divides",
        ),
        (
            {"weight": 0},
            {"loss": {"teachers": "mixture"}, "score": {"targets": "full"}},
            "teachers.1.weight: is 0 throughout, and mixture divides",
        ),
        (
            {},
            {
                "score": {"features": [{"what": "hidden", "layers": [0]}]},
                "loss": {"features": [{"match": "hidden"}]},
            },
            "loss.features: features are matched of one teacher, and this recipe has several",
        ),
        (
            {},
            {"train": {"epochs": 1, "snapshot": "0123"}},
            "train.snapshot: a snapshot holds the rows of one teacher",
        ),
    ],
)
def test_what_cannot_work_is_refused_by_name(
    tmp_path: Path, second: dict[str, Any], sections: dict[str, Any], expected: str
) -> None:
    path = written(tmp_path, two(tmp_path, {}, second), **sections)
    with pytest.raises(UsageError) as caught:
        load_recipe(path)
    assert expected in str(caught.value)


def test_a_mistake_in_the_first_teacher_is_said_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError) as caught:
        load_recipe(written(tmp_path, two(tmp_path, {"dtype": "int4"}, {})))
    assert len(str(caught.value).splitlines()) == 1
    assert "teachers.0.dtype: must be one of" in str(caught.value)


def test_a_store_stands_for_no_teacher_among_several(tmp_path: Path) -> None:
    teachers = two(tmp_path, {}, {"model": str(tmp_path / "store")})
    with pytest.raises(UsageError, match=r"teachers\.1\.model: names a store"):
        load_recipe(written(tmp_path, teachers))


@pytest.mark.parametrize("name", ["teachers", "teacher_weights"])
def test_one_teacher_has_no_use_for_what_several_have(tmp_path: Path, name: str) -> None:
    tree = recipe_tree(tmp_path, tmp_path / "a", tmp_path / "x", loss={})
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(tree))
    value = {"teachers": "mixture", "teacher_weights": "entropy"}[name]
    with pytest.raises(UsageError, match=f"loss.{name}: belongs to several teachers"):
        load_recipe(path, [f"loss.{name}={value}"])


def test_one_plain_entry_is_as_teacher(tmp_path: Path) -> None:
    plain = load_recipe(written(tmp_path, two(tmp_path, {}, {})[:1]))
    assert plain.several == []
    assert plain.teacher.model == str(tmp_path / "a")
    (routed,) = load_recipe(written(tmp_path, two(tmp_path, {"where": "true"}, {})[:1])).several
    assert routed.alone == plain.teacher


def test_a_recipe_is_the_same_after_its_record_and_on_its_way_to_a_stage(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path, two(tmp_path, {"weight": 2}, {"where": "true"})))
    assert Recipe.model_validate(recorded(recipe)) == recipe
    sent = recipe.model_dump(mode="json", exclude_unset=True)
    assert Recipe.model_validate(sent) == recipe
    alone = recipe.of_teacher(recipe.several[1])
    sent = alone.model_dump(mode="json", exclude_unset=True)
    assert Recipe.model_validate(sent).several == [recipe.several[1]]
    assert "dtype" not in sent["teacher"]


def test_records_keep_variables_and_cards_show_no_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MODELS_OF_THE_TESTS", str(tmp_path / "of-nobody-else"))
    teachers = two(tmp_path, {"model": "${MODELS_OF_THE_TESTS}/a"}, {})
    recipe = load_recipe(written(tmp_path, teachers))
    assert recipe.several[0].model == str(tmp_path / "of-nobody-else" / "a")
    assert recorded(recipe)["teachers"][0]["model"] == "${MODELS_OF_THE_TESTS}/a"
    shown = public_recipe(recorded(recipe))
    assert shown["teachers"][1]["model"] == "b"


def test_editors_ask_for_one_of_the_two() -> None:
    schema = Recipe.model_json_schema()
    assert "teacher" not in schema["required"]
    assert schema["anyOf"] == [{"required": ["teacher"]}, {"required": ["teachers"]}]
