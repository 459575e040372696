"""Lengths: how many tokens a row may have, and what became of the rows that have more."""

from dataclasses import asdict, dataclass, field
from typing import Any

from ...storage.errors import RowError
from ...storage.words import counted
from ..models.inputs.reads import too_long
from ..recipe.sections import Data


@dataclass(slots=True)
class Longer:
    """Rows that are longer than allowed, and their tokens."""

    rows: int = 0
    tokens: int = 0

    def add(self, tokens: int) -> None:
        """Count a row."""
        self.rows += 1
        self.tokens += tokens


@dataclass(kw_only=True, slots=True)
class Lengths:
    """What a row may have, and a count of those that have more."""

    most: int
    """Tokens of a row."""
    limit: str
    """Whose limit that is, as the begin of a sentence."""
    cut: Longer = field(default_factory=Longer)
    """With the tokens that were left out."""
    rejected: Longer = field(default_factory=Longer)
    """With all their tokens."""

    @classmethod
    def of(cls, data: Data, reads: int) -> "Lengths":
        """Of a recipe's rows, where the model reads so many tokens."""
        if data.max_tokens is None or data.max_tokens > reads:
            return cls(most=reads, limit="the teacher reads")
        return cls(most=data.max_tokens, limit="data.max_tokens is")

    def reject(self, tokens: int, why: str = "") -> RowError:
        """Count a row that is rejected; `why` it cannot be cut, where that was asked for."""
        self.rejected.add(tokens)
        error = too_long(tokens, self.most, limit=self.limit)
        return RowError(error.reason, f"{error}{why}")

    def about(self) -> dict[str, Any]:
        """For programs."""
        return {"max_tokens": self.most, "cut": asdict(self.cut), "rejected": asdict(self.rejected)}

    def notes(self) -> list[str]:
        """For people, a sentence each; nothing where all rows are short enough."""
        said = (("cut", self.cut, "left out"), ("rejected", self.rejected, "in all"))
        return [
            f"{counted(found.rows, 'row is', 'rows are')} longer than "
            f"{self.most:,} tokens: {how}, {counted(found.tokens, 'token')} {which}"
            for how, found, which in said
            if found.rows
        ]
