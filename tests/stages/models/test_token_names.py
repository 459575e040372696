"""Names of tokens: whichever way a server calls an id, it is never taken for another one."""

from pathlib import Path
from typing import Any

import pytest
from endpoint_tokens import byte_tokenizer

from stillroom.stages.models.inputs.token_names import TokenNames, unfinished

pytestmark = pytest.mark.assets
TEXT = "Once upon a time, a naïve \N{VOLCANO} said: 語, the end.\n"


@pytest.fixture(params=["sentencepiece", "bytes"])
def tokenizer(request: pytest.FixtureRequest, assets: Path) -> Any:
    from transformers import AutoTokenizer

    if request.param == "bytes":
        return byte_tokenizer()
    return AutoTokenizer.from_pretrained(assets / "models/stories260k-llama-hd32")


def test_a_name_is_that_of_its_own_id_or_of_none(tokenizer: Any) -> None:
    names, found = TokenNames(tokenizer), 0
    for token in range(len(tokenizer)):
        exact, alone = names.exact(token), names.alone(token)
        assert exact is not None
        assert names.one(exact, exactly=True, inside=False) in (token, None)
        assert names.one(exact, exactly=False, inside=False) in (token, None)
        assert names.one(alone, exactly=False, inside=False) in (token, None)
        found += names.one(exact, exactly=True, inside=False) == token
    assert found > len(tokenizer) / 3  # the letters of a small vocabulary are bytes of it too


def test_the_bytes_of_a_text_are_those_of_its_tokens(tokenizer: Any) -> None:
    names = TokenNames(tokenizer)
    ids = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    exact = [names.exact(token) for token in ids]
    assert b"".join(one for one in exact if one is not None).decode().lstrip(" ") == TEXT


def test_a_part_of_a_character_may_be_called_by_the_whole_of_it(tokenizer: Any) -> None:
    """As vLLM does; of the other ids at that place nobody then knows whether a name is theirs."""
    names = TokenNames(tokenizer)
    ids = tokenizer("\N{VOLCANO}", add_special_tokens=False)["input_ids"]
    before, whole = b"", "\N{VOLCANO}".encode()
    for token in ids[-4:-1]:
        assert names.fits(b"", token, before)
        assert names.fits(names.alone(token), token, before)
        before = unfinished(before + (names.exact(token) or b""))
    assert before == whole[:3]
    assert names.fits(whole, ids[-1], before)
    assert not names.fits("é".encode(), ids[-1], before)
    assert names.one("é".encode(), exactly=True, inside=True) is None
    letter = names.one(b"the", exactly=True, inside=False)
    assert names.one(b"the", exactly=True, inside=True) == letter
