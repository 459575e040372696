"""What a training run has done so far, as each of its checkpoints keeps it."""

import json
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import TypeAdapter

from ...storage.bounds import NOT_AS_WRITTEN, integer
from ...storage.errors import UsageError, in_short
from ..loader.samples import Cursor
from .speed import Speed


@dataclass(kw_only=True, slots=True)
class Record:
    """What a run has done so far; kept in each checkpoint."""

    cursor: Cursor = field(default_factory=Cursor)
    scored_tokens: int = 0
    best: dict[str, Any] | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    validation: list[dict[str, Any]] = field(default_factory=list)
    speed: Speed = field(default_factory=Speed)

    def summary(self) -> dict[str, Any]:
        """For the student's record."""
        return {
            "steps": self.cursor.step,
            "tokens": self.cursor.tokens,
            "scored_tokens": self.scored_tokens,
            "best": self.best,
            "history": self.history,
            "validation": self.validation,
        }

    @classmethod
    def of(cls, state: dict[str, Any]) -> Self:
        """Of a checkpoint.

        Raises:
            UsageError: another version of Stillroom wrote it, or somebody changed it.
        """
        try:
            counts = {name: integer(count) for name, count in state["cursor"].items()}
            found = cls(**state | {"cursor": Cursor(**counts), "speed": Speed(**state["speed"])})
            TypeAdapter(cls).validate_json(json.dumps(state), strict=True)
            return found
        except NOT_AS_WRITTEN as error:
            raise UsageError(
                "train: another version of Stillroom wrote this run's checkpoints "
                f"({in_short(error)}). Remove `checkpoints/` from its folder, and it is trained "
                "from the start."
            ) from error
