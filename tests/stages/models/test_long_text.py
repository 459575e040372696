"""Long texts: their tokens are those of the whole.

Yet the tokenizer is never given more than a piece.
"""

import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny_llama import WORDS, tiny_tokenizer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from stillroom.stages.models.chat import long_text
from stillroom.stages.models.inputs.rendering import Renderer
from stillroom.storage.errors import RowError

PIECE = 1 << 13


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_text, "PIECE", PIECE)
    monkeypatch.setattr(long_text, "WHOLE", 2 * PIECE)


def renderer(folder: Path, tokenizer: Any) -> Renderer:
    tokenizer.save_pretrained(folder)
    return Renderer(folder, {})


def asked(found: Renderer, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many characters the tokenizer is given each time."""
    lengths: list[int] = []
    kind = type(found.tokenizer)
    call = kind.__call__

    def counted(self: Any, text: str, *more: Any, **how: Any) -> Any:
        lengths.append(len(text))
        return call(self, text, *more, **how)

    monkeypatch.setattr(kind, "__call__", counted)
    return lengths


def texts() -> dict[str, str]:
    draw = random.Random(0)
    return {
        "words": " ".join(draw.choices(WORDS, k=20_000)),
        "letters of all sizes": "".join(draw.choices("cat é漢字🙂 \n", k=40_000)),
        "blanks": " ".join(draw.choices(WORDS, k=2_000)) + " " * 700 + "cat " * 9_000,
    }


@pytest.mark.assets
@pytest.mark.parametrize("text", texts().values(), ids=texts())
@pytest.mark.parametrize("kind", ["words", "bytes", "bert", "gpt2", "llama"])
def test_a_long_text_has_the_tokens_of_the_whole(
    kind: str,
    text: str,
    tmp_path: Path,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from chat_templates import byte_tokenizer

    made = {"words": tiny_tokenizer, "bytes": lambda: byte_tokenizer(None)}
    names = {
        "bert": "tokenizer-bert-base-uncased",
        "gpt2": "tokenizer-gpt2",
        "llama": "stories260k-llama-hd32",
    }
    if kind in made:
        found = renderer(tmp_path, made[kind]())
    else:
        found = Renderer(request.getfixturevalue("assets") / "models" / names[kind], {})
    whole = found.tokenizer(text)["input_ids"]
    lengths = asked(found, monkeypatch)
    windows = found.windows(text, len(whole))
    assert [ids.tolist() for ids in windows] == [whole]
    assert len(lengths) > len(text) // PIECE
    assert max(lengths) <= PIECE


def test_a_text_without_a_place_to_join_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RowError, match=r"40,000 characters; 8,192 are .* Split the text") as error:
        renderer(tmp_path, tiny_tokenizer()).windows("a" * 40_000, 8)
    assert error.value.reason == "too_long"


def test_texts_that_are_read_whole_are_refused_before_the_tokenizer_sees_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    found = renderer(tmp_path, tokenizer)
    lengths = asked(found, monkeypatch)
    half = "cat " * (PIECE // 4)
    with pytest.raises(RowError, match="a text that is classified is read whole"):
        found.labelled_ids(half * 2, half)
    with pytest.raises(RowError, match="a conversation is read whole"):
        found.prompt_ids({"messages": [{"role": "user", "content": half * 3}]})
    slow = SimpleNamespace(is_fast=False)
    with pytest.raises(RowError, match="this tokenizer does not say which characters"):
        long_text.in_pieces(slow, half * 3)
    assert all(length < PIECE for length in lengths)


@pytest.mark.parametrize("unknown", [None, "[UNK]"])
def test_what_stands_around_a_text_is_known_without_a_token_for_the_letter_a(
    tmp_path: Path, unknown: str | None
) -> None:
    """WordLevel without an unknown token raises an error for what it does not know."""
    special = {"[CLS]": 0, "[SEP]": 1, "[UNK]": 2}
    model = models.WordLevel({**special, "cat": 3, "sat": 4}, unk_token=unknown or "none")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("[CLS]", 0), ("[SEP]", 1)]
    made.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=ends)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=made, cls_token="[CLS]", sep_token="[SEP]", unk_token=unknown
    )
    found = renderer(tmp_path, fast).whole_windows("cat sat cat sat cat", 4)
    assert [window.tolist() for window in found] == [[0, 3, 4, 1], [0, 3, 4, 1], [0, 3, 1]]
