"""What is asked of engines: completions of requests, in any order.

Engines are also asked what follows in texts that are there.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

if TYPE_CHECKING:
    from ..targets.bounded import Bounded

UNASKED = "unasked"
"""In place of a finish reason: the budget is spent, and nobody was asked."""


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to write."""

    number: int
    prompt_ids: list[int]
    seed: int
    row: Mapping[str, Any] | None = None
    """The row of `prompts`, for an engine that is handed text and not ids."""
    sample: int = 0
    """Which completion of the prompt it is."""


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of a request.

    There is an `error` in place of tokens where the engine refused it or failed on it alone.
    """

    number: int
    token_ids: list[int]
    text: str
    finish_reason: str
    error: str | None = None
    attempts: int = 1
    reason: str = "engine"
    """Of an error: `engine` where engine or machine may be to blame, else what the row is rejected
    for."""
    served: str = ""
    """Of an endpoint: the model that answered, and its fingerprint where it has one."""
    left_out: tuple[str, ...] = ()
    """Of an endpoint: what its answer has beside the text."""
    logprobs: Mapping[str, Any] | None = None
    """Of an endpoint, where `generate.keep` asks for it: what it says of its tokens
    (`said_tokens.py`)."""
    targets: "Bounded | None" = None
    """Where `generate.keep` asks for it, the distribution that each token was drawn from, at
    temperature 1."""


def before_stop(
    token_ids: list[int], stop: Sequence[str], decode: Callable[[list[int]], str]
) -> tuple[list[int], str]:
    """A completion up to its first stop string: the ids that end before it, and their text.

    The text is what the ids decode to. A token that holds the beginning of the stop string goes
    with it, for ids and text must be of one length: "ab", "c.", "d" with stop "." is "ab".
    """
    text = decode(token_ids)
    found = [text.index(string) for string in stop if string in text]
    if not found:
        return token_ids, text
    before = text[: min(found)]
    kept = next(
        n for n in reversed(range(len(token_ids))) if before.startswith(decode(token_ids[:n]))
    )
    return token_ids[:kept], decode(token_ids[:kept])


class Engine(Protocol):
    """A loaded model that writes."""

    def generate(
        self, requests: Iterable[Request], heartbeat: Callable[[], None]
    ) -> Iterator[Completion]:
        """Give completions in the order they finish.

        Draws from `requests` as places become free, not far ahead of them.

        `heartbeat` is called at every step (one more token for every row in flight), when all that
        finished before has been handed out; it may raise a `StillroomError` to leave the engine.

        Raises:
            EngineDied: on one of the rows in flight.
        """


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """A text that an engine is to read."""

    number: int
    token_ids: list[int]
    positions: np.ndarray
    """[N] ascending: those whose next token's distribution is wanted."""


@dataclass(frozen=True, slots=True, eq=False)
class Said:
    """What follows at the next n of a text's positions, best first."""

    number: int
    """Of the text."""
    ids: np.ndarray
    """[n, K] int32"""
    logprobs: np.ndarray
    """[n, K] float32, of the whole vocabulary at temperature 1."""
    token_logprob: np.ndarray
    """[n] float32 of the token that is there, which may be no entry."""


class Reader(Protocol):
    """A loaded model that says what follows in texts."""

    def read(
        self, texts: Sequence[Text], entries: int | None, look: Callable[[], None]
    ) -> Iterator[Said]:
        """The distributions at all positions: of each text in parts, in order; texts in any order.

        Args:
            texts: None is longer than the model reads.
            entries: K, the best at each position; None: every id.
            look: Called at every step; may raise a `StillroomError` to leave the engine.

        Raises:
            EngineDied: on one of the texts.
        """
