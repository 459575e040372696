"""The bounds of many turns by two renderings: each turn is another word in them.

    words       <user>hi<end><assistant>a1x<end><user>so<end><assistant>a3x<end><user>...
    pieces      ........................   .........................   ...............
    whole       <user>hi<end><assistant>yes<end><user>so<end><assistant>no<end><user>...

The pieces must be in the whole in their order, first and last at its ends, and in one way alone:
what is found from the left is what is found from the right. What is between two pieces is a turn.
"""

import re
from dataclasses import replace

from ....storage.errors import RowError
from .template import Chars, Chat, ChatTemplate

FEWEST = 3
"""Turns; fewer are as soon bounded by themselves."""
_WORDS = ("aVq{}x0x", "Zk1{}yWb")
_NAMING = ("role", "name")


def bounded_at_once(
    template: ChatTemplate, chat: Chat, text: str, turns: list[int]
) -> dict[int, Chars]:
    """Message -> its part of the text, for those turns that are proved so.

    The others are left to `Bounds`.
    """
    try:
        header = _header(template, chat, turns[0])
        pieces, others = (_pieces(template, chat, turns, word) for word in _WORDS)
    except RowError:
        return {}
    if not header or not pieces or pieces != others:
        return {}
    found = zip(turns, pieces, _between(text, pieces), strict=False)
    # A turn begins where the prompt ends. What more stands before the word may be the turn's.
    return {
        number: (start, end)
        for number, before, (start, end) in found
        if before.endswith(header) and start < end
    }


def _header(template: ChatTemplate, chat: Chat, number: int) -> str:
    """What a prompt is closed by, for the assistant to answer; empty: that cannot be told."""
    closed = Chat(chat.messages[:number], chat.tools)
    text, opened = template.render(closed).text, template.render(replace(closed, open=True)).text
    return opened[len(text) :] if opened.startswith(text) else ""


def _pieces(template: ChatTemplate, chat: Chat, turns: list[int], word: str) -> list[str]:
    """The text between words that stand in place of turns.

    It is empty where a word is not written as it is, once.
    """
    messages = [*chat.messages]
    for number in turns:
        named = {key: messages[number][key] for key in _NAMING if key in messages[number]}
        messages[number] = named | {"content": word.format(number)}
    text = template.render(replace(chat, messages=messages)).text
    parts = re.split("(" + re.escape(word).replace(r"\{\}", r"\d+") + ")", text)
    return parts[::2] if parts[1::2] == [word.format(number) for number in turns] else []


def _between(text: str, pieces: list[str]) -> list[Chars]:
    """What is between the pieces; empty unless there is one way."""
    first, *inner, last = pieces
    stop = len(text) - len(last)
    if not text.startswith(first) or not text.endswith(last) or len(first) > stop:
        return []
    lefts, at = [], len(first)
    for piece in inner:
        at = text.find(piece, at, stop)
        if at < 0:
            return []
        lefts.append(at)
        at += len(piece)
    at = stop
    for piece, left in zip(reversed(inner), reversed(lefts), strict=True):
        at = text.rfind(piece, 0, at)
        if at != left:
            return []
    starts = [len(first), *(left + len(piece) for left, piece in zip(lefts, inner, strict=True))]
    return list(zip(starts, [*lefts, stop], strict=True))
