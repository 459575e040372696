"""The ids that a tokenizer can make, read from its files."""

from pathlib import Path
from typing import Any

from .files import read_json

_OTHER_SENSES = ("image", "audio", "video", "vision")


def highest_id(folder: Path, field: str, *, of_text: bool = False) -> int | None:
    """The highest id of a folder's tokenizer, added tokens included; None where no file tells.

    Args:
        folder: Of a model.
        field: The recipe's field, for messages.
        of_text: Leave out the tokens that stand for a picture or a sound: no text has them. A model
            of text alone may come with the tokenizer of its family, and without rows for these.

    Raises:
        UsageError: a file is not readable.
    """
    content = read_json(folder / "tokenizer.json", field, missing={})
    ids = _vocabulary(folder, field, content)
    if not ids and (folder / "tokenizer.model").is_file():
        return None
    config = read_json(folder / "tokenizer_config.json", field, missing={})
    added = _added(folder, field, content, config)
    other = _of_other_senses(config) if of_text else set()
    without = {index for index, text in added.items() if text in other}
    return max((ids | added.keys()) - without, default=None)


def _vocabulary(folder: Path, field: str, content: dict[str, Any]) -> set[int]:
    vocabulary = content.get("model", {}).get("vocab") or read_json(
        folder / "vocab.json", field, missing={}
    )
    if not vocabulary and (folder / "vocab.txt").is_file():
        vocabulary = (folder / "vocab.txt").read_text("utf-8").splitlines()
    return set(vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary)))


def _added(
    folder: Path, field: str, content: dict[str, Any], config: dict[str, Any]
) -> dict[int, str]:
    """Id -> text of the tokens that were added to the vocabulary, wherever they are written."""
    listed = read_json(folder / "added_tokens.json", field, missing={})
    decoder = config.get("added_tokens_decoder") or {}
    return (
        {index: text for text, index in listed.items()}
        | {int(index): token["content"] for index, token in decoder.items()}
        | {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    )


def _of_other_senses(config: dict[str, Any]) -> set[str]:
    extra = config.get("extra_special_tokens")
    named: dict[str, Any] = config | (extra if isinstance(extra, dict) else {})
    return {
        token["content"] if isinstance(token, dict) else str(token)
        for name, token in named.items()
        if name.endswith("_token") and name.startswith(_OTHER_SENSES)
    }
