"""The ids that a tokenizer can make, read from its files."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from .config import read_json

_OTHER_SENSES = ("image", "audio", "video", "vision")


def highest_id(folder: Path, field: str, *, without: Iterable[int] = ()) -> int | None:
    """The highest id of a folder's tokenizer, added tokens included; None where no file tells.

    Args:
        folder: Of a model.
        field: The recipe's field, for messages.
        without: Ids that do not count.

    Raises:
        UsageError: a file is not readable.
    """
    content = read_json(folder / "tokenizer.json", field, missing={})
    vocabulary = content.get("model", {}).get("vocab") or read_json(
        folder / "vocab.json", field, missing={}
    )
    ids = [*vocabulary.values()] if isinstance(vocabulary, dict) else [*range(len(vocabulary))]
    if not ids and (folder / "vocab.txt").is_file():
        ids = [*range(len((folder / "vocab.txt").read_text("utf-8").splitlines()))]
    if not ids and (folder / "tokenizer.model").is_file():
        return None
    ids += added_tokens(folder, field)
    return max(set(ids) - set(without), default=None)


def added_tokens(folder: Path, field: str) -> dict[int, str]:
    """Id -> text of the tokens that were added to a vocabulary."""
    found = read_json(folder / "added_tokens.json", field, missing={})
    tokens = {index: text for text, index in found.items()}
    config = read_json(folder / "tokenizer_config.json", field, missing={})
    decoder = config.get("added_tokens_decoder") or {}
    tokens |= {int(index): token["content"] for index, token in decoder.items()}
    content = read_json(folder / "tokenizer.json", field, missing={})
    return tokens | {t["id"]: t["content"] for t in content.get("added_tokens") or []}


def text_less_ids(folder: Path, field: str) -> set[int]:
    """Ids of tokens that stand for a picture or a sound, which no text has.

    A model of text alone may come with the tokenizer of its family, and without rows for these.
    """
    config = read_json(folder / "tokenizer_config.json", field, missing={})
    extra = config.get("extra_special_tokens")
    named: dict[str, Any] = config | (extra if isinstance(extra, dict) else {})
    texts = {
        token.get("content") if isinstance(token, dict) else token
        for name, token in named.items()
        if name.endswith("_token") and name.startswith(_OTHER_SENSES)
    }
    return {index for index, text in added_tokens(folder, field).items() if text in texts}
