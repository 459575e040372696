"""The text of single tokens, for people: what each adds to a text, its leading space kept."""

from pathlib import Path
from typing import Any

from ....storage.errors import IntegrityError, in_short


def stored_tokenizer(file: Path) -> Any:
    """The `tokenizers.Tokenizer` of a stored tokenizer.json; None if there is none.

    Raises:
        IntegrityError: it is damaged.
    """
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(file)) if file.is_file() else None
    except Exception as error:  # the library raises nothing narrower
        raise IntegrityError(
            f"{file}: not a tokenizer ({in_short(error)}). `stillroom verify` lists what is "
            "damaged in a store, `stillroom repair` mends it; of a published folder take a new "
            "copy."
        ) from error


class Pieces:
    """Token ids as text, whatever the tokenizer's own alphabet.

    That may be byte-level, SentencePiece, WordPiece or words.
    """

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a `tokenizers.Tokenizer`; None: ids in brackets."""
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    @classmethod
    def of_folder(cls, folder: Path) -> "Pieces":
        """Of the tokenizer that is kept there, if one is."""
        return cls(stored_tokenizer(folder / "tokenizer.json"))

    def __getitem__(self, token: int) -> str:
        """A token's text.

        Bytes that are no character of their own become the replacement character.
        """
        if token not in self._known:
            self._known[token] = self._text(token)
        return self._known[token]

    def _text(self, token: int) -> str:
        if self._tokenizer is None:
            return f"[{token}]"
        # Twice, less once: decoders drop the space before the first token, and only there.
        once, twice = (
            str(self._tokenizer.decode([token] * n, skip_special_tokens=False)) for n in (1, 2)
        )
        piece = self._tokenizer.id_to_token(token)
        return twice[len(once) :] or (f"[{token}]" if piece is None else str(piece))
