"""Labelled records on their way in, and what classification refuses.

It refuses labels, classes, heads and idle settings.
"""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_classes import World, records
from tiny_models import CLASSES, save_tiny_bert
from transformers import AutoModelForSequenceClassification

from stillroom.pipeline.plan.plan import make_plan
from stillroom.stages.models.fit.classes import label_index
from stillroom.stages.recipe.checks.together import check_together
from stillroom.stages.recipe.sections import Recipe
from stillroom.storage.errors import RowError, UsageError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("classes")
    return World(folder, save_tiny_bert(folder / "teacher"), records(16))


class TestData:
    @pytest.mark.parametrize(
        ("value", "expected"),
        [(2, 2), ("2", 2), (1.0, 1), ("1.0", 1), ("good", 1), (np.int32(1), 1)]
        + [
            (nothing, None)
            for nothing in (None, "", math.nan, -1, "-1", -1.0, "-1.0", np.int64(-1))
        ],
    )
    def test_a_label_is_an_index_or_a_name(self, value: Any, expected: int | None) -> None:
        assert label_index(value, CLASSES) == expected

    @pytest.mark.parametrize("value", [3, -2, "awful", 0.5, True, "1.5", -1.5, math.inf, [1], {}])
    def test_any_other_label_is_refused_with_what_there_is(self, value: Any) -> None:
        with pytest.raises(
            RowError, match=r"is no class of the teacher. It knows 0 to 2, or bad, good, neither"
        ) as e:
            label_index(value, CLASSES)
        assert e.value.reason == "unknown_label"

    def test_digits_as_names_are_read_alike_from_every_file_or_refused(self) -> None:
        for value in (1, "1"):
            assert label_index(value, ("0", "1")) == 1
            with pytest.raises(RowError, match="the class of that name or the one of that index"):
                label_index(value, ("1", "2", "3"))
        assert label_index(-1, ("-1", "1")) == label_index("-1", ("-1", "1")) == 0
        assert label_index("3", ("1", "2", "3")) == label_index(3, ("1", "2", "3")) == 2

    def test_rows_that_cannot_be_used_are_rejected_and_the_others_go_on(
        self, tmp_path: Path
    ) -> None:
        wrong = [
            {"text": "the cat", "label": "awful"},
            {"text": "cat " * 60, "label": 1},
            {"text": "the cat [SEP] sat", "text_pair": "a dog", "label": 1},
            {"text": "", "label": 1},
        ]
        world = World(
            tmp_path, save_tiny_bert(tmp_path / "teacher"), [*records(16), *wrong]
        ).scored()
        found = {row["reason"]: row["message"] for row in world.rows("rejects")}
        assert set(found) == {"unknown_label", "too_long", "unreadable", "empty"}
        assert "62 tokens; the teacher reads 48" in found["too_long"]
        assert "'[SEP]'" in found["unreadable"]
        assert len(world.rows()) == 16

    def test_columns_of_other_names(self, tmp_path: Path) -> None:
        rows = [{"premise": r["text"], "hypothesis": "the cat", "gold": 1} for r in records(16)]
        columns = {"text": "premise", "text_pair": "hypothesis", "label": "gold"}
        section = {
            "source": str(tmp_path / "rows.jsonl"),
            "format": "labelled",
            "holdout": 2,
            "columns": columns,
        }
        world = World(tmp_path, save_tiny_bert(tmp_path / "teacher"), rows, data=section).scored()
        assert {(row["text_pair"], row["label"]) for row in world.rows("prompts")} == {
            ("the cat", 1)
        }

    def test_a_source_without_the_column_is_refused(self, tmp_path: Path) -> None:
        world = World(
            tmp_path,
            save_tiny_bert(tmp_path / "teacher"),
            [{"text": f"a {word}", "score": 1} for word in ("cat", "dog", "tree")],
            data={"source": str(tmp_path / "rows.jsonl"), "format": "labelled", "holdout": 1},
        )
        with pytest.raises(
            UsageError, match=r"loss\.hard_weight: no row .* label \(column 'label' .*data\.columns"
        ):
            make_plan(world.recipe)


class TestRefusals:
    @pytest.mark.parametrize(
        ("classes", "message"),
        [
            (
                ("no", "yes"),
                r"student\.model: .* has 2 classes \(no, yes\), "
                r"the teacher 3 \(bad, good, neither\)",
            ),
            (
                ("good", "bad", "neither"),
                r"the teacher the same in another order \(bad, good, neither\)",
            ),
        ],
    )
    def test_a_student_of_other_classes(
        self, world: World, tmp_path: Path, classes: Any, message: str
    ) -> None:
        recipe = world.changed(
            student={"model": str(save_tiny_bert(tmp_path / "other", classes=classes))}
        )
        with pytest.raises(UsageError, match=message):
            make_plan(recipe)

    def test_overrides_of_the_classes(self, world: World) -> None:
        recipe = world.changed(student={"config": {"id2label": {"0": "no", "1": "yes"}}})
        with pytest.raises(UsageError, match=r"student\.config has 2 classes"):
            make_plan(recipe)

    def test_another_tokenizer(self, world: World, tmp_path: Path) -> None:
        folder = save_tiny_bert(tmp_path / "other")
        path = folder / "tokenizer.json"
        path.write_text(path.read_text().replace('"cat": 7', '"lynx": 7'))
        with pytest.raises(
            UsageError, match=r"student\.model: the tokenizer of .*other is not that of the teacher"
        ):
            make_plan(world.changed(student={"model": str(folder)}))

    def test_a_teacher_without_a_head(
        self, world: World, tmp_path: Path, tiny_llama: Callable[..., Path]
    ) -> None:
        recipe = world.changed(teacher={"model": str(tiny_llama("lm"))})
        with pytest.raises(
            UsageError,
            match=r"no classification head \(config.json names LlamaForCausalLM, expected",
        ):
            make_plan(recipe)

    def test_a_classifier_that_is_asked_to_write(self, world: World) -> None:
        tree = world.recipe.model_dump() | {"run": {"dir": "x"}, "score": {"k": 4}}
        recipe = Recipe.model_validate(
            tree | {"data": {"source": str(world.source), "format": "text"}}
        )
        with pytest.raises(
            UsageError,
            match=r"teacher\.model: .* is a text classifier \(bert\).* Set run\.task to classif",
        ):
            make_plan(recipe)

    def test_a_teacher_whose_head_was_never_trained(self, tmp_path: Path) -> None:
        """config.json may claim a head that the weights lack: transformers would make one up."""
        folder = save_tiny_bert(tmp_path / "teacher")
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        state = {
            name: t for name, t in model.state_dict().items() if not name.startswith("classifier")
        }
        model.save_pretrained(folder, state_dict=state)
        world = World(tmp_path, folder, records(16))
        with pytest.raises(
            UsageError, match=r"lacks weights of its classification head \(classifier\.bias"
        ):
            world.scored()

    def test_a_regression(self, world: World, tmp_path: Path) -> None:
        recipe = world.changed(
            teacher={"model": str(save_tiny_bert(tmp_path / "one", classes=("score",)))}
        )
        with pytest.raises(UsageError, match=r"has 1 outputs .* expected two classes or more"):
            make_plan(recipe)

    @pytest.mark.parametrize(
        ("sections", "where"),
        [
            ({"score": None}, "score"),
            ({"score": {"targets": "topk", "k": 2}}, "score.targets"),
            ({"generate": {"engine": "hf"}}, "generate"),
            ({"evaluate": {"generate": {"prompts": 3}}}, "evaluate.generate"),
            ({"train": {"epochs": 1, "row_tokens": 64}}, "train.row_tokens"),
            ({"data": {"source": "x", "format": "text"}}, "data.format"),
            ({"run": {"dir": "x"}}, "data.format"),
        ],
    )
    def test_what_has_no_meaning_is_refused_by_name(
        self, world: World, sections: Any, where: str
    ) -> None:
        recipe = Recipe.model_validate(world.recipe.model_dump() | sections)
        assert where in [path for path, _ in check_together(recipe)]
