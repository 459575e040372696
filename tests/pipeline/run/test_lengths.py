"""Rows that are too long, from the source to the report.

They are cut or rejected, and counted, or they are refused.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import last_json, prompts, stillroom, write_jsonl, write_recipe
from tiny_classes import World, words
from tiny_models import save_tiny_bert

from stillroom.storage.store.store import Store

TEMPLATE = (
    "{% for m in messages %}{{ 'the' if m.role == 'user' else 'a' }} {{ m.content }}</s> "
    "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_llama import save_tiny_llama

    folder = save_tiny_llama(tmp_path_factory.mktemp("models") / "teacher", eos_token_id=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def instructions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 records, each with an answer of six tokens, thirty of them with one of 26."""
    answers = ["it was red and happy"] * 170 + ["it was red and happy " * 5] * 30
    records = [
        {"instruction": record["prompt"], "output": answer}
        for record, answer in zip(prompts(200), answers, strict=True)
    ]
    return write_jsonl(tmp_path_factory.mktemp("data") / "rows.jsonl", records)


def made(folder: Path, teacher: Path, source: Path, **data: Any) -> Path:
    section = {"source": str(source), "format": "instruction", "holdout": 20}
    less = {
        "storage": {"dir": str(folder / "store")},
        "train": {"tokens": 400, "tokens_per_step": 200},
        "evaluate": {"tokens": 400, "samples": 0, "gradient_tokens": 0},
    }
    return write_recipe(folder, teacher, source, data=section | data, generate=None, **less)


def test_thirty_long_rows_of_two_hundred(tmp_path: Path, teacher: Path, instructions: Path) -> None:
    recipe = made(tmp_path, teacher, instructions, max_tokens=20, too_long="cut")
    done = stillroom("run", recipe, "--json")
    stages = last_json(done)["stages"]
    assert (stages["data"]["rows"], stages["score"]["rows"]) == (200, 200)
    store = Store.open(tmp_path / "store")
    rows = store.index("generations", ["token_ids", "completion_tokens"]).to_pylist()
    long = [row for row in rows if row["completion_tokens"] > 6]
    assert [len(row["token_ids"]) for row in long] == [20] * 30
    # An answer of 26 tokens, of which so many are left.
    cut = {"rows": 30, "tokens": sum(26 - row["completion_tokens"] for row in long)}
    found = last_json(stillroom("status", recipe, "--json"))["stages"]["data"]["lengths"]
    assert found == {"max_tokens": 20, "cut": cut, "rejected": {"rows": 0, "tokens": 0}}
    assert stages["data"]["lengths"] == found
    said = f"30 rows are longer than 20 tokens: cut, {cut['tokens']} tokens left out"
    assert said in (tmp_path / "run" / "report.md").read_text()
    assert said in stillroom("status", recipe).stdout

    # Under another limit, what was short enough for both is not scored again.
    other = ("--set", "data.max_tokens=24")
    again = last_json(stillroom("run", recipe, "--until", "score", *other, "--json"))["stages"]
    assert (again["data"]["rows"], again["score"]["rows"]) == (200, 30)


def test_reviews_of_six_hundred_words_under_128_tokens(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    reviews = [{"text": words(rng, 600, 601), "label": n % 3} for n in range(24)]
    teacher = save_tiny_bert(tmp_path / "teacher", max_position_embeddings=140)
    data = {"source": str(tmp_path / "rows.jsonl"), "format": "labelled", "holdout": 6}
    data |= {"max_tokens": 128, "too_long": "cut"}
    world = World(tmp_path, teacher, reviews, data=data).scored()
    assert [len(row["token_ids"]) for row in world.rows()] == [128] * 24
    assert {int(row["token_ids"][-1]) for row in world.rows()} == {3}  # [SEP]
    line = world.plan().line("data")
    assert line.lengths["cut"] == {"rows": 24, "tokens": 24 * (602 - 128)}

    short = {"config": {"max_position_embeddings": 64}}
    for student, refused in (({"config": {}}, ""), (short, "student: reads 64 tokens at once")):
        plan = world.plan(world.changed(data=data, student=student))
        assert plan.unread.startswith(refused)
        assert bool(plan.unread) == bool(refused)


class TestPlan:
    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            (["data.max_tokens=129"], "data.max_tokens: 129, but the teacher reads 128 tokens"),
            (["data.max_tokens=4"], "data.max_tokens"),
            (["data.max_tokens=16", "data.too_long=shorten"], "data.too_long"),
            (["data.window_tokens=16"], "Set data.max_tokens instead"),
        ],
    )
    def test_a_limit_that_cannot_be_is_refused(
        self, tmp_path: Path, teacher: Path, instructions: Path, settings: list[str], message: str
    ) -> None:
        recipe = made(tmp_path, teacher, instructions)
        words = [word for setting in settings for word in ("--set", setting)]
        assert message in stillroom("plan", recipe, *words, expect=2).stderr

    def test_a_student_that_cannot_read_the_rows_is_refused_before_they_are_scored(
        self, tmp_path: Path, teacher: Path, instructions: Path
    ) -> None:
        recipe = made(tmp_path, teacher, instructions)
        stillroom("run", recipe, "--until", "data")
        for setting, message in (
            ("student.config.max_position_embeddings=24", "Set data.max_tokens to 24"),
            ("train.row_tokens=24", "train.row_tokens: 24, but 30 of the rows"),
        ):
            for command in ("plan", "run"):
                done = stillroom(command, recipe, "--set", setting, expect=2)
                assert message in done.stderr
        assert not Store.open(tmp_path / "store").commits("soft_targets")
        fits = ("--set", "data.max_tokens=24", "--set", "student.config.max_position_embeddings=24")
        stillroom("plan", recipe, *fits)


def test_prompts_that_are_too_long_are_rejected_whatever_was_written_before(
    tmp_path: Path, teacher: Path
) -> None:
    records = [*prompts(12), {"prompt": "cat " * 20}, {"prompt": "dog " * 30}]
    source = write_jsonl(tmp_path / "p.jsonl", records)
    data = {"source": str(source), "format": "prompt", "holdout": 2}
    recipe = write_recipe(tmp_path, teacher, source, data=data)
    stillroom("run", recipe, "--until", "generate")
    limit = ("--set", "data.max_tokens=16")
    outcome = last_json(stillroom("run", recipe, "--until", "generate", *limit, "--json"))
    assert outcome["stages"]["data"]["lengths"]["rejected"] == {"rows": 2, "tokens": 21 + 31}
    assert outcome["stages"]["generate"]["state"] == "cached"
    assert outcome["stages"]["generate"]["rows"] == 12
    stillroom("plan", recipe, "--set", "data.max_tokens=127")
    refused = stillroom("plan", recipe, "--set", "data.max_tokens=128", expect=2)
    assert "prompt and answer together have 128 tokens at most" in refused.stderr


def test_a_window_larger_than_the_context_is_named(
    tmp_path: Path, tiny_llama: Callable[..., Path]
) -> None:
    source = write_jsonl(tmp_path / "t.jsonl", [{"text": "the cat sat on " * 20}] * 8)
    data = {"source": str(source), "format": "text", "holdout": 0, "window_tokens": 200}
    recipe = write_recipe(tmp_path, tiny_llama(), source, data=data, generate=None)
    assert "windows have 128" in stillroom("plan", recipe).stdout
