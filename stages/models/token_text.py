"""The text of single tokens, for people: what each adds to a text, its leading space kept."""

from pathlib import Path
from typing import Any


class Pieces:
    """Token ids as text, whatever the tokenizer's own alphabet (byte-level, SentencePiece, WordPiece, words)."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a `tokenizers.Tokenizer`; None: ids in brackets."""
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}

    @classmethod
    def of_folder(cls, folder: Path) -> "Pieces":
        """Of the tokenizer that is kept there, if one is."""
        from tokenizers import Tokenizer

        file = folder / "tokenizer.json"
        return cls(Tokenizer.from_file(str(file)) if file.is_file() else None)

    def __getitem__(self, token: int) -> str:
        """A token's text; bytes that are no character of their own are the replacement character."""
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
