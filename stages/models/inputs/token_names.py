"""What token an endpoint means by a name: the bytes, or the string, in place of an id.

Servers name a token by its bytes, or by what it decodes to alone (without a leading space, and as
U+FFFD where it is a part of a character), or, inside of a character, by the whole of it. So a name
is taken for an id only where no other id can have it. Which token was written is told by the text
itself.
"""

import json
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

UNKNOWN = "�".encode()
"""In a name: something that is no character."""
_UNDERLINE = {"String": "▁"}
_HEX = re.compile(r"<0x([0-9A-F]{2})>")


class TokenNames:
    """The names of one tokenizer's ids."""

    def __init__(self, tokenizer: Any) -> None:
        """`tokenizer`: a fast tokenizer of transformers."""
        from transformers.convert_slow_tokenizer import bytes_to_unicode

        self._tokenizer = tokenizer.backend_tokenizer
        spec = json.loads(self._tokenizer.to_str())
        self._added = {one["id"]: str(one["content"]) for one in spec.get("added_tokens") or ()}
        steps = list(_steps(spec.get("decoder") or {}))
        self._steps = {str(step["type"]) for step in steps}
        self._marks_spaces = "Metaspace" in self._steps or _UNDERLINE in [
            step.get("pattern") for step in steps
        ]
        self._of_bytes = {one: number for number, one in bytes_to_unicode().items()}
        self._known: dict[int, tuple[bytes | None, bytes]] = {}

    def exact(self, token: int) -> bytes | None:
        """A token's bytes; None: nobody can tell, of an alphabet that has no bytes."""
        return self._both(token)[0]

    def alone(self, token: int) -> bytes:
        """What it decodes to alone."""
        return self._both(token)[1]

    def fits(self, name: bytes, token: int, before: bytes) -> bool:
        """Whether a server may call a token so.

        `before`: the part of a character that the tokens before it end in.
        """
        exact, alone = self._both(token)
        if name in (exact, alone):
            return True
        if exact is None:
            return False
        whole = before + exact
        # One that only begins a character may have no name.
        return name in ((whole.decode(errors=how).encode()) for how in ("ignore", "replace"))

    def one(self, name: bytes, *, exactly: bool, inside: bool) -> int | None:
        """The only id that can have a name; None: none has, or several.

        Args:
            name: As the server gives it.
            exactly: Whether the server is known to give bytes, and no tokens decoded alone.
            inside: Whether the text before ends inside of a character.
        """
        if not name or UNKNOWN in name or (inside and not name.isascii() and _is_text(name)):
            return None  # the last: it may be what completes the character
        found = self._exact.get(name, set())
        if not exactly:
            found = found | self._alone.get(name, set())
        return next(iter(found)) if len(found) == 1 else None

    def _both(self, token: int) -> tuple[bytes | None, bytes]:
        if token not in self._known:
            alone = str(self._tokenizer.decode([token], skip_special_tokens=False)).encode()
            self._known[token] = (self._bytes(token), alone)
        return self._known[token]

    def _bytes(self, token: int) -> bytes | None:
        if token in self._added:
            return self._added[token].encode()
        piece = self._tokenizer.id_to_token(token)
        if piece is None:
            return None
        if "ByteLevel" in self._steps:
            numbers = [self._of_bytes.get(one) for one in piece]
            return None if None in numbers else bytes(n for n in numbers if n is not None)
        if "ByteFallback" in self._steps and (found := _HEX.fullmatch(piece)):
            return bytes.fromhex(found[1])
        if self._marks_spaces:
            return str(piece).replace("▁", " ").encode()
        return None

    @cached_property
    def _exact(self) -> Mapping[bytes, set[int]]:
        return self._by(0)

    @cached_property
    def _alone(self) -> Mapping[bytes, set[int]]:
        return self._by(1)

    def _by(self, which: int) -> Mapping[bytes, set[int]]:
        found: defaultdict[bytes, set[int]] = defaultdict(set)
        for token in range(self._tokenizer.get_vocab_size(with_added_tokens=True)):
            name = self._both(token)[which]
            if name is not None:
                found[name].add(token)
        return found


def unfinished(text: bytes) -> bytes:
    """The part of a character that bytes end in; empty: they end with a whole one."""
    for length in range(1, min(3, len(text)) + 1):
        last = text[-length]
        if last >= 0xC0:  # begins a character of 2, 3 or 4 bytes
            needed = 2 if last < 0xE0 else 3 if last < 0xF0 else 4
            return text[-length:] if length < needed else b""
        if last < 0x80:
            return b""
    return b""


def _is_text(name: bytes) -> bool:
    try:
        name.decode()
    except UnicodeDecodeError:
        return False
    return True


def _steps(decoder: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The steps of a decoder, those of a sequence too."""
    if decoder.get("type") == "Sequence":
        for step in decoder["decoders"]:
            yield from _steps(step)
    elif decoder:
        yield decoder
