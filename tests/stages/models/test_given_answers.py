"""Given answers: prompt and completion are one text to the tokenizer.

What is scored begins where they part.
"""

from pathlib import Path
from typing import Any

import pytest
import torch

from stillroom.stages.models.inputs.rendering import Renderer
from stillroom.storage.errors import RowError

PARTS = [
    ("Once upon a time", " there was a dog"),
    ("Once upon a time ", "there was a dog"),
    ("Once upon a ti", "me there was"),
    ("She said", ', "no".'),
    ("the end", "."),
]
STORIES = "models/stories260k-llama-hd32"


def prefix_space_tokenizer() -> Any:
    """A tokenizer like that of Llama 2.

    A space is put before every text, in the token of its first word.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = '▁Once ▁upon ▁a ▁time ▁there ▁was ▁dog ▁the ▁end ▁She ▁said ▁ti me ▁ , . " no'.split()
    vocabulary = [(word, -1.0) for word in words]
    vocabulary += [(letter, -9.0) for letter in sorted(set("".join(words))) if letter not in words]
    model = models.Unigram([("<unk>", -20.0), ("<s>", 0.0), ("</s>", 0.0), *vocabulary], 0)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")


@pytest.fixture(params=["prefix space", "bytes", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a tokenizer."""
    from chat_templates import byte_tokenizer

    if request.param == "gpt2":
        return request.getfixturevalue("assets") / "models/tokenizer-gpt2"
    made = prefix_space_tokenizer() if request.param == "prefix space" else byte_tokenizer(None)
    made.save_pretrained(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


def given(renderer: Renderer, text: str, completion: str) -> tuple[list[int], int]:
    row = {"messages": None, "text": text, "completion": completion}
    ids, spans = renderer.given(row, last=True)
    ((start, count),) = spans.tolist()
    assert start + count == len(ids)
    return ids, start


@pytest.mark.assets
@pytest.mark.parametrize(("text", "completion"), PARTS)
def test_the_ids_are_those_of_the_whole_text(folder: Path, text: str, completion: str) -> None:
    renderer = Renderer(folder, {})
    tokenizer = renderer.tokenizer
    ids, start = given(renderer, text, completion)
    assert ids == [*tokenizer(text + completion)["input_ids"], tokenizer.eos_token_id]
    own = tokenizer(text)["input_ids"]
    # The boundary is the prompt's, or moves back to the last token that both share, and is counted.
    moved = ids[: len(own)] != own
    assert ids[:start] == own[:start]
    assert (start < len(own)) == moved
    assert not moved or ids[start] != own[start]
    assert len(renderer.notes()) == moved


def test_a_beginning_of_sequence_is_not_doubled(tiny_llama: Any) -> None:
    renderer = Renderer(tiny_llama(), {})
    plain = {"messages": None, "text": "the cat", "completion": " sat"}
    for row in (plain, plain | {"text": "<s>the cat"}, plain | {"text": "<s> the cat"}):
        ids, spans = renderer.given(row, last=True)
        assert renderer.tokenizer.convert_ids_to_tokens(ids) == "<s> the cat sat </s>".split()
        assert spans.tolist() == [[3, 2]]
        assert renderer.prompt_ids(row) == ids[:3]


def test_blanks_are_no_text(tiny_llama: Any) -> None:
    renderer = Renderer(tiny_llama(), {})
    row = {"messages": None, "text": "the cat", "completion": " \n"}
    with pytest.raises(RowError, match="the completion has no words"):
        renderer.given(row, last=True)
    with pytest.raises(RowError, match="the prompt has no words"):
        renderer.prompt_ids(row | {"text": " \n"})


@pytest.mark.assets
@pytest.mark.parametrize(("text", "completion"), PARTS)
def test_a_teacher_finds_no_other_split_more_likely(
    assets: Path, text: str, completion: str
) -> None:
    """The whole text's tokens, against prompt and completion tokenized each by itself."""
    from transformers import AutoModelForCausalLM

    renderer = Renderer(assets / STORIES, {})
    model = AutoModelForCausalLM.from_pretrained(assets / STORIES)
    encode = renderer.tokenizer
    whole = given(renderer, text, completion)[0][:-1]  # the end token is common to all
    split = encode(text)["input_ids"] + encode(completion, add_special_tokens=False)["input_ids"]

    def nats(ids: list[int]) -> float:
        with torch.inference_mode():
            return float(model(torch.tensor([ids]), labels=torch.tensor([ids])).loss) * len(ids[1:])

    assert nats(whole) <= nats(split) + 1e-3
