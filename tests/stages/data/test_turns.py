"""Conversations through the stages: one row each.

Only the tokens of the assistant's turns have targets.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from kit import last_json, stillroom, write_jsonl, write_recipe

from stillroom.storage.store.store import Store
from stillroom.storage.tables.spans import spans_of

TEMPLATE = (
    "{% for m in messages %}{{ 'the' if m.role == 'user' else 'a' }} {{ m.content }}</s> "
    "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
TURNS = ("cat sat", "dog ran", "and then", "it was red", "mat", "happy")
SAID = [["dog", "ran", "</s>"], ["it", "was", "red", "</s>"], ["happy", "</s>"]]
MESSAGES = [
    {"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(TURNS)
]


@pytest.fixture
def recipe(tiny_llama: Callable[..., Path], tmp_path: Path) -> Callable[..., Path]:
    """Factory: a recipe on two conversations."""
    teacher = tiny_llama(eos_token_id=None)
    (teacher / "chat_template.jinja").write_text(TEMPLATE)

    def make(name: str, turns: str | None, **sections: Any) -> Path:
        (tmp_path / name).mkdir()
        records = [{"messages": MESSAGES}, {"messages": MESSAGES[2:]}]
        data = {"source": str(write_jsonl(tmp_path / "a.jsonl", records)), "format": "messages"}
        data |= {"holdout": 0, "turns": turns}
        return write_recipe(tmp_path / name, teacher, Path(data["source"]), data=data, **sections)

    return make


def scored(folder: Path, table: str) -> list[list[list[str]]]:
    """Of each row of a table, longest first, the tokens of each of its spans."""
    from tiny_llama import tiny_tokenizer

    store = Store.open(folder)
    places: dict[str, list[int]] = {}
    for row in store.index(table, ["key"]).to_pylist():
        places.setdefault(row["shard"], []).append(row["row"])
    found = sorted(store.rows(table, places), key=lambda row: -len(row["token_ids"]))
    words = tiny_tokenizer().convert_ids_to_tokens
    return [
        [words(row["token_ids"][start : start + n].tolist()) for start, n in spans_of(row)]
        for row in found
    ]


@pytest.mark.parametrize(
    ("turns", "expected"),
    [(None, [SAID, SAID[1:]]), ("all", [SAID, SAID[1:]]), ("last", [SAID[2:]] * 2)],
)
def test_a_conversation_is_one_row(
    recipe: Callable[..., Path], tmp_path: Path, turns: str | None, expected: list[list[list[str]]]
) -> None:
    path = recipe("given", turns, generate=None)
    stages = last_json(stillroom("run", path, "--until", "score", "--json"))["stages"]
    assert scored(tmp_path / "given" / "store", "generations") == expected
    assert scored(tmp_path / "given" / "store", "soft_targets") == expected
    assert stages["score"]["tokens"] == sum(len(span) for row in expected for span in row)


@pytest.mark.parametrize(("turns", "before"), [("all", SAID[:2]), (None, []), ("last", [])])
def test_of_a_prompt_the_turns_are_scored_where_the_recipe_says_all(
    recipe: Callable[..., Path], tmp_path: Path, turns: str | None, before: list[list[str]]
) -> None:
    generate = {"engine": "hf", "temperature": 0.0, "max_tokens": 3}
    path = recipe("written", turns, generate=generate)
    stillroom("run", path, "--until", "score")
    for table in ("generations", "soft_targets"):
        *turns_before, written = scored(tmp_path / "written" / "store", table)[0]
        assert (turns_before, len(written)) == (before, 3)


def test_a_conversation_left_out_is_neither_scored_nor_missed(
    recipe: Callable[..., Path], tmp_path: Path
) -> None:
    path = recipe("given", None, generate=None)
    # By its hash the first of them is held out; the second goes on from it.
    whole = [MESSAGES[0] | {"content": "blue"}, *MESSAGES[1:]]
    other = [MESSAGES[2] | {"content": "red"}, *MESSAGES[3:]]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": m} for m in (whole[:2], whole, other)])
    made = stillroom("run", path, "--until", "score", "--set", "data.holdout=1", "--json")
    stages = last_json(made)["stages"]
    assert (stages["data"]["rows"], stages["score"]["rows"]) == (2, 2)
    assert scored(tmp_path / "given" / "store", "soft_targets") == [SAID[1:], SAID[:1]]
    plan = last_json(stillroom("plan", path, "--set", "data.holdout=1", "--json"))
    assert [plan["stages"][name]["state"] for name in ("data", "score")] == ["done", "done"]
    assert plan["notes"][0].startswith("conversations left out of training: 1.")
