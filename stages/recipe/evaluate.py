"""The section `evaluate`.

It says which rows judge, which answers are asked for, and how they are scored.
"""

import re
from typing import Literal, Self

from pydantic import Field, model_validator

from ...storage.time_limit import time_limit
from .fields import Section

_COMPILE_SECONDS = 5.0


class EvaluateGenerate(Section):
    """Greedy answers to held-out prompts, scored against the reference."""

    metric: Literal["exact_match", "regex", "rouge_l"] = "rouge_l"
    """How an answer is scored, 0 to 1."""
    pattern: str | None = None
    """regex: group 1 (or the whole match) of the last match is compared, in answer and reference
    alike. A text that it searches for more than a second counts as unanswered."""
    normalize: Literal["number", "text", "none"] = "none"
    """exact_match, regex: what is compared of answer and reference; number: 1,000 is $1000.0; text:
    without case, punctuation and English articles."""
    prompts: int = Field(50, ge=1)
    """How many held-out prompts are answered."""
    max_tokens: int = Field(128, ge=1)
    """Limit on an answer's tokens."""

    @model_validator(mode="after")
    def _usable_pattern(self) -> Self:
        if self.metric == "regex" and not self.pattern:
            raise ValueError("metric 'regex' needs a `pattern`, for example '#### (.*)'")
        if self.metric != "regex" and self.pattern is not None:
            raise ValueError(
                f"`pattern` is of metric 'regex'; this is {self.metric!r}. Set that, or remove it"
            )
        if self.metric == "rouge_l" and self.normalize != "none":
            raise ValueError(
                f"normalize {self.normalize!r} is of metrics 'exact_match' and 'regex'; 'rouge_l' "
                "compares words without case and punctuation as it is. Set another metric, or "
                "remove it"
            )
        try:
            with time_limit(_COMPILE_SECONDS):
                re.compile(self.pattern or "")
        except (re.error, OverflowError, RecursionError, TimeoutError) as error:
            raise ValueError(
                f"`pattern` is no regular expression ({error}): {self.pattern}"
            ) from error
        return self


HELD_OUT_FIELDS = ("source", "split", "limit")
"""Of `evaluate`: which rows judge."""


class Evaluate(Section):
    """How teacher and students are judged, on held-out prompts."""

    source: str | None = None
    """Held-out rows of your own, in place of `data.holdout`: as `data.source`. null: that one, if
    `split` is another one of its splits. `tokens` scored tokens of them are judged on."""
    split: str | None = None
    """Split of the held-out rows; null: test, or a file as it is."""
    limit: int | None = Field(None, ge=1)
    """Use the first of these records only."""
    baseline: bool = False
    """Also train the same student on cross-entropy alone: same start, order and tokens. Without
    `score` it is that."""
    tokens: int = Field(100_000, ge=1)
    """Scored tokens of held-out rows to judge on, at most."""
    gradient_tokens: int = Field(16_384, ge=0)
    """Of these, tokens on which the gradients of sparse and full targets are compared; 0: not at
    all. Takes three times the memory of the student's weights."""
    generate: EvaluateGenerate | None = None
    """Answer prompts as well."""
    samples: int = Field(3, ge=0)
    """Without `generate`: held-out prompts that each student answers for the report, greedily, in
    at most 64 tokens."""

    @property
    def names_rows(self) -> bool:
        """Whether held-out rows are named; else `data.holdout` takes some of the data."""
        return self.source is not None or self.split is not None
