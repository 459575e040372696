"""Recipes that are meant to harm are refused before anything is made of them.

Each is tried in a file and in `--set`.
"""

from pathlib import Path

import pytest
import yaml
from kit import stillroom

from stillroom.stages.recipe.load import load_recipe
from stillroom.stages.recipe.reading.yaml_text import (
    MOST_CHARACTERS,
    MOST_DEPTH,
    MOST_VALUES,
    read_yaml,
)
from stillroom.storage.errors import UsageError

BOMB = "a0: &a0 x\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 12)
)
HOSTILE = {
    "a list in itself": ("data: &a [*a]", r"line 1: \*a stands inside of what it names"),
    "a mapping in itself": ("data: &a {b: {c: *a}}", r"\*a stands inside of what it names"),
    "a merge of itself": ("data: &a {<<: *a}", r"\*a stands inside of what it names"),
    "a bomb": (BOMB, f"line 6: more than {MOST_VALUES} values, each alias written out"),
    "deep": ("data: " + "[" * 2000, f"nested more than {MOST_DEPTH} deep"),
    "deep, in blocks": (
        "\n".join(" " * n + "a:" for n in range(2000)),
        f"line {MOST_DEPTH + 1}: .* deep",
    ),
    "many": ("data: [" + "1," * MOST_VALUES + "]", "more than"),
    "long": ("#" * (MOST_CHARACTERS + 1), f"more than {MOST_CHARACTERS} characters"),
    "a date that is none": ("data: {revision: 2026-13-45}", "month must be in 1..12"),
    "a long number": ("data: {limit: " + "9" * 5000 + "}", "integer string conversion"),
}


@pytest.mark.parametrize(("text", "says"), HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_recipe_is_refused(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(UsageError, match=f"(?s)^{path}: not YAML that can be read: .*{says}"):
        load_recipe(path)
    path.write_text("data: {}")
    with pytest.raises(UsageError, match=f"(?s)--set data.columns: .*{says}"):
        load_recipe(path, [f"data.columns={text}"])


def test_the_command_line_ends_with_2(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HOSTILE["a list in itself"][0])
    assert "not YAML that can be read" in stillroom("plan", path, expect=2).stderr


def test_aliases_and_merges_within_bounds_mean_what_they_did() -> None:
    text = "a: &a {x: 1, y: &y [2, 3]}\nb: {<<: *a, z: *y}\nc: [*y, *y]\nd: &d\n"
    tree, node = read_yaml(text)
    assert tree == yaml.safe_load(text)
    assert tree["b"] == {"x": 1, "y": [2, 3], "z": [2, 3]}
    assert yaml.serialize(node) == yaml.serialize(yaml.compose(text, Loader=yaml.SafeLoader))
    assert read_yaml("") == (None, None)
