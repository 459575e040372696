"""Which columns of a foreign table hold what, and why a row of it is refused."""

from dataclasses import dataclass
from typing import Literal

Values = Literal["logprobs", "probs", "logits"]
Place = Literal["next", "same"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Columns:
    """Which columns hold what, and how their lists stand to the tokens."""

    tokens: str
    """Token ids of the whole text, [T]."""
    ids: str
    """Ids of each position's entries, [L][K]."""
    values: str
    """Their log-probabilities, probabilities or logits, [L][K]."""
    kind: Values = "logprobs"
    lse: str | None = None
    """logits, and those alone: the log of the sum of exp over the whole vocabulary, [L]."""
    token_logprobs: str | None = None
    """Log-probability of the token that is there, [L]; None: from the entries."""
    prompt_tokens: str | None = None
    """How many tokens at the beginning are the prompt ..."""
    completion_tokens: str | None = None
    """... or how many at the end are not; None: no prompt, all but the first token are scored."""
    spans: str | None = None
    """In place of either: start and tokens of each scored span, one after another, [2 S]."""
    targets_at: Place
    """next: what stands at a token predicts the token after it. same: it is the distribution of
    that very token."""
    forced: bool = False
    """Each position's last entry is the token that is there, besides the K best: K + 1 entries."""
    k: int | None = None
    """Keep so many of the best; None: all, of which every position then has equally many."""

    def named(self) -> list[str]:
        """The columns that a table must have."""
        always = [self.tokens, self.ids, self.values]
        maybe = [self.lse, self.token_logprobs]
        maybe += [self.prompt_tokens, self.completion_tokens, self.spans]
        return [*always, *(name for name in maybe if name)]


class BadRow(Exception):
    """A row that cannot be a soft target; `reason` is a short code."""

    def __init__(self, reason: str, column: str, *, found: str, expected: str, help: str) -> None:
        super().__init__(f"column {column}: {found}, expected {expected}. {help}")
        self.reason = reason
