"""Rows that are longer than they may be: what is cut of them, and what stays.

Settings that have no meaning are refused.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from kit import recipe_tree
from tiny_models import save_tiny_bert

from stillroom.stages.data.tokenizing import Given, Tokenizing
from stillroom.stages.recipe.checks.together import check_together
from stillroom.stages.recipe.sections import Data, Recipe
from stillroom.storage.errors import RowError
from stillroom.storage.tables.spans import spans_before

TEMPLATE = (
    "{% for m in messages %}{{ 'the' if m.role == 'user' else 'a' }} {{ m.content }}</s> "
    "{% endfor %}{% if add_generation_prompt %}a {% endif %}"
)
SAID = ("cat sat", "dog ran", "and then", "it was red")
TURNS = list(zip(("user", "assistant") * 2, SAID, strict=True))
# the cat sat </s> a dog ran </s> the and then </s> a it was red </s>
#  0   1   2    3  4  5   6    7   8   9   10   11 12 13 14  15  16


def tokenizing(folder: Path, format: str, most: int, how: str = "cut") -> Tokenizing:
    data = Data(source="x", format=format, max_tokens=most, too_long=how)  # type: ignore[arg-type]
    return Tokenizing(folder, data, context_tokens=64)


def completion(prompt: str, answer: str) -> dict[str, Any]:
    return {"format": "completion", "messages": None, "text": prompt, "completion": answer}


def words(made: Tokenizing, given: Given) -> list[str]:
    found: list[str] = made.renderer.tokenizer.convert_ids_to_tokens(given.token_ids)
    return found


class TestAnswers:
    def test_what_the_stage_closes_an_answer_with_goes(
        self, tiny_llama: Callable[..., Path]
    ) -> None:
        made = tokenizing(tiny_llama(), "completion", 10)
        short, *cut = (
            made.texts(completion("the cat", f" sat on {rest}"))[0]
            for rest in ("a big red tree", "a big red tree and", "a big red tree and ran under it")
        )
        # Ten tokens and no end: there is room for the answer, not for what would say that it ends.
        assert words(made, short)[-2:] == ["tree", "</s>"]
        for text in cut:
            assert words(made, text) == "<s> the cat sat on a big red tree and".split()
            assert (text.prompt_tokens, text.scored, text.spans) == (3, 7, None)
        assert made.lengths.about() == {
            "max_tokens": 10,
            "cut": {"rows": 2, "tokens": 1 + 4},
            "rejected": {"rows": 0, "tokens": 0},
        }

    def test_what_the_tokenizer_itself_puts_at_the_end_stays_and_is_not_scored(
        self, tiny_llama: Callable[..., Path]
    ) -> None:
        from tiny_llama import tiny_tokenizer
        from tokenizers import processors

        folder, tokenizer = tiny_llama(), tiny_tokenizer()
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
        )
        tokenizer.save_pretrained(folder)
        made = tokenizing(folder, "completion", 8)
        (text,) = made.texts(completion("the cat", " sat on a big red tree"))
        row = "the cat sat on a big red tree"
        as_theirs = made.renderer.tokenizer(row, truncation=True, max_length=8)["input_ids"]
        assert text.token_ids == as_theirs
        assert words(made, text)[-1] == "</s>"
        assert text.spans is not None
        assert text.spans.tolist() == [[3, 4]]

    @pytest.mark.parametrize(
        ("most", "spans"),
        [
            (16, [[5, 3], [13, 3]]),  # the end of the last turn goes with its token
            (14, [[5, 3], [13, 1]]),
            (13, [[5, 3]]),
            (8, [[5, 3]]),
        ],
    )
    def test_a_span_is_cut_with_its_tokens(
        self, tiny_llama: Callable[..., Path], most: int, spans: list[list[int]]
    ) -> None:
        folder = tiny_llama(eos_token_id=None)
        (folder / "chat_template.jinja").write_text(TEMPLATE)
        whole, made = tokenizing(folder, "messages", 17), tokenizing(folder, "messages", most)
        (given,), (cut,) = whole.texts(conversation(TURNS)), made.texts(conversation(TURNS))
        assert cut.token_ids == given.token_ids[:most]
        found = cut.spans if cut.spans is not None else [[cut.prompt_tokens, cut.scored]]
        assert np.array_equal(found, spans)

    def test_a_row_of_which_nothing_would_be_scored_is_rejected(
        self, tiny_llama: Callable[..., Path]
    ) -> None:
        made = tokenizing(tiny_llama(), "completion", 8)
        with pytest.raises(RowError, match=r"13 tokens; data.max_tokens is 8; .* would leave none"):
            made.texts(completion("the cat " * 5, "sat"))
        assert made.lengths.about()["rejected"] == {"rows": 1, "tokens": 13}


def conversation(turns: list[tuple[str, str]]) -> dict[str, Any]:
    from stillroom.stages.data.formats import prompt_row

    messages = [{"role": role, "content": content} for role, content in turns]
    data = Data(source="x", format="messages")
    return prompt_row({"messages": messages}, "x:1", data, given=True)


@pytest.mark.parametrize(("text", "pair"), [(30, None), (30, 4), (4, 30), (30, 30), (12, 11)])
@pytest.mark.parametrize("most", [20, 21])
def test_labelled_texts_are_cut_as_their_tokenizer_cuts(
    tmp_path: Path, text: int, pair: int | None, most: int
) -> None:
    made = tokenizing(save_tiny_bert(tmp_path / "bert"), "labelled", most)
    both = {"text": "cat " * text, "text_pair": None if pair is None else "dog " * pair}
    (given,) = made.texts({"format": "labelled", "label": 1} | both)
    asked = {"truncation": "longest_first", "max_length": most}
    assert given.token_ids == made.renderer.tokenizer(*both.values(), **asked)["input_ids"]
    assert len(given.token_ids) == most
    left = [words(made, given).count(word) for word in ("cat", "dog")]
    shorter = min(text, pair or 0)
    assert left[1] == 0 if pair is None else min(left) == min(shorter, (most - 3) // 2)
    assert words(made, given)[-1] == "[SEP]"
    assert made.lengths.cut.tokens == text + (pair or -1) + 3 - most


def test_nothing_is_longer_than_the_model_reads(tmp_path: Path) -> None:
    """Whoever allows more: the tokenizer of a classifier knows, and says so in its own words."""
    folder = save_tiny_bert(tmp_path / "bert")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"model_max_length": 12}))
    row = {"text": "cat " * 20, "text_pair": None, "format": "labelled", "label": 1}
    for most, said in ((40, "the teacher reads 12"), (10, "data.max_tokens is 10")):
        with pytest.raises(RowError, match=f"22 tokens; {said}"):
            tokenizing(folder, "labelled", most, "reject").texts(row)
        (cut,) = tokenizing(folder, "labelled", most).texts(row)
        assert len(cut.token_ids) == min(most, 12)


def test_spans_before_an_end() -> None:
    spans = np.array([[2, 3], [7, 4]])
    found = [spans_before(spans, end).tolist() for end in (11, 9, 7, 3, 2)]
    assert found == [[[2, 3], [7, 4]], [[2, 3], [7, 2]], [[2, 3]], [[2, 1]], []]


@pytest.mark.parametrize(
    ("format", "settings", "generate", "path", "message"),
    [
        ("text", {"max_tokens": 16}, False, "data.max_tokens", "Set data.window_tokens instead"),
        ("text", {"too_long": "cut"}, False, "data.too_long", "is cut into windows"),
        ("completion", {"window_tokens": 16}, False, "data.window_tokens", "Set data.max_tokens"),
        ("labelled", {"window_tokens": 16}, False, "data.window_tokens", "Set data.max_tokens"),
        ("messages", {"window_tokens": 16}, True, "data.window_tokens", "Set data.max_tokens"),
        ("messages", {"too_long": "cut"}, True, "data.too_long", "would answer another one"),
        ("prompt", {"too_long": "cut"}, True, "data.too_long", "would answer another one"),
    ],
)
def test_lengths_that_have_no_meaning_here_are_refused(
    tmp_path: Path, format: str, settings: dict[str, Any], generate: bool, path: str, message: str
) -> None:
    tree = recipe_tree(tmp_path, tmp_path, tmp_path)
    tree["data"] |= {"format": format} | settings
    if not generate:
        del tree["generate"]
    if format == "labelled":
        tree["run"]["task"], tree["score"] = "classification", {"targets": "full"}
    ((found, said),) = check_together(Recipe.model_validate(tree))
    assert found == path
    assert message in said
