"""Texts of any length as token ids.

A long text is tokenized in pieces, so that it takes the memory of one piece.

A tokenizer holds 100 to 200 bytes for each character that it reads at once. Pieces overlap, and are
joined where both read the same tokens at the same characters, before the place and after it:

    piece      the cat sat on a mat and th
    next                  on a mat and then it was happy
    joined     the cat sat on a | mat and then it was happy

What is cut off at the ends of a piece is read differently, far from there nothing is.
"""

from typing import Any, NamedTuple

import numpy as np

from ....storage.errors import RowError

PIECE = 1 << 20
"""Characters of a piece."""
WHOLE = 1 << 22
"""Characters of the longest text that is tokenized at once, where pieces are not enough."""
_SHARES = (512, 64, 8)
"""The share of a piece that the next one reads again: as little as is enough to be joined."""
_SAME = 16
"""Tokens before and after the place where two are joined that are the same in both."""


class _Piece(NamedTuple):
    """What a tokenizer reads in a part of a text."""

    ids: np.ndarray
    """[T] int32."""
    starts: np.ndarray
    """[T] the character of the whole text that each token begins at."""


def refuse_long(text: str, *, why: str) -> None:
    """Refuse a text that is too long to be read at once and cannot be tokenized in pieces.

    Raises:
        RowError: it is one.
    """
    if len(text) > WHOLE:
        raise RowError(
            "too_long", f"{len(text):,} characters; {WHOLE:,} are tokenized at once, and {why}"
        )


def in_pieces(tokenizer: Any, text: str) -> bool:
    """Whether a text is tokenized in pieces. Its tokens must be known by their characters then.

    Raises:
        RowError: it would have to be, and the tokenizer does not say where its tokens are.
    """
    if not tokenizer.is_fast:
        refuse_long(text, why="this tokenizer does not say which characters a token is")
    return bool(tokenizer.is_fast) and len(text) > PIECE


def ids_of_pieces(tokenizer: Any, text: str) -> np.ndarray:
    """[T] int32 ids of a text, without special tokens at its ends.

    Raises:
        RowError: the tokenizer reads a place differently, wherever a piece begins.
    """
    piece, end, parts = _read(tokenizer, text, 0), PIECE, []
    while end < len(text):
        following, here, overlap = _next(tokenizer, text, piece, end)
        parts.append(piece.ids[:here])
        piece, end = following, end + PIECE - overlap
    return np.concatenate([*parts, piece.ids])


def _next(tokenizer: Any, text: str, piece: _Piece, end: int) -> tuple[_Piece, int, int]:
    """The piece after the one up to a character, how many tokens of that stay, and the overlap."""
    for overlap in (PIECE // share for share in _SHARES):
        following = _read(tokenizer, text, end - overlap)
        if place := _joined(piece, following, after=end - overlap // 2):
            here, there = place
            return _Piece(following.ids[there:], following.starts[there:]), here, overlap
    raise RowError(
        "too_long",
        f"{len(text):,} characters; {PIECE:,} are tokenized at once, and before character {end:,} "
        "the tokens depend on where that begins. Split the text",
    )


def _read(tokenizer: Any, text: str, begin: int) -> _Piece:
    part = text[begin : begin + PIECE]
    found = tokenizer(part, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    starts = np.fromiter((start for start, _ in found["offset_mapping"]), np.int64)
    return _Piece(np.array(found["input_ids"], np.int32), starts + begin)


def _joined(piece: _Piece, following: _Piece, *, after: int) -> tuple[int, int] | None:
    """The first token after a character that both have, with the same around it.

    Returns:
        Its index in each, or None.
    """
    first = int(np.searchsorted(piece.starts, after))
    for here in range(max(first, _SAME), len(piece.ids) - _SAME + 1):
        there = int(np.searchsorted(following.starts, piece.starts[here]))
        ours, theirs = (slice(n - _SAME, n + _SAME) for n in (here, there))
        if there >= _SAME and all(
            np.array_equal(a[ours], b[theirs]) for a, b in zip(piece, following, strict=True)
        ):
            return here, there
    return None
