"""Tagged records on their way in: words and classes as people have them.

Words may have several tokens; some are cut, some are rejected.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_words import TAGS, Words, save_tiny_tagger, tagged

from stillroom.stages.data.formats import prompt_row
from stillroom.stages.data.tokenizing import Tokenizing
from stillroom.stages.recipe.sections import Data
from stillroom.storage.errors import RowError, UsageError
from stillroom.storage.tables.spans import positions


def data(**more: Any) -> Data:
    return Data.model_validate({"source": "rows.jsonl", "format": "tagged"} | more)


def row(record: dict[str, Any], **more: Any) -> dict[str, Any]:
    return prompt_row(record, "rows.jsonl:1", data(**more), given=True, classes=TAGS)


def rejected(record: Any, **more: Any) -> RowError:
    with pytest.raises(RowError) as error:
        row(record, **more)
    return error.value


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_tagger(tmp_path_factory.mktemp("tagger") / "teacher")


def tokenizing(teacher: Path, **more: Any) -> Tokenizing:
    return Tokenizing(teacher, data(**more), context_tokens=48)


class TestRecords:
    @pytest.mark.parametrize(
        "record",
        [
            {"words": ["a", "cat"], "labels": [1, 0]},
            {"words": ["a", "cat"], "labels": ["B-PER", "O"]},
            {"words": ["a", "cat"], "labels": ["1", "0"]},
            {"tokens": ["a", "cat"], "ner_tags": [1, 0], "id": "7", "pos_tags": [3, 3]},
            {"tokens": ["a", "cat"], "tags": ["B-PER", "O"]},
        ],
    )
    def test_words_and_classes_as_people_have_them(self, record: dict[str, Any]) -> None:
        found = row(record)
        assert (json.loads(found["text"]), found["labels"]) == (["a", "cat"], [1, 0])
        assert found["key"] == row({"words": ["a", "cat"], "labels": [1, 0]})["key"]
        assert found["label"] is None

    def test_columns_of_other_names(self) -> None:
        record = {"sentence": ["a", "cat"], "gold": [1, 0]}
        found = row(record, columns={"words": "sentence", "labels": "gold"})
        assert found["labels"] == [1, 0]

    @pytest.mark.parametrize("labels", [None, [None, None], [-100, -100], ["", -1]])
    def test_texts_without_a_label(self, labels: Any) -> None:
        found = row({"words": ["a", "cat"], "labels": labels})
        assert found["labels"] is None
        assert found["key"] == row({"words": ["a", "cat"]})["key"]
        assert found["key"] != row({"words": ["a", "cat"], "labels": [0, 0]})["key"]

    def test_a_word_without_a_label(self) -> None:
        assert row({"words": ["a", "cat"], "labels": [-100, "O"]})["labels"] == [-1, 0]

    @pytest.mark.parametrize(
        ("record", "reason", "says"),
        [
            ({"words": [], "labels": []}, "empty", "words is an empty list"),
            ({"words": "a cat", "labels": [0, 0]}, "unreadable", "words is text, expected a list"),
            ({"words": ["a", "cat"], "labels": [0]}, "unreadable", "1 labels for 2 words"),
            ({"words": ["a"], "labels": "O"}, "unreadable", "labels is text, expected a list"),
            ({"words": ["a"], "labels": ["B-ORG"]}, "unknown_label", "is no class of the teacher"),
            ({"words": ["a"], "labels": [9]}, "unknown_label", "is no class of the teacher"),
            ({"words": ["a", ""], "labels": [0, 0]}, "empty", "word 2 is empty"),
            ({"words": ["a", ["cat"]]}, "unreadable", "word 2 is a list, expected text"),
            ({"text": "a cat"}, "missing_column", "no column 'words'"),
            (
                {"words": ["a"], "tags": [0], "ner_tags": [1]},
                "missing_column",
                "no column 'labels', and both 'tags' and 'ner_tags'",
            ),
        ],
    )
    def test_what_is_rejected(self, record: dict[str, Any], reason: str, says: str) -> None:
        error = rejected(record)
        assert error.reason == reason
        assert says in str(error)


class TestTokens:
    def test_a_target_stands_at_the_first_token_of_each_word(self, teacher: Path) -> None:
        """By hand: [CLS] cat ##s sat a ##ed ##s [SEP]; spans of first tokens alone."""
        words = ["cats", "sat", "as", "tree"]
        (given,) = tokenizing(teacher).texts(row({"words": words}))
        tokens = tokenizing(teacher).renderer.tokenizer.convert_ids_to_tokens(list(given.token_ids))
        assert tokens == ["[CLS]", "cat", "##s", "sat", "a", "##s", "tree", "[SEP]"]
        assert given.spans is not None
        assert given.spans.tolist() == [[1, 1], [3, 2], [6, 1]]
        assert positions(given.spans).tolist() == [1, 3, 4, 6]
        assert given.scored == 4

    def test_labels_name_the_row_and_order_matters(self, teacher: Path) -> None:
        keys = [
            tokenizing(teacher).texts(row({"words": ["a", "cat"], "labels": labels}))[0].tokens_key
            for labels in ([0, 1], [1, 0], [-100, 0], None)
        ]
        assert len(set(keys)) == 4

    @pytest.mark.parametrize(
        ("words", "reason", "says"),
        [
            (["cat", "\u200b"], "empty", "word 2 of 2 ('\\u200b') has no token"),
            ([" ", "cat"], "empty", "word 1 of 2 (' ') has no token"),
            (["cat", "[SEP]", "sat"], "unreadable", "its segments do not part"),
            (["cat"] * 47, "too_long", "49 tokens; the teacher reads 48"),
        ],
    )
    def test_what_is_rejected(
        self, teacher: Path, words: list[str], reason: str, says: str
    ) -> None:
        with pytest.raises(RowError) as error:
            tokenizing(teacher).texts(row({"words": words}))
        assert error.value.reason == reason
        assert says in str(error.value)

    def test_a_cut_takes_whole_words(self, teacher: Path) -> None:
        """Six tokens beside the two special ones end inside of `as`: it goes, with its label."""
        cut = tokenizing(teacher, max_tokens=8, too_long="cut")
        words, labels = ["cats", "sat", "cats", "as", "tree"], [1, 0, 2, 3, 4]
        (given,) = cut.texts(row({"words": words, "labels": labels}))
        tokens = cut.renderer.tokenizer.convert_ids_to_tokens(list(given.token_ids))
        assert tokens == ["[CLS]", "cat", "##s", "sat", "cat", "##s", "[SEP]"]
        assert given.spans is not None
        assert positions(given.spans).tolist() == [1, 3, 4]
        assert (cut.lengths.cut.rows, cut.lengths.cut.tokens) == (1, 3)
        (shorter,) = cut.texts(row({"words": words[:3], "labels": labels[:3]}))
        assert given.tokens_key == shorter.tokens_key, "labels of words that are gone are gone"

    def test_a_cut_that_would_leave_no_word_is_a_rejection(self, teacher: Path) -> None:
        cut = tokenizing(teacher, max_tokens=8, too_long="cut")
        with pytest.raises(RowError, match="a cut would leave no word of it"):
            cut.texts(row({"words": ["catsssssss", "sat"]}))

    def test_a_slow_tokenizer_is_refused_by_name(self, teacher: Path) -> None:
        from transformers import ByT5Tokenizer

        slow = tokenizing(teacher)
        slow.renderer.tokenizer = ByT5Tokenizer()
        with pytest.raises(UsageError, match=r"ByT5Tokenizer\) is a slow one, which does not say"):
            slow.texts(row({"words": ["cat"]}))


def test_a_cut_row_is_scored_with_the_labels_it_still_has(tmp_path: Path) -> None:
    rows = [*tagged(14), {"words": ["cats"] * 9, "labels": [1, 2, 3, 4, 0, 1, 2, 3, 4]}]
    more = {"max_tokens": 12, "too_long": "cut", "holdout": 2}
    section = {"source": str(tmp_path / "rows.jsonl"), "format": "tagged", **more}
    world = Words(tmp_path, save_tiny_tagger(tmp_path / "teacher"), rows, data=section).scored()
    (found,) = [row for row in world.rows() if (row["token_ids"] == 7).sum() == 5]
    assert found["labels"].tolist() == [1, 2, 3, 4, 0]
    assert found["span_tokens"] == 5
    assert np.array_equal(found["spans"], [1, 1, 3, 1, 5, 1, 7, 1, 9, 1])
