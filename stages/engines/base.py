"""What `generate` asks of an engine that writes text: requests in, completions out as they finish, in any order."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to write."""

    number: int
    prompt_ids: list[int]
    seed: int


@dataclass(frozen=True, slots=True)
class Completion:
    """What came of a request; `error` in place of tokens where the engine refused it or failed on it alone."""

    number: int
    token_ids: list[int]
    text: str
    finish_reason: str
    error: str | None = None
    attempts: int = 1


def before_stop(
    token_ids: list[int], stop: Sequence[str], decode: Callable[[list[int]], str]
) -> tuple[list[int], str]:
    """A completion up to its first stop string: the ids that end before it, and what they decode to.

    A token that holds the beginning of the stop string goes with it, for ids and text must be of
    one length: "ab", "c.", "d" with stop "." is "ab".
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
        """Completions in the order they finish; draws from `requests` as places become free, not far ahead of them.

        `heartbeat` is called at every step (one more token for every row in flight), when all that finished before
        has been handed out; it may raise a `StillroomError` to leave the engine.

        Raises:
            EngineDied: on one of the rows in flight.
        """
