"""What a recipe's names stood for is kept by number.

A number that is lost does not stop the next.
"""

from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, prompts, recipe_tree, stillroom, write_jsonl, write_recipe

from stillroom.pipeline.plan.resolve import bind, write_down
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.store.bindings import Binding
from stillroom.storage.store.store import Store


def test_a_lost_binding_leaves_no_hole_to_fall_into(tmp_path: Path) -> None:
    recipe = Recipe.model_validate(
        recipe_tree(tmp_path, tmp_path / "teacher", tmp_path / "prompts")
    )
    Store.open(tmp_path / "store", create=True)
    ids: dict[str, Any] = {
        "teacher_id": "t",
        "author_id": "a",
        "vocab_size": 9,
        "context_tokens": 9,
    }
    bindings = [Binding(**ids, author_context_tokens=9, data_id=data) for data in "xyz"]
    for binding in bindings[:2]:
        write_down(recipe, binding)
    (first, _) = sorted(tmp_path.glob("store/bindings/*/*.json"))
    first.unlink()
    write_down(recipe, bindings[2])
    assert [path.stem for path in sorted(first.parent.iterdir())] == ["00000001", "00000002"]


@pytest.mark.parametrize("reads", [True, False])
def test_a_template_that_reads_the_clock_keeps_its_day(
    tiny_llama: Callable[..., Path], tmp_path: Path, reads: bool
) -> None:
    teacher = tiny_llama()
    clock = "{{ strftime_now('%d') }}" if reads else ""
    (teacher / "chat_template.jinja").write_text(clock + "{{ messages[0].content }}")
    records = [{"instruction": "the cat", "output": record["prompt"]} for record in prompts(6)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    tree = recipe_tree(tmp_path, teacher, source, generate=None)
    tree["data"] = {"source": str(source), "format": "instruction"}
    recipe = Recipe.model_validate(tree)
    store = Store.open(tmp_path / "store", create=True)
    first = bind(recipe, store, write=True).binding
    assert first.day == (date.today().isoformat() if reads else None)
    if reads:
        before = replace(first, day="2024-02-29")
        write_down(recipe, before)
        # Under other names too, which the same rows serve.
        tree["data"]["holdout"] = 1
        again = bind(Recipe.model_validate(tree), store, write=True).binding
        assert again.day == "2024-02-29"
        assert again.author_id != first.author_id


def test_a_plan_says_what_the_template_makes_of_its_arguments(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = tiny_llama()
    (teacher / "chat_template.jinja").write_text("{{ messages[0].content }}{{ mood }}")
    source = write_jsonl(tmp_path / "a.jsonl", [{"instruction": r["prompt"]} for r in prompts(6)])
    data = {"source": str(source), "format": "instruction", "holdout": 0}
    data |= {"chat_template_kwargs": {"mod": 1}}
    path = write_recipe(tmp_path, teacher, source, data=data)
    said = "the chat template never mentions 'mod'. Did you mean 'mood'?"
    assert said in stillroom("plan", path).stdout.replace("\n", " ")


def test_what_was_said_of_the_data_is_said_again(
    tiny_llama: Callable[..., Path], tmp_path: Path
) -> None:
    records = [{"instruction": r["prompt"], "documents": ["a"]} for r in prompts(6)]
    source = write_jsonl(tmp_path / "a.jsonl", records)
    teacher = tiny_llama()
    (teacher / "chat_template.jinja").write_text("{{ messages[0].content }}")
    data = {"source": str(source), "format": "instruction", "holdout": 0}
    path = write_recipe(tmp_path, teacher, source, data=data)
    said = [
        "6 records have a column 'documents', which nothing reads. Write them into the messages"
    ]
    assert last_json(stillroom("plan", path, "--json"))["notes"] == said
    stillroom("run", path, "--only", "data")
    for command in ("plan", "status"):
        again = stillroom(command, path, "--json")
        assert last_json(again)["notes"] == said
        assert again.stdout.splitlines().count(said[0]) == 1
