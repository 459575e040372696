"""What a recipe's names stood for is kept by number; a number that is lost does not stop the next."""

from pathlib import Path
from typing import Any

from kit import recipe_tree

from stillroom.pipeline.plan.resolve import write_down
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
